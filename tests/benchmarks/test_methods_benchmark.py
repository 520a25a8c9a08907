"""The comparison of methods: what a row holds for each kind of method, how it is chosen, kept and printed."""

import json
import sys
from pathlib import Path

import pytest
import studies
from random_world import brief_world
from study import methods
from world import World

from fastvkd.methods import METHODS


@pytest.fixture
def random_world(world, tmp_path: Path, monkeypatch) -> World:
    """A `World` whose vanilla and gold model is the shared random one, so that nothing has to be trained."""
    small = brief_world(world, tmp_path, monkeypatch)
    monkeypatch.setattr(methods, "STRENGTHS", (2.0, 4.0))
    grid = {
        **methods.GRID,
        "gd-lora": methods.GRID["gd-lora"][:1],
        "gd-sine": methods.GRID["gd-sine"][:1],
        "manu": ({"manu_fraction": 0.1, "manu_batches": 1},),
        "kvw": ({"kvw_gamma": 0.1, "kvw_batches": 1, "trainable": "all"},),
        "smfa": ({"smfa_k": 1.0, "max_steps": 1},),
        "steering": ({"layers": (1,), "questions": 8},),
    }
    monkeypatch.setattr(methods, "GRID", grid)
    return small


def test_a_row_of_every_kind_of_method(random_world: World) -> None:
    names = ("gold", "gd", "gd-lora", "kvw", "steering", "vkd")
    same = {"size": "tiny", "seed": 0}
    rows = [{**same, "variant": name, **methods.measure(random_world, name)} for name in names]
    by_method = {row["variant"]: row for row in rows}
    for row in rows:
        assert set(row["vqa"]) == {"forget", "test", "retain", "realworld", "stranger", "neighbour", "pair"}
        assert sum(row["who"]["forget"][verdict] for verdict in ("right", "abstains", "misnamed")) == pytest.approx(1)
        assert sum(sum(answers.values()) for answers in row["said"].values()) == row["who"]["forget"]["n"]
        assert set(row["relearning_auc"]) == {"visual", "all"}
        assert row["language_model_unchanged"] == (row["variant"] not in ("gd-lora", "kvw"))
    assert [p["step"] for p in by_method["gd"]["points"]] == [2, 4] * len(methods.GRID["gd"])
    assert by_method["gd"]["images_seen"] == 4 * by_method["gd"]["setting"]["step"]
    assert by_method["vkd"]["images_seen"] > 0
    assert json.loads(json.dumps(rows)) is not None
    lines = methods.STUDY.table({"rows": rows})
    assert len(lines) == 2 + len(rows)
    assert len({line.count("|") for line in lines}) == 1
    gap = by_method["vkd"]["relearning_auc"]["all"] - by_method["gold"]["relearning_auc"]["all"]
    assert f"{100 * gap:+.1f}" in next(line for line in lines if "VKD" in line)


def test_points_of_methods_that_are_not_followed_and_of_those_that_are(random_world: World) -> None:
    for name, images in (("smfa", [8]), ("manu", [4]), ("gd-sine", [8, 16])):
        points = [point for point, _ in methods.candidates(random_world, name)]
        assert [point["images"] for point in points] == images
        assert all(point["seconds"] > 0 for point in points)


def test_every_method_is_in_the_table_and_named() -> None:
    own = {"vanilla", "gold", "steering", "gd-lora", "gd-sine"}
    own |= {name for name in methods.GRID if name.startswith("vkd")}
    assert set(methods.GRID) - own == set(METHODS) - {"vkd", "finetune"}
    assert set(methods.NAMES) == set(methods.GRID) - {"vanilla", "gold"}
    assert set(methods.AT_ONCE) == {name for name, method in METHODS.items() if not method.trains}


def test_the_point_of_equal_forgetting_is_chosen() -> None:
    points = [{"forget": f, "retain": r} for f, r in ((0.9, 1.0), (0.3, 0.7), (0.2, 0.9), (0.0, 0.95))]
    assert methods.best(points)["retain"] == 0.9  # the best retained within 0.10 of chance, 0.25
    assert methods.best([points[0], points[3]])["forget"] == 0.0  # or the nearest


def test_finished_rows_are_kept_and_another_grid_is_another_row(tmp_path: Path, monkeypatch, capsys) -> None:
    row = {
        "key": methods.STUDY.key("tiny", 3, "ga", {}),
        "size": "tiny",
        "seed": 3,
        "variant": "ga",
        "setting": {"learning_rate": 1e-5, "step": 20},
        "vqa": dict.fromkeys(("forget", "test", "retain", "realworld", "neighbour"), 0.25),
        "by_person": {"3": {"vqa": {"accuracy": 0.5, "n": 4}}, "1": {"vqa": {"accuracy": 0.0, "n": 4}}},
        "stranger_band": {"low": 0.0, "high": 0.75},
        "who": {
            "forget": {"right": 0.0, "abstains": 0.9, "misnamed": 0.1, "n": 8},
            "stranger": {"right": 0.0, "abstains": 0.8, "misnamed": 0.2, "n": 8},
        },
        "description": {kind: {"accuracy": 0.9, "n": 8} for kind in ("forget", "stranger", "retain", "neighbour")},
        "telltale_auc": 0.7,
        "telltale": {"scores": {}, "null": {"median": 0.65, "high": 0.8}},
        "text_qa_worst": 1.0,
        "language_model_unchanged": True,
        "relearning_auc": {"visual": 0.5, "all": 0.6},
        "unlearning_seconds": 3.0,
        "images_seen": 320,
    }
    file = tmp_path / "methods.json"
    report = {**studies.measured_on("cpu"), "rows": [row], "failed": []}
    file.write_text(json.dumps(report))
    arguments = ["studies.py", "methods", "--size", "tiny", "--seeds", "3", "--only", "ga", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", [*arguments, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="0"):
        studies.main()  # would train a model if the row were not taken for finished
    assert json.loads(file.read_text()) == report
    cells = ("25", "25.0", "0 / 50", "0 to 75", "0 / 10 (20)", "90 / 90 / 90 / 90", "0.70 (0.65)")
    assert " | ".join(["GA (learning_rate 1e-05, step 20)", *cells]) in file.with_suffix(".md").read_text()
    monkeypatch.setattr(sys, "argv", [*arguments, "--markdown"])
    capsys.readouterr()
    studies.main()
    assert capsys.readouterr().out in file.with_suffix(".md").read_text()
    for changed in ({"learning_rate": 1e-2}, {"bf16": True}):
        assert methods.STUDY.key("tiny", 3, "ga", changed) != row["key"]  # settings of all runs
    monkeypatch.setattr(methods, "STEPS", 40)
    assert methods.STUDY.key("tiny", 3, "ga", {}) != row["key"]
