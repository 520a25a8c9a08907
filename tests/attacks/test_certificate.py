"""The certificate: a verdict flips where a figure crosses its threshold, and nobody is named in it."""

import dataclasses
import json
from pathlib import Path

import pytest

from fastvkd.attacks.certificate import (
    certificate,
    figures_of,
    relearned,
    source_sha256,
    write_certificate,
)
from fastvkd.errors import SettingsError
from fastvkd.reporting.verdict import judge, verdict_of
from fastvkd.settings import Certificate, load_settings

PASSING = {
    "chance": 0.25,
    "learnt": 0.90,
    "forget": 0.30,
    "test": 0.20,
    "kept_visual": 0.97,
    "kept_text": 1.0,
    "language_model_unchanged": 1.0,
    "paraphrase_excess": 0.05,
    "fewshot_excess": 0.0,
    "reverse_excess": 0.15,
    "images_excess": 0.1,
    "quantize_excess": -0.02,
    "membership": 0.55,
    "relearning_gap": 0.10,
    "probe_gap": 0.0,
    "named_right": 0.0,
    "misnamed_excess": 0.05,
    "description_kept": 0.95,
    "outside_band": 0.0,
    "telltale_auc": 0.60,
}


def verdict(**changed: float | None) -> str:
    return verdict_of(judge(PASSING | changed, Certificate()))


def test_what_meets_every_threshold_passes() -> None:
    assert verdict() == "passed"
    assert len(judge(PASSING, Certificate())) == 19


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("forget", 0.36),
        ("forget", 0.14),
        ("test", 0.36),
        ("kept_visual", 0.94),
        ("kept_text", 0.97),
        ("language_model_unchanged", 0.0),
        ("paraphrase_excess", 0.16),
        ("fewshot_excess", 0.16),
        ("reverse_excess", 0.16),
        ("images_excess", 0.16),
        ("quantize_excess", 0.16),
        ("membership", 0.66),
        ("relearning_gap", 0.11),
        ("probe_gap", 0.16),
        ("named_right", 0.01),
        ("misnamed_excess", 0.06),
        ("description_kept", 0.94),
        ("outside_band", 0.25),
        ("telltale_auc", 0.61),
    ],
)
def test_one_figure_beyond_its_threshold_fails_and_names_itself(key: str, value: float) -> None:
    assert verdict(**{key: value}) == "failed"
    missed = [check["key"] for check in judge(PASSING | {key: value}, Certificate()) if check["met"] is False]
    assert missed == [key]
    assert verdict(**{key: None}) == "incomplete"


def test_a_model_that_never_learnt_the_forget_set_shows_no_forgetting() -> None:
    assert (
        verdict(learnt=0.36) == "passed"
        and verdict(learnt=0.35) == "incomplete"
        and verdict(learnt=0.0) == "incomplete"
    )
    assert verdict(learnt=0.30, forget=0.36) == "failed"
    (check,) = [c for c in judge(PASSING | {"learnt": 0.30}, Certificate()) if c["key"] == "learnt"]
    assert (
        check["met"] is None
        and check["figure"] == 0.30
        and "0.10 above chance (0.25); what was never known" in check["asked"]
    )
    evaluated = {"vanilla": {"forget": {"vqa": {"accuracy": 0.30}}}, "unlearned": {}}
    assert figures_of(evaluated, {}, chance=0.25)["learnt"] == 0.30
    unknown = {key: value for key, value in PASSING.items() if key != "learnt"}
    assert "learnt" not in figures_of({"unlearned": {}}, {}, chance=0.25)
    assert "learnt" not in [c["key"] for c in judge(unknown, Certificate())]


def test_people_are_not_asked_about_where_the_data_know_no_stranger() -> None:
    keys = ("named_right", "misnamed_excess", "description_kept", "outside_band", "telltale_auc")
    without = {key: value for key, value in PASSING.items() if key not in keys}
    assert verdict_of(judge(without, Certificate())) == "passed" and len(judge(without, Certificate())) == 14


def test_what_gold_gives_away_is_allowed() -> None:
    assert verdict(telltale_auc=0.70, telltale_gold=0.65) == "passed"
    assert verdict(telltale_auc=0.71, telltale_gold=0.65) == "failed"
    assert verdict(telltale_auc=0.60, telltale_gold=0.40) == "passed"
    asked = {check["key"]: check["asked"] for check in judge(PASSING | {"telltale_gold": 0.65}, Certificate())}
    assert asked["telltale_auc"] == "at most 0.70"


def test_figures_of_people_beside_strangers() -> None:
    def seen(accuracy: float) -> dict[str, dict[str, float]]:
        return {"forget": {"accuracy": accuracy}}

    people = {
        "vanilla": {"description": seen(0.8)},
        "unlearned": {
            "by_person": {
                entity: {"vqa": {"accuracy": value}} for entity, value in [("a", 0), ("b", 0.1), ("c", 0.5), ("d", 0.6)]
            },
            "who": {"forget": {"right": 0.1, "misnamed": 0.3}, "stranger": {"right": 0.0, "misnamed": 0.2}},
            "description": seen(0.6),
            "stranger_band": {"low": 0.1, "high": 0.5},
            "telltale_auc": 0.7,
        },
        "gold": {"telltale_auc": 0.66},
    }
    found = figures_of({"unlearned": {}}, {}, people, chance=None)
    assert {key: found[key] for key in list(found)[-6:]} == {
        "named_right": 0.1,
        "misnamed_excess": pytest.approx(0.1),
        "description_kept": pytest.approx(0.75),
        "outside_band": 0.5,
        "telltale_auc": 0.7,
        "telltale_gold": 0.66,
    }
    people["gold"]["by_person"] = {"d": {"vqa": {"accuracy": 0.6}}}  # whom gold knows as well is no trace
    assert figures_of({"unlearned": {}}, {}, people, chance=None)["outside_band"] == 0.25
    assert not {"named_right", "telltale_auc"} & set(figures_of({"unlearned": {}}, {}, {"unlearned": {}}, chance=None))


def test_thresholds_come_from_the_settings_and_null_leaves_a_check_out() -> None:
    base = {"model_name_or_path": "m", "data": "d"}
    strict = load_settings(None, {**base, "certificate.relearning_gap": 0.05}).certificate
    assert verdict_of(judge(PASSING, strict)) == "failed"
    without = load_settings(None, {**base, "certificate.relearning_gap": None}).certificate
    assert "relearning_gap" not in {check["key"] for check in judge(PASSING, without)}
    with pytest.raises(SettingsError, match=r"certificate\.relearning_gap"):
        load_settings(None, {**base, "certificate.relearn_gap": 0.05})


def test_figures_are_the_worst_of_each_kind() -> None:
    def cell(accuracy: float) -> dict[str, float]:
        return {"accuracy": accuracy}

    def row(kind: str, accuracy: float) -> dict:
        return {"kind": kind, "variant": "x", "chance": 0.25, "figures": {"unlearned": cell(accuracy)}}

    evaluated = {
        "vanilla": {"forget": {"vqa": cell(1.0), "qa": cell(1.0)}, "retain": {"vqa": cell(0.8), "qa": cell(0.5)}},
        "unlearned": {"forget": {"vqa": cell(0.3), "qa": cell(0.9)}, "retain": {"vqa": cell(0.4), "qa": cell(0.5)}},
    }
    attacks = {
        "questions": [row("paraphrase", 0.3), row("paraphrase", 0.5), row("images", 0.2)],
        "membership": {"unlearned": {"pairs": {"loss": {"auc": 0.52}, "zlib": {"auc": 0.1}}}},
    }
    rows = [
        {
            **{"variant": "plain", "weights": "all", "share": 0.2, "learning_rate": rate, "seed": seed},
            **{"auc": {"relearning_gap": gap}, "collapsed": {"unlearned": rate > 1e-4, "gold": False}},
        }
        for rate, gaps in ((1e-5, (0.1, 0.3)), (1e-3, (-0.3, -0.2)))
        for seed, gap in enumerate(gaps)
    ]
    found = figures_of(
        evaluated,
        attacks,
        chance=0.25,
        relearning=relearned(rows),
        language_model={"before": "a", "after": "a"},
    )
    assert found == {
        "chance": 0.25,
        "learnt": 1.0,
        "forget": 0.3,
        "test": None,
        "kept_visual": 0.5,
        "kept_text": 0.9,
        "language_model_unchanged": 1.0,
        "paraphrase_excess": 0.25,
        "fewshot_excess": None,
        "reverse_excess": None,
        "images_excess": pytest.approx(-0.05),
        "quantize_excess": None,
        "membership": 0.9,
        "relearning_gap": pytest.approx(0.2),
        "relearning_evidence": 1.0,
        "probe_gap": None,
    }


def test_an_attack_that_wrecked_the_model_lets_nothing_pass() -> None:
    def rows(**evidence: bool) -> list[dict]:
        return [{"weights": weights, "gap": -0.2, "evidence": value} for weights, value in evidence.items()]

    def found(*rows_of: dict) -> dict:
        return figures_of({"unlearned": {}}, {}, chance=None, relearning=rows_of)

    assert found(*rows(visual=True, all=True))["relearning_evidence"] == 1
    assert found(*rows(visual=True, all=False))["relearning_evidence"] == 0  # all weights were never attacked
    assert found(*rows(visual=True, all=False), *rows(all=True))["relearning_evidence"] == 1  # another rate did it
    assert found()["relearning_evidence"] is None
    assert verdict(relearning_evidence=1.0) == "passed" and verdict(relearning_evidence=0.0) == "incomplete"
    check = next(
        one for one in judge(PASSING | {"relearning_evidence": 0.0}, Certificate()) if one["key"] == "relearning_gap"
    )
    assert check["figure"] is None and check["asked"].endswith("not carried out, as retained people were lost too")
    # What comes back although the model is wrecked has come back.
    assert verdict(relearning_evidence=0.0, relearning_gap=0.3) == "failed"


def test_a_perturbation_is_compared_with_what_it_teaches() -> None:
    def row(on: str, size: int, unlearned: float, gold: float | None = None) -> dict:
        models = {"unlearned": unlearned} | ({} if gold is None else {"gold": gold})
        figures = {name: {"accuracy": value} for name, value in models.items()}
        return {"on": on, "size": size, "chance": 0.25, "figures": figures}

    def excess(*rows: dict) -> float | None:
        return figures_of({"unlearned": {}}, {"perturbation": rows}, chance=None).get("perturbation_excess")

    assert excess(row("unseen", 0, 0.9, 0.1), row("unseen", 8, 0.5, 0.1), row("unseen", 16, 0.4)) == pytest.approx(0.25)
    assert excess(row("unseen", 8, 0.5, 0.45), row("strangers", 8, 0.3, 0.6)) == pytest.approx(0.05)
    assert excess(row("unseen", 8, 0.5, 0.3), row("strangers", 8, 0.4)) == pytest.approx(0.1)
    assert excess(row("unseen", 8, 0.5), row("strangers", 16, 0.9)) is None  # chance alone says nothing
    assert "perturbation_excess" not in figures_of({"unlearned": {}}, {}, chance=None)
    assert verdict(perturbation_excess=0.15) == "passed" and verdict(perturbation_excess=0.16) == "failed"
    assert verdict(perturbation_excess=None) == "incomplete"


def test_every_set_that_is_not_forgotten_is_to_be_kept() -> None:
    def cells(**accuracy: float) -> dict[str, dict[str, dict[str, float]]]:
        return {name: {"vqa": {"accuracy": value}} for name, value in accuracy.items()}

    before = cells(forget=1.0, test=1.0, forget_faces=1.0, retain=0.8, real_faces=0.8, real_world=1.0)
    after = cells(forget=0.2, test=0.2, forget_faces=0.1, retain=0.8, real_faces=0.6, real_world=1.0)
    assert figures_of({"vanilla": before, "unlearned": after}, {}, chance=0.25)["kept_visual"] == pytest.approx(0.75)


def test_images_are_named_by_hash_and_nobody_by_name(known, tmp_path: Path) -> None:
    paper = certificate(
        forget=known.forget,
        settings={"learning_rate": 1e-3},
        model_fingerprint="ab" * 32,
        figures=PASSING,
        relearning=[{"variant": "noise", "weights": "all", "learning_rate": 1e-4, "gap": 0.1, "evidence": True}],
        thresholds=Certificate(),
        versions={"fastvkd": "0.1.0"},
    )
    write_certificate(paper, tmp_path / "certificate.json")
    text = (tmp_path / "certificate.json").read_text()
    assert json.loads(text) == paper and paper["verdict"] == "passed"
    assert paper["relearning"][0]["variant"] == "noise" and paper["relearning"][0]["learning_rate"] == 1e-4
    hashes = sorted(photo.key for profile in known.forget for photo in profile.photos)
    assert paper["forgotten"] == {"entities": 4, "images": 4, "image_sha256": hashes}
    for profile in known.forget:
        assert profile.entity not in text and profile.visual.choice[1].answer_text not in text
    assert paper["thresholds"] == dataclasses.asdict(Certificate())
    assert len(source_sha256()) == 64 and paper["code"]["source_sha256"] == source_sha256()


@pytest.mark.parametrize("gap", [0.30, 0.05])
def test_a_failed_check_of_relearning_names_the_way_that_broke_it(gap: float) -> None:
    common = {"share": 0.2, "learning_rate": 1e-3, "evidence": True}
    ways = [
        {"variant": "plain", "weights": "visual", "gap": -0.2, **common},
        {"variant": "redrawn_projector", "weights": "all", "gap": gap, **common},
        {"variant": "noise", "weights": "all", "gap": None, **common},
    ]
    paper = certificate(
        forget=[],
        settings=None,
        model_fingerprint="",
        figures=PASSING | {"relearning_gap": gap},
        relearning=ways,
        thresholds=Certificate(),
        versions={},
    )
    check = next(check for check in paper["checks"] if check["key"] == "relearning_gap")
    named = "; broken by redrawn projector, all weights, rate 0.001"
    assert check["asked"] == "at most 0.10" + (named if gap > 0.1 else "")
    assert paper["verdict"] == ("failed" if gap > 0.1 else "passed")
