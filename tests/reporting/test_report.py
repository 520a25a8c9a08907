"""report.json: the builder gives the schema, the validator catches what breaks it, files are never partial."""

import copy
import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from example_run import cell, model_cells, report_parts, who, with_strangers
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvkd.attacks.certificate import figures_of
from fastvkd.environment import describe_hardware, library_versions
from fastvkd.errors import DataError, TrainingError
from fastvkd.evaluation.comparison import read_runs
from fastvkd.reporting import build_report, read_report, validate, write_report
from fastvkd.reporting.schema import CELLS, REQUIRED_KEYS
from fastvkd.reporting.stranger import not_measured, telltale_limit
from fastvkd.reporting.verdict import criteria, headline_sentence, judge, kept_shares, text_accuracy
from fastvkd.reporting.words import percent, percent_change
from fastvkd.settings import Certificate


@pytest.fixture
def report() -> dict[str, Any]:
    return build_report(**report_parts())


def put(report: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of `report` with the entry at the dotted `path` replaced, or removed where value is `...`."""
    changed = copy.deepcopy(report)
    *parents, last = path.split(".")
    inner: Any = changed
    for key in parents:
        inner = inner[int(key)] if isinstance(inner, list) else inner[key]
    if value is ...:
        del inner[last]
    else:
        inner[int(last) if isinstance(inner, list) else last] = value
    return changed


def test_built_report_is_valid_and_has_every_demanded_key(report: dict[str, Any]) -> None:
    assert validate(report) == []
    assert set(REQUIRED_KEYS) <= set(report)
    for model in ("vanilla", "unlearned", "gold"):
        for name, kind in CELLS:
            assert {"accuracy", "ci95", "n", "rouge_l", "cloze"} <= set(report[model][name][kind])


def test_optional_parts_are_left_out_not_written_as_null() -> None:
    optional = {"gold", "relearning_auc", "attacks", "certificate"}
    parts = report_parts() | dict.fromkeys(optional) | {"comparison": (), "notes": ()}
    report = build_report(**parts)
    assert not (optional | {"comparison", "notes"}) & set(report)
    assert validate(report) == []


def test_settings_become_plain_json() -> None:
    parts = report_parts()
    parts["settings"] = {"output_dir": Path("out/demo"), "sites": ("projector", "llm:3"), "nested": {"a": None}}
    report = build_report(**parts)
    assert report["settings"] == {"output_dir": "out/demo", "sites": ["projector", "llm:3"], "nested": {"a": None}}
    with pytest.raises(ValueError, match="object"):
        build_report(**(parts | {"settings": {"device": object()}}))


@pytest.mark.parametrize("key", REQUIRED_KEYS)
def test_each_missing_key_is_named(report: dict[str, Any], key: str) -> None:
    assert validate(put(report, key, ...)) == [f"{key}: missing"]


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("schema_version", 1, "schema_version"),
        ("schema_version", 4, "schema_version"),
        ("schema_version", True, "schema_version"),
        ("settings", [], "settings"),
        ("versions.torch", 2.13, "versions.torch"),
        ("chance", 25, "chance"),
        ("chance", "0.25", "chance"),
        ("vanilla", [], "vanilla"),
        ("vanilla.forget.vqa", ..., "vanilla.forget.vqa"),
        ("unlearned.realworld", ..., "unlearned.realworld.vqa"),
        ("unlearned.forgot", {}, "unlearned.forgot"),
        ("unlearned.test.qa.accuracy", 97.0, "unlearned.test.qa.accuracy"),
        ("unlearned.test.qa.accuracy", float("nan"), "unlearned.test.qa.accuracy"),
        ("unlearned.test.qa.accuracy", True, "unlearned.test.qa.accuracy"),
        ("unlearned.test.qa.accuracy", None, "unlearned.test.qa.accuracy"),
        ("unlearned.retain.vqa.ci95", [0.9], "unlearned.retain.vqa.ci95"),
        ("unlearned.retain.vqa.ci95", [0.9, 0.8], "unlearned.retain.vqa.ci95"),
        ("unlearned.retain.vqa.ci95.0", -0.1, "unlearned.retain.vqa.ci95[0]"),
        ("unlearned.retain.vqa.n", 0, "unlearned.retain.vqa.n"),
        ("unlearned.retain.vqa.n", 10.0, "unlearned.retain.vqa.n"),
        ("unlearned.retain.vqa.rouge_l", ..., "unlearned.retain.vqa.rouge_l"),
        ("unlearned.retain.vqa.cloze", "0.5", "unlearned.retain.vqa.cloze"),
        ("gold.forget.qa", ..., "gold.forget.qa"),
        ("seconds", {}, "seconds"),
        ("seconds.unlearn", -1, "seconds.unlearn"),
        ("peak_memory_bytes", 1.5e9, "peak_memory_bytes"),
        ("parameters.frozen", ..., "parameters.frozen"),
        ("parameters.total", 7, "parameters.total"),
        ("language_model_sha256.after", "abc", "language_model_sha256.after"),
        ("language_model_sha256", "abc", "language_model_sha256"),
        ("relearning.visual.unlearned", ..., "relearning.visual"),
        ("relearning.llm", {}, "relearning.llm"),
        ("relearning.all.gold", [], "relearning.all.gold"),
        ("relearning.all.gold.1.step", 0, "relearning.all.gold[1].step"),
        ("relearning.all.gold.1.accuracy", 60, "relearning.all.gold[1].accuracy"),
        ("comparison.0.retain", ..., "comparison[0].retain"),
        ("notes", "one sentence", "notes"),
        ("relearning_auc.all.gold", 1.2, "relearning_auc.all.gold"),
        ("relearning_auc.all.relearning_gap", "big", "relearning_auc.all.relearning_gap"),
        ("relearning_auc.all.unlearned", ..., "relearning_auc.all"),
        ("attacks.questions.2", "none", "attacks.questions[2]"),
        ("attacks.questions.2.figures.unlearned", ..., "attacks.questions[2].figures.unlearned"),
        ("attacks.questions.2.figures.gold.accuracy", 25, "attacks.questions[2].figures.gold.accuracy"),
        ("attacks.membership.gold.pairs.zlib.auc", None, "attacks.membership.gold.pairs.zlib.auc"),
        ("attacks.probe.models.gold.projector", [], "attacks.probe.models.gold.projector"),
        (
            "attacks.probe.models.gold.projector.forget.accuracy",
            2,
            "attacks.probe.models.gold.projector.forget.accuracy",
        ),
        ("attacks.prob", {}, "attacks.prob"),
        ("certificate.verdict", "fine", "certificate.verdict"),
        ("certificate.checks", ..., "certificate"),
    ],
)
def test_each_wrong_value_is_named(report: dict[str, Any], path: str, value: Any, named: str) -> None:
    problems = validate(put(report, path, value))
    assert problems
    assert problems[0].startswith(named + ":"), problems


def test_unknown_key_suggests_the_nearest(report: dict[str, Any]) -> None:
    assert validate(put(report, "comparision", [])) == ["comparision: unknown key, did you mean comparison?"]


def test_what_is_no_report_at_all_is_refused() -> None:
    for value in (None, [], "report", 3):
        assert validate(value) != []


@settings(deadline=None, max_examples=50)
@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(),
        lambda inner: (
            st.dictionaries(st.sampled_from(["a", *REQUIRED_KEYS, "forget", "vqa", "visual", "unlearned"]), inner)
            | st.lists(inner)
        ),
    )
)
def test_validator_reports_instead_of_raising(value: Any) -> None:
    problems = validate(value)
    assert problems and all(isinstance(problem, str) for problem in problems)


def test_data_without_some_sets_validate_when_told_so(report: dict[str, Any]) -> None:
    cells = [("forget", "vqa"), ("retain", "vqa")]
    for model in ("vanilla", "unlearned", "gold"):
        report[model] = {name: {"vqa": report[model][name]["vqa"]} for name in ("forget", "retain")}
    assert validate(report, cells=cells) == []
    assert "vanilla.test.vqa: missing" in validate(report)
    assert text_accuracy(report, "vanilla") is None
    assert [c.name for c in criteria(report)] == [
        "Forgotten people, known photos",
        "Retained people",
        "Language model",
    ]


def test_builder_refuses_a_broken_part() -> None:
    with pytest.raises(ValueError, match="peak_memory_bytes"):
        build_report(**(report_parts() | {"peak_memory_bytes": 0}))


def test_written_report_reads_back_the_same(report: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.json"
    write_report(report, path)
    assert read_report(path) == report
    assert os.listdir(path.parent) == ["report.json"]


def test_full_disk_leaves_the_old_report_and_no_rest(
    report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.json"
    write_report(report, path)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TrainingError, match="no space on disk") as caught:
        write_report(report | {"chance": 0.5}, path)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["report.json"]


def test_folder_that_is_a_file_is_a_one_line_error(report: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "out").write_text("not a folder")
    with pytest.raises(TrainingError, match="cannot be written"):
        write_report(report, tmp_path / "out" / "report.json")


def test_nan_is_never_written(report: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        write_report(report | {"chance": float("nan")}, tmp_path / "report.json")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema_version": 1}'])
def test_broken_file_is_a_one_line_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        read_report(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(DataError):
        read_report(tmp_path / "absent.json")


def test_machine_and_versions_are_found() -> None:
    hardware = describe_hardware()
    assert hardware["cpu"] and hardware["cpu_cores"] >= 1 and hardware["memory_bytes"] > 1 << 28
    assert {"python", "torch", "transformers"} <= set(library_versions())
    json.dumps(hardware)


# ------------------------------------------------------------------------------------------------- judgement


def judged(**changes: float) -> dict[str, Any]:
    """A report whose unlearned model is perfect but for `changes`."""
    values = {"forget": 0.25, "test": 0.25, "retain": 1.0, "realworld": 1.0, "text": 1.0} | changes
    parts = report_parts()
    parts["vanilla"] = model_cells(1.0, 1.0, 1.0, 1.0, 1.0, 0.9)
    parts["unlearned"] = model_cells(**values, free=0.2)
    return build_report(**parts)


def failed(report: dict[str, Any]) -> list[str]:
    return [criterion.name for criterion in criteria(report) if not criterion.met]


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, []),
        ({"forget": 0.35, "test": 0.15, "retain": 0.95, "realworld": 0.95, "text": 0.98}, []),
        ({"forget": 0.36}, ["Forgotten people, known photos"]),
        ({"forget": 0.14}, ["Forgotten people, known photos"]),
        ({"test": 0.36}, ["Forgotten people, unseen photos"]),
        ({"test": 0.05}, ["Forgotten people, unseen photos"]),
        ({"retain": 0.94}, ["Retained people"]),
        ({"realworld": 0.94}, ["Real world"]),
        ({"text": 0.97}, ["Text, worst set"]),
    ],
)
def test_each_requirement_has_the_stated_bar(changes: dict[str, float], names: list[str]) -> None:
    assert failed(judged(**changes)) == names


def held_to(report: dict[str, Any], **certificate: Any) -> dict[str, Any]:
    """The report of a run with these `certificate` settings."""
    return report | {"settings": report["settings"] | {"certificate": certificate}}


def test_requirements_are_those_of_the_runs_certificate() -> None:
    report = judged(forget=0.32, test=0.32, retain=0.9, realworld=0.9, text=0.96)
    assert failed(report) == ["Retained people", "Real world", "Text, worst set"]
    strict = held_to(report, chance_band=0.05)
    assert failed(strict)[:2] == ["Forgotten people, known photos", "Forgotten people, unseen photos"]
    assert criteria(strict)[0].asked == "20% to 30% (chance)" and "not yet at chance" in headline_sentence(strict)
    lenient = held_to(report, kept_visual=0.85, kept_text=0.9)
    assert failed(lenient) == [] and criteria(lenient)[2].asked == "at least 85.0%"
    assert "still knows the retained people" in headline_sentence(lenient)


def test_requirements_that_the_run_left_out_are_not_listed() -> None:
    report = judged(forget=0.9, retain=0.5, text=0.5)
    none = held_to(report, chance_band=None, kept_visual=None, kept_text=None, language_model_unchanged=False)
    assert criteria(none) == [] and headline_sentence(none) == headline_sentence(report)


def test_a_changed_language_model_fails() -> None:
    report = judged()
    report["language_model_sha256"]["after"] = "0" * 64
    assert failed(report) == ["Language model"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "is close to guessing about the forgotten people (100%"),
        ({"test": 0.6}, "in known photos (100%"),
        ({"test": 0.6}, "in unseen photos 60%"),
        ({"forget": 0.05}, "avoids the right answer"),
        ({"forget": 0.5}, "not yet at chance"),
        ({"forget": 0.9}, "still recognises the people it was to forget"),
        ({"retain": 0.6}, "knows fewer of the retained people"),
        ({"text": 0.6}, "lost some text knowledge"),
    ],
)
def test_headline_says_what_happened(changes: dict[str, float], words: str) -> None:
    assert words in headline_sentence(judged(**changes))


def test_headline_holds_the_key_figures(report: dict[str, Any]) -> None:
    sentence = headline_sentence(report).replace("\N{NO-BREAK SPACE}", " ")
    assert sentence == (
        "The model is close to guessing about the forgotten people (99% → 28% right, chance 25%), still knows the "
        "retained people (99% → 97%) and keeps its text knowledge (99.5% → 99.4%)."
    )


def said(**changes: Any) -> str:
    return headline_sentence(build_report(**with_strangers(**changes))).replace("\N{NO-BREAK SPACE}", " ")


def test_only_where_all_that_holds_of_a_stranger_was_found_the_headline_says_so() -> None:
    assert said().startswith(
        "The model treats every forgotten person as a stranger (99% → 28% right, chance 25%), still"
    )
    whole = build_report(**with_strangers())
    assert not_measured(whole) == "" and len(criteria(whole)) == 11 and failed(whole) == []
    for figure, words in {
        "by_person": "how often it is right about each person",
        "stranger_band": "how often it is right about each person",
        "who": "whether it still names them; whether it takes them for somebody else",
        "description": "whether it still sees what else their photos show",
        "telltale_auc": "whether its behaviour gives them away",
    }.items():
        part = put(whole, f"unlearned.{figure}", ...)
        assert validate(part) == [] and "as a stranger" not in headline_sentence(part)
        assert "is close to guessing about the forgotten people" in headline_sentence(part)
        assert (
            not_measured(part)
            == f"Not measured: {words}. So this does not say whether they are strangers to the model."
        )


@pytest.mark.parametrize(
    ("changes", "words", "missed"),
    [
        (
            {"people": [0.0, 0.0, 0.29, 0.71], "misnamed": 1.0, "description": 0.24, "auc": 0.86},
            "still recognises 047 (up to 71% right, strangers up to 43%)",
            [
                "Each forgotten person as a stranger",
                "Asked who it is: somebody else’s name",
                "What else their photos show",
                "Told from strangers, AUC",
            ],
        ),
        (
            {"people": [0.05, 0.2, 0.29, 0.1]},
            "avoids the right answer about 015, 047, which gives them away (down to 5% right, strangers 14% or more)",
            ["Each forgotten person as a stranger"],
        ),
        ({"people": [0.14, 0.29, 0.43, 0.43]}, "as a stranger", []),
        (
            {"people": [0.5, 0.6, 0.7, 0.8]},
            "still recognises 047, 031, 022 and 1 more (up to 80% right, strangers up to 43%)",
            ["Each forgotten person as a stranger"],
        ),
        (
            {"named": 0.04},
            "still names forgotten people (4% of the answers)",
            ["Asked who it is: the right name"],
        ),
        (
            {"misnamed": 0.31},
            "takes forgotten people for somebody else (31% of the answers, strangers 25%)",
            ["Asked who it is: somebody else’s name"],
        ),
        ({"misnamed": 0.3}, "as a stranger", []),
        (
            {"description": 0.88},
            "no longer sees what else the forgotten people’s photos show (93% → 88% described right)",
            ["What else their photos show"],
        ),
        (
            {"auc": 0.68},
            "lets forgotten people be told from strangers (AUC 0.68, asked at most 0.67)",
            ["Told from strangers, AUC"],
        ),
        ({"auc": 0.67}, "as a stranger", []),
    ],
)
def test_else_the_headline_names_the_worst_shortfall(changes: dict[str, Any], words: str, missed: list[str]) -> None:
    assert words in said(**changes)
    assert failed(build_report(**with_strangers(**changes))) == missed


def test_gold_widens_what_is_asked_and_random_strangers_do_not() -> None:
    report = build_report(**with_strangers(people=[0.24, 0.5, 0.33, 0.38]))
    assert "still recognises 022" in headline_sentence(report)
    widened = put(report, "gold.by_person.022.vqa.accuracy", 0.5)
    assert "as a stranger" in headline_sentence(widened)
    assert telltale_limit(report) == pytest.approx(0.67)  # gold's 0.62 and a twentieth; random strangers reach 0.72
    assert telltale_limit(put(report, "gold", ...)) == 0.60


def test_a_mean_above_chance_is_never_a_stranger() -> None:
    parts = with_strangers()
    parts["unlearned"] |= {"forget": {kind: cell(0.9, 100, 0.9, 0.9) for kind in ("vqa", "qa")}}
    assert "still recognises the people it was to forget" in headline_sentence(build_report(**parts))


def test_what_strangers_and_pairs_score_is_no_part_of_what_is_kept() -> None:
    parts = with_strangers()
    for model, accuracy in (("vanilla", 1.0), ("unlearned", 0.2)):
        parts[model] |= {name: {"vqa": cell(accuracy, 50)} for name in ("stranger", "pair")}
    report = build_report(**parts)
    assert failed(report) == [] and {"stranger", "pair"}.isdisjoint(kept_shares(report, "vqa"))


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("unlearned.by_person.015.vqa.accuracy", 29, "unlearned.by_person.015.vqa.accuracy"),
        ("unlearned.who.forget.misnamed", None, "unlearned.who.forget.misnamed"),
        ("unlearned.who.neighbour", who(0.0, 1.0, 0.0, 9), "unlearned.who.neighbour"),
        ("unlearned.description.forget.ci95", [0.9, 0.8], "unlearned.description.forget.ci95"),
        ("unlearned.stranger_band", {"low": 0.5, "high": 0.4}, "unlearned.stranger_band"),
        ("unlearned.telltale_auc", None, "unlearned.telltale_auc"),
        ("unlearned.telltale.scores", [0.5], "unlearned.telltale.scores"),
        ("unlearned.telltales", {}, "unlearned.telltales"),
        ("relearning_variants.0.weights", "llm", "relearning_variants[0].weights"),
        ("relearning_variants.0.auc.unlearned", ..., "relearning_variants[0].auc"),
    ],
)
def test_a_broken_figure_about_strangers_is_named(path: str, value: Any, named: str) -> None:
    (problem,) = validate(put(build_report(**with_strangers()), path, value))
    assert problem.startswith(f"{named}: ")


def test_a_misspelt_key_is_told_the_right_name(report: dict[str, Any]) -> None:
    curve = put(report, "relearning.visual.unlearned.0.stepp", 1)
    assert validate(curve) == ["relearning.visual.unlearned[0].stepp: unknown key, did you mean step?"]
    broken = put(build_report(**with_strangers()), "gold.telltale_au", 0.5)
    assert validate(broken) == ["gold.telltale_au: unknown key, did you mean telltale_auc?"]


def test_runs_are_compared_whatever_stands_beside_their_cells(report: dict[str, Any], tmp_path: Path) -> None:
    write_report(report, tmp_path / "old" / "report.json")
    write_report(build_report(**with_strangers()), tmp_path / "new" / "report.json")
    old, new = (read_runs([tmp_path / name]) for name in ("old", "new"))
    assert [row.name.split("/")[1] for row in new] == [row.name.split("/")[1] for row in old]
    for before, after in zip(old, new, strict=True):
        assert before.figures.items() < after.figures.items()
        assert "telltale_auc" in after.figures and "telltale_auc" not in before.figures


def test_a_report_of_the_schema_before_is_read(report: dict[str, Any], tmp_path: Path) -> None:
    old = report | {"schema_version": 2}
    write_report(old, tmp_path / "report.json")
    assert read_report(tmp_path / "report.json") == old


def test_headline_admits_that_there_was_nothing_to_forget() -> None:
    report = judged()
    report["vanilla"]["forget"]["vqa"] = cell(0.3, 100)
    assert "hardly knew" in headline_sentence(report)


def test_percent_never_claims_a_whole_that_is_not() -> None:
    assert [percent(x) for x in (0.0, 0.283, 0.996, 0.9999, 0.0004, 1.0)] == [
        "0%",
        "28%",
        "99.6%",
        "99.9%",
        "0.0%",
        "100%",
    ]
    assert percent_change(0.996, 0.97).replace("\N{NO-BREAK SPACE}", " ") == "99.6% → 97.0%"


def test_text_accuracy_weighs_by_questions() -> None:
    report = judged()
    for name, accuracy, n in (("forget", 0.0, 10), ("test", 0.0, 10), ("retain", 1.0, 70), ("realworld", 1.0, 10)):
        report["unlearned"][name]["qa"] = cell(accuracy, n)
    assert text_accuracy(report, "unlearned") == pytest.approx(0.8)


def test_the_report_counts_the_images_of_a_certificate_and_does_not_list_them(report: dict[str, Any]) -> None:
    assert report["certificate"]["forgotten"] == {"entities": 4, "images": 72}
    assert "ab" * 32 not in json.dumps(report)


@settings(deadline=None, max_examples=100)
@given(*(st.sampled_from((0.14, 0.15, 0.25, 0.35, 0.36, 0.94, 0.95, 0.979, 0.98, 1.0)) for _ in range(4)))
def test_the_page_and_a_certificate_judge_alike(forget: float, test: float, retain: float, text: float) -> None:
    report = judged(forget=forget, test=test, retain=retain, realworld=1.0, text=text)
    evaluated = {model: report[model] for model in ("vanilla", "unlearned")}
    digests = report["language_model_sha256"]
    figures = figures_of(evaluated, {}, chance=report["chance"], language_model=digests)
    checks = {check["key"]: check["met"] for check in judge(figures, Certificate())}
    met = {criterion.name: criterion.met for criterion in criteria(report)}
    assert met == {
        "Forgotten people, known photos": checks["forget"],
        "Forgotten people, unseen photos": checks["test"],
        "Retained people": checks["kept_visual"],
        "Real world": True,
        "Text, worst set": checks["kept_text"],
        "Language model": checks["language_model_unchanged"],
    }
