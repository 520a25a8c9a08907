"""`fastvkd report`: any folders in any order give one page; what none holds is named, what contradicts is refused."""

import itertools
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from example_run import attacks, cell, examples, face, model_cells, report_parts, training_log, with_strangers
from safetensors.torch import save_file
from test_golden import normalised

from fastvkd.cli import main
from fastvkd.engines.manifests import write_manifest
from fastvkd.errors import DataError
from fastvkd.models.folder import identify_base
from fastvkd.records import Photo, Profile
from fastvkd.reporting import build_report, write_report
from fastvkd.reporting.collect import collect, people, relearning_parts, write_page
from fastvkd.reporting.html import render
from fastvkd.reporting.schema import FIGURES

BEFORE, AFTER, GOLD = "b" * 64, "a" * 64, "c" * 64
RUN = report_parts()["settings"] | {"data": "some/data", "forget_split": "forget_5", "retain_split": "retain_95"}
RECORD = {"updates": 3, "settings": RUN, "base_model": {"path": "base", "fingerprint": BEFORE}}
CELLS = {
    BEFORE: model_cells(0.99, 0.97, 0.99, 0.96, 0.99, 0.96),
    AFTER: model_cells(0.28, 0.33, 0.97, 0.95, 0.98, 0.2),
    GOLD: model_cells(0.24, 0.26, 0.99, 0.96, 0.97, 0.19),
}


def write(folder: Path, name: str, content: Any) -> Path:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    rows = content if isinstance(content, list) else [content]
    (folder / name).write_text("\n".join(json.dumps(row) for row in rows))
    return folder


def training(folder: Path, **changes: Any) -> Path:
    (folder / "checkpoint-3").mkdir(parents=True, exist_ok=True)
    files = {"visual.safetensors": "0" * 64, "rank-0.pt": "0" * 64}
    write_manifest(folder / "checkpoint-3", {"world_size": 1, "sampler": {}, "sha256": files, **RECORD, **changes})
    rows = [row | {"peak_memory_bytes": 3 << 20} for row in training_log(3)]
    return write(folder, "metrics.jsonl", rows)


def sample(question: str, prediction: str = "A", place: str = "x/forget.jsonl:0") -> dict[str, Any]:
    options = {"A": "Ann", "B": "Ben", "C": "Cleo", "D": "Dan"}
    return {
        **{"cell": "forget", "kind": "vqa", "task": "choice", "entity": "e", "source": place, "question": question},
        **{"options": options, "answer": "A", "prediction": prediction},
    }


def evaluation(folder: Path, model: str, samples: list[dict[str, Any]] | None = None, /, **changes: Any) -> Path:
    write(folder, "samples.jsonl", samples if samples is not None else [sample("Who?")])
    content = {
        "benchmark": "jsonl",
        "mode": "corrected",
        "seed": 0,
        "max_samples": None,
        "model": "out/demo/vanilla" if model == BEFORE else "merged",
        "model_fingerprint": model,
        "made_by": RECORD if model == AFTER else None,
        "steering": None,
        "cells": CELLS[model],
        "summary": {},
        **{key: RUN[key] for key in ("data", "forget_split", "retain_split")},
    }
    return write(folder, "results.json", content | changes)


def attack(folder: Path, **changes: Any) -> Path:
    curves = report_parts()["relearning"]
    rows = [
        {
            **{"share": share, "weights": weights, "seed": seed, "curves": curves[weights], "judged_on": "unseen"},
            "auc": report_parts()["relearning_auc"][weights],
        }
        for share, seed, weights in itertools.product((0.2, 0.5), (0, 1), ("visual", "all"))
    ]
    paper = report_parts()["certificate"] | {
        **{"model_fingerprint": AFTER, "settings": RUN, "figures": {"chance": 0.25}},
        "code": {"versions": {"fastvkd": "0.1.0", "torch": "2.13.0"}},
    }
    content = {
        **attacks(),
        "relearning": rows,
        "models": {"vanilla": BEFORE, "unlearned": AFTER, "gold": GOLD},
        "evaluation": {"vanilla": CELLS[BEFORE], "unlearned": CELLS[AFTER], "gold": CELLS[GOLD]},
        "certificate": paper,
        "steering": None,
        **{key: RUN[key] for key in ("data", "forget_split", "retain_split")},
    }
    return write(folder, "attacks.json", content | changes)


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, Path]:
    return {
        "train": training(tmp_path / "train"),
        "before": evaluation(tmp_path / "before", BEFORE),
        "after": evaluation(tmp_path / "after", AFTER),
        "attack": attack(tmp_path / "attack"),
    }


def headings(page: Path) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", page.read_text())


def test_every_order_of_all_folders_gives_the_same_page(runs: dict[str, Path], tmp_path: Path) -> None:
    pages = set()
    for order in itertools.permutations(runs.values()):
        write_page(order, tmp_path / "report.html")
        pages.add((tmp_path / "report.html").read_text())
    assert len(pages) == 1
    (page,) = pages
    assert "is close to guessing about the forgotten people" in page and "Left out" in page and "photos." in page
    assert headings(tmp_path / "report.html") == [
        "Every figure",
        "What forgetting cost",
        "How it trained",
        "Can it be relearned?",
        "Asked in other ways",
        "Can one tell what it was trained on?",
        "Where did it go?",
        "Certificate: failed",
        "How it was made",
        "What this does not show",
    ]


SHOWN = {
    ("train",): ["How it trained", "How it was made"],
    ("before",): ["Every figure"],
    ("after",): ["Every figure", "How it was made"],
    ("before", "after"): ["Every figure", "What forgetting cost", "How it was made"],
    ("train", "before"): ["Every figure", "How it trained", "How it was made"],
    ("train", "after"): ["Every figure", "How it trained", "How it was made"],
    ("train", "before", "after"): ["Every figure", "What forgetting cost", "How it trained", "How it was made"],
}
NAMES = {
    "before": "an evaluation before unlearning",
    "after": "an evaluation after unlearning",
    "train": "a training run",
}


@pytest.mark.parametrize("names", SHOWN, ids="+".join)
def test_what_no_folder_holds_is_left_out_and_named(
    names: tuple[str, ...], runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report.html"
    assert main(["report", *(str(runs[name]) for name in names), "--out", str(out)]) == 0
    assert headings(out) == [*SHOWN[names], "What this does not show"]
    printed, page = capsys.readouterr().out, out.read_text()
    (line,) = [line for line in printed.splitlines() if line.startswith("Left out")]
    assert line + "." in page and ("nobody has evaluated yet" in page) == (names == ("train",))
    for name, words in NAMES.items():
        assert (words in line) == (name not in names)
    assert "a gold model" in line and "attacks, a certificate, photos" in line and "relearning" not in line
    assert len(printed.splitlines()) == len(names) + 3


def test_an_attack_alone_brings_its_own_evaluation(runs: dict[str, Path], tmp_path: Path) -> None:
    lines = write_page([runs["attack"]], tmp_path / "report.html")
    assert {"Every figure", "What forgetting cost", "Certificate: failed"} <= set(headings(tmp_path / "report.html"))
    assert "Left out, since none of the folders holds it: a training run, photos" in lines
    found = collect([runs["attack"], runs["after"]])
    assert (
        "The figures before unlearning, of a gold model are the attack's, multiple choice only."
        in found.report["notes"]
    )


def test_relearning_is_that_of_most_photos_and_the_mean_over_seeds(tmp_path: Path) -> None:
    def row(share: float, seed: int, accuracy: float) -> dict[str, Any]:
        curve = [{"step": 0, "accuracy": 0.25}, {"step": 5, "accuracy": accuracy}]
        return {
            **{"share": share, "seed": seed, "weights": "all", "judged_on": "held out"},
            **{"curves": {"unlearned": curve}, "auc": {"unlearned": accuracy}},
        }

    rows = [row(0.2, 0, 1.0), row(0.5, 0, 0.5), row(0.5, 1, 0.7)]
    report = collect([attack(tmp_path, relearning=rows)]).report
    assert report["relearning"] == {"all": {"unlearned": [{"step": 0, "accuracy": 0.25}, {"step": 5, "accuracy": 0.6}]}}
    assert report["relearning_auc"]["all"]["unlearned"] == pytest.approx(0.6)
    assert report["notes"][0].startswith("Relearning: an attacker with 50% of the forget photos, mean over seeds (2).")
    assert "photos that unlearning had used" in report["notes"][0]


def test_the_variants_of_relearning_have_their_areas_and_the_plain_attack_its_curves(tmp_path: Path) -> None:
    def row(variant: dict[str, str], seed: int, accuracy: float) -> dict[str, Any]:
        curves = {"unlearned": [{"step": 0, "accuracy": accuracy}], "gold": [{"step": 0, "accuracy": 0.3}]}
        return {
            **{"share": 0.2, "seed": seed, "weights": "all", "judged_on": "unseen", "curves": curves},
            **{"auc": {"unlearned": accuracy, "gold": 0.3, "relearning_gap": accuracy - 0.3}, **variant},
        }

    rows = [row({}, 0, 0.4), row({"variant": "opened"}, 0, 0.8), row({"variant": "opened"}, 1, 1.0)]
    parts = relearning_parts(rows)
    assert parts["relearning"]["all"]["unlearned"] == [{"step": 0, "accuracy": 0.4}]
    assert parts["relearning_auc"]["all"]["unlearned"] == 0.4
    shown = [(one["variant"], one["weights"], one["auc"]["unlearned"]) for one in parts["relearning_variants"]]
    assert shown == [("plain", "all", 0.4), ("opened", "all", pytest.approx(0.9))]
    assert "relearning_variants" not in relearning_parts(rows[:1])
    write_page([attack(tmp_path, relearning=rows)], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert re.search(r"Opened<small>all weights</small></th>\s*<td class=\"after\">90.0</td>\s*<td>30.0</td>", page)
    assert "+60.0</td>" in page and "the strongest is “opened” on all weights: area 90% (gold model: 30%)." in page


def test_of_several_rates_the_strongest_gives_the_curves_and_a_wrecked_model_is_marked(tmp_path: Path) -> None:
    def row(rate: float, accuracy: float, variant: str = "plain", share: float = 0.2) -> dict[str, Any]:
        models = {"vanilla": 0.9, "unlearned": accuracy, "gold": 0.3}
        return {
            **{"share": share, "seed": 0, "weights": "all", "judged_on": "unseen", "variant": variant},
            "learning_rate": rate,
            "curves": {name: [{"step": 0, "accuracy": value}] for name, value in models.items()},
            "auc": models | {"relearning_gap": accuracy - 0.3},
            "collapsed": {"vanilla": False, "unlearned": rate > 1e-4, "gold": False},
        }

    rows = [row(1e-5, 0.3), row(1e-4, 0.7), row(1e-3, 0.5), row(1e-4, 0.8, "all_photos", share=1.0)]
    report = collect([attack(tmp_path, relearning=rows)]).report
    assert report["relearning"]["all"]["unlearned"] == [{"step": 0, "accuracy": 0.7}]
    assert report["relearning"]["all"]["vanilla"] == [{"step": 0, "accuracy": 0.9}]
    assert report["relearning_auc"]["all"]["relearning_gap"] == pytest.approx(0.4)
    told = [(one["variant"], one["learning_rate"], "collapsed" in one) for one in report["relearning_variants"]]
    assert told == [("plain", 1e-5, False), ("plain", 1e-4, False), ("plain", 1e-3, True), ("all_photos", 1e-4, False)]
    note = report["notes"][0]
    assert "20% of the forget photos" in note and "Learning rates tried: 1e-05, 0.0001, 0.001" in note
    write_page([attack(tmp_path, relearning=rows)], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "As trained<small>all weights, learning rate 0.001, retained people lost too</small>" in page
    assert "All photos<small>all weights, learning rate 0.0001</small>" in page and "a small area is no" in page


def test_the_figures_about_strangers_come_from_the_evaluations(runs: dict[str, Path], tmp_path: Path) -> None:
    parts = with_strangers()
    beside = {model: {name: parts[model][name] for name in FIGURES} for model in ("vanilla", "unlearned", "gold")}
    evaluation(runs["before"], BEFORE, **beside["vanilla"])
    evaluation(runs["after"], AFTER, **beside["unlearned"])
    report = collect(list(runs.values())).report
    for model in ("vanilla", "unlearned"):
        assert {name: report[model][name] for name in FIGURES} == beside[model]
    wrong = evaluation(tmp_path / "wrong", AFTER, telltale_auc=2)
    with pytest.raises(DataError, match=r"wrong: unlearned\.telltale_auc: found 2"):
        collect([runs["before"], wrong])


def answer(cell: str, entity: str, output: str, question: str = "Who is this?", photo: str = "") -> dict[str, Any]:
    place = f"elsewhere/{cell}.jsonl:1 ({photo or entity}.png)"
    return {
        **{"cell": cell, "kind": "vqa", "task": "generation", "entity": entity, "source": place, "question": question},
        **{"answer": "unknown", "output": output},
    }


def test_what_was_said_of_each_person_and_one_stranger_is_taken_from_the_logs() -> None:
    def log(said: str) -> list[dict[str, Any]]:
        return [
            answer("forget", "1", "a known photo"),
            answer("stranger", "s1", f"{said} s1"),
            answer("stranger", "s2", "another stranger"),
            answer("test", "1", f"{said} 1"),
            answer("test", "1", "a later question", question="Where was this person born?"),
            answer("test", "2", f"{said} 2") | {"kind": "qa"},
            answer("test", "2", f"{said} 2"),
        ]

    photo = Photo(face(1), "data/test.jsonl:1 (1.png)")
    cells = {"test": [Profile("1", (photo,), name="Ann Lee", biography="Bo is a pilot.")]}
    first, second, stranger = people(cells, {"vanilla": log("before"), "unlearned": log("after"), "gold": []})
    assert (first["name"], first["entity"], first["image_png"]) == ("Ann Lee", "1", photo.data)
    assert first["said"] == {"vanilla": "before 1", "unlearned": "after 1"} and not first["stranger"]
    assert second == {
        **{"entity": "2", "stranger": False, "name": "2", "question": "Who is this?"},
        "said": {"vanilla": "before 2", "unlearned": "after 2"},
    }
    assert stranger["stranger"] and stranger["said"]["unlearned"] == "after s1"
    (known,) = people({}, {"unlearned": log("after")[:1]})
    assert known["said"] == {"unlearned": "a known photo"}  # data without unseen photos
    assert people({}, {}) == []


OTHER = "0" * 64
CONTRADICTIONS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "evaluation of another model": (lambda to: evaluation(to, BEFORE, model_fingerprint=OTHER), "none of the models"),
    "evaluation after another run": (
        lambda to: evaluation(to, AFTER, made_by=RECORD | {"settings": RUN | {"learning_rate": 1.0}}),
        "the run's settings: learning_rate is 1.0, but 0.002 in",
    ),
    "evaluation of another checkpoint": (
        lambda to: evaluation(to, AFTER, made_by=RECORD | {"updates": 2}),
        "number of updates is 2, but 3 in",
    ),
    "evaluation of another base": (
        lambda to: evaluation(to, AFTER, made_by=RECORD | {"base_model": {"fingerprint": OTHER}}),
        "the model before unlearning is 000000000000..., but bbbbbbbbbbbb... in",
    ),
    "attack on another base": (
        lambda to: attack(to, models={"vanilla": OTHER, "unlearned": AFTER}),
        "the model before unlearning",
    ),
    "attack on another split": (lambda to: attack(to, forget_split="forget_10"), "forget_split is forget_10, but"),
    "evaluation on other data": (lambda to: evaluation(to, AFTER, data="other/data"), "data is other/data, but"),
    "evaluation in another mode": (lambda to: evaluation(to, AFTER, mode="paper"), "mode is paper, but corrected in"),
    "evaluation with other questions": (lambda to: evaluation(to, AFTER, [sample("What?")]), "0 of 1 in common"),
    "a second training run": (training, "holds a training run, and so does"),
    "a second evaluation": (lambda to: evaluation(to, BEFORE), "holds an evaluation before unlearning, and so does"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_folders_that_contradict_are_refused_in_one_line(
    case: str, runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, words = CONTRADICTIONS[case]
    wrong, out = make(tmp_path / "wrong"), tmp_path / "report.html"
    for order in ([runs["train"], runs["before"], wrong], [wrong, runs["before"], runs["train"]]):
        assert main(["report", *map(str, order), "--out", str(out)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert (words if order[-1] == wrong else words.partition(" is ")[0]) in line
        assert str(tmp_path) in line and not out.exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("nothing.txt", {}, "holds no run"),
        ("results.json", [], "not as this version of fastvkd writes it"),
        ("results.json", {"model": "m", "cells": {}}, "no 'model_fingerprint'"),
        ("attacks.json", {"certificate": {}}, "no 'models'"),
        ("metrics.jsonl", "step 1", "not as this version of fastvkd writes it"),
    ],
)
def test_a_folder_that_is_no_run_is_refused_in_one_line(
    name: str, content: Any, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "run", name, content)
    assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "report.html")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line and str(tmp_path / "run") in line


def model_folder(folder: Path, weight: float, record: dict[str, Any] | None = None) -> Path:
    write(folder, "config.json", {})
    save_file({"weight": torch.full((4,), weight)}, folder / "model.safetensors")
    return write(folder, "unlearning.json", record) if record else folder


def of_an_earlier_version(file: Path) -> Path:
    """The folder of results.json or attacks.json without what earlier versions did not write."""
    content = json.loads(file.read_text())
    late = ["model_fingerprint", "made_by"]
    if file.name == "attacks.json":
        late = ["models", "steering", "data", "forget_split", "retain_split"]
    file.write_text(json.dumps({key: value for key, value in content.items() if key not in late}))
    return file.parent


@pytest.fixture
def told(tmp_path: Path) -> list[Path]:
    """An evaluation before, one after and an attack, which name models that lie in folders."""
    base = model_folder(tmp_path / "base", 1.0)
    before = identify_base(base).fingerprint
    record = RECORD | {"base_model": {"path": str(base), "fingerprint": before}}
    merged = model_folder(tmp_path / "merged", 2.0, record)
    after = identify_base(merged).fingerprint
    paper = json.loads((attack(tmp_path / "attack") / "attacks.json").read_text())["certificate"]
    return [
        evaluation(tmp_path / "before", BEFORE, **{"model": str(base), "model_fingerprint": before}),
        evaluation(tmp_path / "after", AFTER, **{"model": str(merged), "model_fingerprint": after, "made_by": record}),
        attack(tmp_path / "attack", models={"unlearned": after}, certificate=paper | {"model_fingerprint": after}),
    ]


def test_runs_of_an_earlier_version_give_the_same_report(told: list[Path]) -> None:
    now = collect(told)
    for folder in told:
        of_an_earlier_version(next(folder.glob("*s.json")))
    earlier = collect(told)
    assert (earlier.report, earlier.contents) == (now.report, now.contents)
    assert earlier.fact("the model before unlearning") == identify_base(told[0].parent / "base").fingerprint


def test_an_earlier_evaluation_is_not_taken_for_one_of_a_model_written_since(told: list[Path]) -> None:
    file = of_an_earlier_version(told[1] / "results.json") / "results.json"
    assert collect([told[1]]).contents == [f"{told[1]}: an evaluation after unlearning"]
    os.utime(file, (0, 0))
    with pytest.raises(DataError, match=r"after/results\.json: not as this version .*no 'model_fingerprint'"):
        collect([told[1]])


def test_an_earlier_attack_on_no_recorded_run_is_refused(told: list[Path]) -> None:
    content = json.loads((told[2] / "attacks.json").read_text())
    attack(told[2], certificate=content["certificate"] | {"settings": None})
    of_an_earlier_version(told[2] / "attacks.json")  # perhaps of a steered model, which was not said
    with pytest.raises(DataError, match=r"attack/attacks\.json: not as this version .*no 'models'"):
        collect([told[2]])


def test_a_wrong_figure_is_refused_with_its_folder(runs: dict[str, Path], tmp_path: Path) -> None:
    cells = {"forget": {"vqa": cell(0.5, 10) | {"accuracy": 50}}}
    wrong = evaluation(tmp_path / "wrong", AFTER, cells=cells)
    with pytest.raises(DataError, match=r"wrong: unlearned\.forget\.vqa\.accuracy: found 50"):
        collect([runs["train"], wrong])


def test_data_without_multiple_choice_show_what_they_have(tmp_path: Path) -> None:
    unasked = cell(0.5, 10, rouge_l=0.4321) | {"accuracy": None, "ci95": None, "n": 0}
    cells = {"forget": {"vqa": unasked, "qa": unasked}, "forget_faces": {"vqa": unasked}}
    write_page([evaluation(tmp_path, AFTER, [], cells=cells)], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert (
        page.count("43.2</td>") == 3
        and "Forgotten, named" in page
        and "asked no multiple-choice questions" in page
        and "Accuracy, %" not in page
    )


def test_a_steered_model_is_the_one_after_and_a_gold_one_is_known_by_its_split(tmp_path: Path) -> None:
    steered = evaluation(tmp_path / "steered", BEFORE, steering="s.safetensors")
    settings = RUN | {"method": "finetune", "finetune_split": "ft_Data-forget_5"}
    gold = evaluation(tmp_path / "gold", GOLD, made_by=RECORD | {"settings": settings})
    report = collect([gold, steered, evaluation(tmp_path / "before", BEFORE)]).report
    assert {"vanilla", "unlearned", "gold"} <= set(report) and report["gold"] == CELLS[GOLD]


def test_photos_are_shown_where_the_data_can_be_read(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for split, seed in (("forget", 1), ("retain", 2)):
        (data / f"{split}.png").write_bytes(face(seed))
        options = list(sample("")["options"].values())
        row = {"entity": split, "image": f"{split}.png", "question": "Who?", "answer": "Ann", "options": options}
        write(data, f"{split}.jsonl", row)
    place = "elsewhere/data/forget.jsonl:1 (forget.png)"
    folders = [
        evaluation(tmp_path / "before", BEFORE, [sample("Who?", "A", place)], data=str(data)),
        evaluation(tmp_path / "after", AFTER, [sample("Who?", "C", place)], data=str(data), made_by=None),
    ]
    with pytest.raises(DataError, match="none of the models"):
        write_page(folders, tmp_path / "report.html", str(data))
    evaluation(folders[1], BEFORE, [sample("Who?", "C", place)], data=str(data), steering="s.safetensors")
    lines = write_page(folders, tmp_path / "report.html", str(data))
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 1
    assert not [line for line in lines if line.startswith(("Left out", "Photos")) and "hotos" in line]
    assert re.search(r'Ann&nbsp;<span class="yes">.*?Cleo&nbsp;<span class="no">', page, flags=re.S)
    other = tmp_path / "other"
    write(other, "forget.jsonl", {})
    with pytest.raises(DataError, match="--data: data is"):
        write_page(folders, tmp_path / "report.html", str(other))


def test_a_demos_folder_gives_the_demos_page(tmp_path: Path) -> None:
    report = build_report(**report_parts())
    write_report(report, tmp_path / "report.json")
    write(tmp_path / "run", "metrics.jsonl", training_log(20))
    evaluation(tmp_path, AFTER)  # somebody's --out was the demo's folder
    write_page([tmp_path], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "holds it: photos." in page
    line = re.compile(r'<p class="kicker">Left out.*?</p>\n', flags=re.S)
    assert normalised(line.sub("", page)) == normalised(render(report, [], training_log(20)))
    assert examples()  # the demo's own page has photos: tests/demo


def test_the_page_of_real_runs(world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = world.settings(tmp_path / "run", max_steps=1)
    keys = ("model_name_or_path", "data", "forget_split", "retain_split", "output_dir", "max_steps", "device")
    assert main(["train", *(f"{key}={getattr(settings, key)}" for key in keys), "per_device_train_batch_size=4"]) == 0
    assert f"fastvkd report {tmp_path / 'run'} --out" in capsys.readouterr().out
    assert main(["export", "--run", str(tmp_path / "run"), "--to", str(tmp_path / "merged")]) == 0
    splits = ["--forget-split", world.forget_split, "--retain-split", world.retain_split]
    few = ["--data", str(world.data), "--device", "cpu", "--max-samples", "4", *splits]
    for name, model in (("before", world.model), ("after", tmp_path / "merged")):
        assert main(["eval", "--model", str(model), *few, "--out", str(tmp_path / name)]) == 0
    assert f"fastvkd report {tmp_path / 'after'} --out" in capsys.readouterr().out
    command = ["attack", "--model", str(tmp_path / "merged"), "--before", str(world.model), *few, "--kind", "reverse"]
    assert main([*command, "--out", str(tmp_path / "attack")]) in (0, 1)
    assert f"fastvkd report {tmp_path / 'attack'} --out" in capsys.readouterr().out
    folders = [str(tmp_path / name) for name in ("attack", "after", "run", "before")]
    assert main(["report", *folders, "--data", str(world.data), "--out", str(tmp_path / "report.html")]) == 0
    printed = capsys.readouterr().out
    assert "Left out, since none of the folders holds it: a gold model, a relearning attack\n" in printed
    page = (tmp_path / "report.html").read_text()
    assert "How it trained" in page and "Asked in other ways" in page and "data:image/png;base64," in page
