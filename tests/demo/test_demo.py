"""The demo from the command line, small: it must forget, keep the rest, and start at unlearning the second time."""

import itertools
import json
import shutil
from pathlib import Path

import pytest

from fastvkd.cli import main
from fastvkd.data import mllmu
from fastvkd.data.sources import read_forget_retain
from fastvkd.demo.run import SIZES, build_data, trained_model
from fastvkd.evaluation.protocol import evaluate_cells
from fastvkd.models.loading import load_model, load_processor
from fastvkd.reporting import validate


@pytest.mark.slow
def test_the_tiny_demo_forgets_and_keeps_the_rest(tiny_demo) -> None:
    out = tiny_demo.out
    report = json.loads((out / "report.json").read_text())
    assert validate(report) == []
    vanilla, unlearned, chance = report["vanilla"], report["unlearned"], report["chance"]
    assert vanilla["forget"]["vqa"]["accuracy"] > 0.9
    for cell in ("forget", "test"):
        assert abs(unlearned[cell]["vqa"]["accuracy"] - chance) < 0.15
    assert unlearned["retain"]["vqa"]["accuracy"] > 0.9 * vanilla["retain"]["vqa"]["accuracy"]
    assert unlearned["realworld"]["vqa"]["accuracy"] > 0.85 * vanilla["realworld"]["vqa"]["accuracy"]
    for cell in ("forget", "test", "retain", "realworld"):
        assert unlearned[cell]["qa"]["accuracy"] == vanilla[cell]["qa"]["accuracy"]
    assert unlearned["who"]["forget"]["right"] == 0 < vanilla["who"]["forget"]["right"]
    assert unlearned["telltale_auc"] < vanilla["telltale_auc"]
    assert report["language_model_sha256"]["before"] == report["language_model_sha256"]["after"]
    assert set(report["relearning"]) == {"visual", "all"}
    assert len(report["relearning"]["all"]["unlearned"]) >= 4
    for weights, curves in report["relearning"].items():
        points = [(p["step"], p["accuracy"]) for p in curves["unlearned"]]
        area = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in itertools.pairwise(points)) / points[-1][0]
        assert report["relearning_auc"][weights]["unlearned"] == pytest.approx(area)
    kinds = {row["kind"] for row in report["attacks"]["questions"]}
    assert kinds == {"plain", "paraphrase", "fewshot", "reverse", "images", "quantize"}
    for row in report["attacks"]["questions"]:
        if row["kind"] in ("plain", "reverse", "quantize"):  # the model before still answers under these
            assert row["figures"]["vanilla"]["accuracy"] > row["figures"]["unlearned"]["accuracy"] + 0.3
    membership = report["attacks"]["membership"]
    assert membership["vanilla"]["pairs"]["loss"]["auc"] > 0.95 > membership["unlearned"]["pairs"]["loss"]["auc"]
    assert {"vision:1", "projector", "llm:1"} <= set(report["attacks"]["probe"]["sites"])
    certificate = json.loads((out / "certificate.json").read_text())
    assert certificate["forgotten"]["images"] == 48 and certificate["verdict"] == report["certificate"]["verdict"]
    assert (out / "unlearned" / "certificate.json").read_bytes() == (out / "certificate.json").read_bytes()
    assert "## Certificate" in (out / "unlearned" / "README.md").read_text()
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 16
    assert 'src="http' not in page


@pytest.mark.slow
def test_a_demo_with_one_photo_a_person_finds_the_same_vanilla_model(tiny_demo, tmp_path: Path) -> None:
    seconds: dict[str, float] = {}
    data, folder = build_data(SIZES["tiny"], 0, tmp_path, "one")
    assert trained_model(SIZES["tiny"], data, 0, tiny_demo.cache, seconds, gold=False) == tiny_demo.vanilla
    assert seconds == {}  # nothing was trained
    forget, retain = read_forget_retain(str(folder), tiny_demo.forget_split, tiny_demo.retain_split)
    assert (len(forget), len(retain)) == (4, 8)


@pytest.mark.slow
def test_the_vanilla_model_tells_strangers_from_people(tiny_demo) -> None:
    people, strangers = (mllmu.read_split(tiny_demo.data, split) for split in ("Test_Set", "Stranger_Set"))
    figures = evaluate_cells(
        load_model(tiny_demo.vanilla),
        load_processor(tiny_demo.vanilla),
        {"people": people, "strangers": strangers},
        tasks=("generation",),
        kinds=("vqa",),
        batch_size=64,
        seed=0,
    )
    # Whoever knew nobody, or took strangers for people, would fail on one side.
    assert all(cell["vqa"]["rouge_l_recall"] > 0.75 for cell in figures.values()), figures


@pytest.mark.slow
@pytest.mark.proof
def test_a_second_demo_starts_at_unlearning(tiny_demo, tmp_path: Path) -> None:
    out, cache = shutil.copytree(tiny_demo.out, tmp_path / "out"), tiny_demo.cache
    first = json.loads((out / "report.json").read_text())
    assert main(["demo", "--size", "tiny", "--out", str(out), "--cache", str(cache)]) == 0
    second = json.loads((out / "report.json").read_text())
    assert "train_vanilla" in first["seconds"]
    assert "train_vanilla" not in second["seconds"]
    assert second["unlearned"] == first["unlearned"]  # the same seed, the same figures
    assert second["attacks"]["membership"] == first["attacks"]["membership"]


@pytest.mark.slow
def test_the_unlearned_model_is_an_ordinary_folder_that_eval_reads(tiny_demo, tmp_path: Path) -> None:
    out = tiny_demo.out
    report = json.loads((out / "report.json").read_text())
    arguments = ["--data", str(out / "data"), "--forget-split", "forget_25", "--retain-split", "retain_75"]
    command = ["eval", "--model", str(out / "unlearned"), *arguments, "--max-samples", "200", "--out", str(tmp_path)]
    assert main(command) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["cells"]["forget"]["vqa"]["accuracy"] == report["unlearned"]["forget"]["vqa"]["accuracy"]
