"""The page and the model card of made-up runs of every shape are those that were agreed on, to the letter.

`golden/full.html` and `golden/full.md` are the whole run, `golden/strangers.html` the one in which strangers were
measured, for a reader of a diff; `golden/sha256.json` has a digest for each of the others. After a change that is
meant, `python tests/reporting/test_golden.py` writes them anew.
"""

import copy
import hashlib
import json
import re
import sys
import tempfile
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from example_run import cell, examples, people, report_parts, training_log, with_strangers

from fastvkd.engines.manifests import write_manifest
from fastvkd.reporting import build_report, model_card
from fastvkd.reporting.html import render
from fastvkd.reporting.model_card import run_card, with_certificate
from fastvkd.settings import ForgetTarget

GOLDEN = Path(__file__).parent / "golden"
HOSTILE = """<script>alert("x")</script>'"><img src=x onerror=alert(1)>&amp;{{ 7 * 7 }}|`*_"""
INLINE = "span|b|small|code|img|i|text|line|circle|rect|path"

Run = tuple[Any, ...]  # the arguments of `render`


def normalised(page: str) -> str:
    """The page with white space that no browser shows made one, each element that is no part of a line on a line of its
    own, quotes spelled one way and without the photos' bytes, which depend on the library that packs them."""
    page = page.replace("&#x27;", "&#39;").replace("&quot;", "&#34;")
    page = re.sub(r'src="data:image/png;base64,[^"]*"', 'src="data:image/png;base64,..."', page)
    page = re.sub(r"[ \t\r\n]+", " ", page)
    return re.sub(rf" ?(<(?!/?(?:{INLINE})\b)[^>]*>) ?", r"\n\1\n", page).replace("\n\n", "\n").strip() + "\n"


def without(*keys: str) -> Callable[[dict[str, Any]], None]:
    def remove(report: dict[str, Any]) -> None:
        for key in keys:
            report.pop(key, None)

    return remove


def few_cells(report: dict[str, Any]) -> None:
    for model in ("vanilla", "unlearned", "gold"):
        report[model] = {name: {"vqa": report[model][name]["vqa"]} for name in ("forget", "retain")}


def gold_of_fewer_cells(report: dict[str, Any]) -> None:
    del report["gold"]["test"], report["gold"]["realworld"]["qa"]


def no_relearning(report: dict[str, Any]) -> None:
    report["relearning"] = {}
    del report["relearning_auc"]


def relearning_of_one_kind(report: dict[str, Any]) -> None:
    del report["relearning"]["all"], report["relearning"]["visual"]["gold"], report["relearning_auc"]


def attacks_on_one_model(report: dict[str, Any]) -> None:
    found = report["attacks"]
    for row in found["questions"]:
        row["figures"] = {"unlearned": row["figures"]["unlearned"]}
    for by_model in (found["membership"], found["probe"]["models"]):
        del by_model["vanilla"], by_model["gold"]


def failed(report: dict[str, Any]) -> None:
    report["language_model_sha256"]["after"] = "0" * 64
    for name in ("forget", "test", "retain"):
        report["unlearned"][name]["vqa"] = cell(0.6, 120, 0.5, 0.5)
        report["unlearned"][name]["qa"] = cell(0.5, 120, 0.5, None)


def hostile(report: dict[str, Any]) -> None:
    report["settings"] |= {"model_name_or_path": HOSTILE, "method": HOSTILE, "seed": HOSTILE, HOSTILE: HOSTILE}
    report["versions"] = {"fastvkd": HOSTILE, HOSTILE: HOSTILE}
    report["hardware"] |= {"cpu": HOSTILE, "gpu": HOSTILE}
    report["seconds"][HOSTILE] = 1.0
    report["comparison"][0]["name"] = HOSTILE
    report["notes"] = [HOSTILE]
    report["attacks"]["questions"][1]["variant"] = HOSTILE
    report["certificate"]["checks"][0] |= {"name": HOSTILE, "asked": "at most 1"}


def setting(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda report: report["settings"].update(values)


CHANGES: dict[str, Callable[[dict[str, Any]], None]] = {
    "full": without(),
    "without gold": without("gold"),
    "without attacks": without("attacks"),
    "without certificate": without("certificate"),
    "without any option": without(
        "gold", "comparison", "notes", "hardware", "relearning_auc", "attacks", "certificate"
    ),
    "few cells": few_cells,
    "gold of fewer cells": gold_of_fewer_cells,
    "no relearning": no_relearning,
    "relearning of one kind": relearning_of_one_kind,
    "attacks on one model": attacks_on_one_model,
    "failed": failed,
    "hostile": hostile,
    "hub model": setting(model_name_or_path="llava-hf/llava-1.5-7b-hf", trainable="lora"),
    "other bar": setting(certificate={"chance_band": 0.05, "kept_visual": 0.9, "kept_text": None}),
    "no bar": setting(
        certificate={"chance_band": None, "kept_visual": None, "kept_text": None, "language_model_unchanged": False}
    ),
    "gd": setting(method="gd"),
    "one core": lambda report: report["hardware"].update(cpu_cores=1, gpu="A GPU"),
    **{f"target {target}": setting(forget_target=target) for target in typing.get_args(ForgetTarget)},
}


def misnamed() -> dict[str, Any]:
    """A run that takes every forgotten person for one retained person, and sees nothing else in their photos."""
    return build_report(**with_strangers(people=[0, 0, 0.29, 0.71], misnamed=1.0, description=0.24, auc=0.86))


def short(report: dict[str, Any]) -> dict[str, Any]:
    """Without what `full` shows already."""
    return {key: value for key, value in report.items() if key not in ("attacks", "certificate", "comparison")}


def without_figures(report: dict[str, Any]) -> dict[str, Any]:
    """One figure of each kind is missing in some model."""
    part = copy.deepcopy(report)
    del part["vanilla"]["who"], part["gold"]["by_person"], part["unlearned"]["description"], part["vanilla"]["telltale"]
    del (
        part["unlearned"]["stranger_band"],
        part["gold"]["retain_by_likeness"]["near"],
        part["unlearned"]["who"]["stranger"],
    )
    return part


def runs() -> dict[str, Run]:
    found: dict[str, Run] = {}
    for name, change in CHANGES.items():
        report = copy.deepcopy(build_report(**report_parts()))
        change(report)
        found[name] = report, examples(), training_log(300)
    whole = found["full"][0]
    log: list[dict[str, Any]] = [{"step": 1, "loss": 1.0, f"loss_{HOSTILE}": 0.5}, {"step": 2, "loss": None}]
    shown = [one | {key: HOSTILE for key in ("name", "question", "before")} | {"after": ""} for one in examples()[:6]]
    strangers = build_report(**with_strangers())
    hostile_people = [row | {key: HOSTILE for key in ("entity", "name", "question")} for row in people(HOSTILE)]
    return found | {
        "strangers": (short(strangers), [], None, (), people()),
        "misnamed": (misnamed(), examples(), training_log(300), (), people("Priya Nair is a pilot from Kochi.")),
        "strangers without photos": (strangers, [], None, ("photos",), ()),
        "strangers in part": (without_figures(strangers), [], None, (), [people()[0] | {"said": {"gold": "Ann."}}]),
        "people without figures": (whole, [], None, (), hostile_people),
        "schema before": (whole | {"schema_version": 2}, examples(), training_log(300)),
        "no examples and no log": (whole, [], []),
        "one step": (whole, [], training_log(1)),
        "hostile examples and log": (whole, shown, log),
    }


def cards() -> dict[str, str]:
    found = {name: model_card(run[0]) for name, run in runs().items()}
    paper = report_parts()["certificate"]
    for name, changes in {
        "vkd": {},
        "finetune": {"method": "finetune", "finetune_split": "ft_Data-forget_5"},
        "gd": {"method": "gd"},
    }.items():
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = Path(folder) / "checkpoint-7"
            checkpoint.mkdir()
            settings = report_parts()["settings"] | {"forget_split": "forget_5", "trainable": "lora"} | changes
            base = {"path": folder, "fingerprint": "f" * 64}
            files = {"visual.safetensors": "0" * 64, "rank-0.pt": "0" * 64}
            manifest = {"settings": settings, "updates": 7, "base_model": base, "world_size": 1, "sha256": files}
            write_manifest(checkpoint, manifest | {"sampler": {}})
            if name != "gd":
                rows = [json.dumps({"step": step, "loss_a|b": 0.5 / step, "loss": 1.0}) + "\n" for step in (6, 7, 8)]
                (checkpoint.parent / "metrics.jsonl").write_text("".join(rows))
            card = run_card(Path(folder))
        found[f"run {name}"] = card
        found[f"run {name} certified"] = with_certificate(with_certificate(card, paper | {"verdict": "x"}), paper)
    return found


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def digests() -> dict[str, dict[str, str]]:
    pages = {name: digest(normalised(render(*run))) for name, run in runs().items()}
    return {"pages": pages, "cards": {name: digest(card) for name, card in cards().items()}}


def test_the_whole_page_reads_as_agreed() -> None:
    assert normalised(render(*runs()["full"])) == (GOLDEN / "full.html").read_text()


def test_the_page_with_strangers_reads_as_agreed() -> None:
    assert normalised(render(*runs()["strangers"])) == (GOLDEN / "strangers.html").read_text()


def test_the_whole_card_reads_as_agreed() -> None:
    assert cards()["full"] == (GOLDEN / "full.md").read_text()


@pytest.mark.parametrize("kind", ["pages", "cards"])
def test_every_shape_of_run_gives_the_page_and_card_agreed_on(kind: str) -> None:
    assert digests()[kind] == json.loads((GOLDEN / "sha256.json").read_text())[kind]


def test_the_golden_page_is_told_from_one_with_another_letter() -> None:
    page = normalised(render(*runs()["full"]))
    assert normalised(page.replace("Retained", "Retainet")) != page
    assert normalised("<p>a</p>\n <p>b  c</p>") == normalised("<p>a</p><p>b\nc</p>")
    assert normalised("<p>a<b>b</b></p>") != normalised("<p>a <b>b</b></p>")


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    (GOLDEN / "full.html").write_text(normalised(render(*runs()["full"])))
    (GOLDEN / "strangers.html").write_text(normalised(render(*runs()["strangers"])))
    (GOLDEN / "full.md").write_text(cards()["full"])
    (GOLDEN / "sha256.json").write_text(json.dumps(digests(), indent=1) + "\n")
