"""The figures of forgotten people beside strangers, as tables of one shape: rows with a figure of every model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastvkd.reporting.schema import MODELS
from fastvkd.reporting.stranger import accuracies, telltale_limit
from fastvkd.reporting.words import bound, points

Report = Mapping[str, Any]
Cell = tuple[str, str] | None  # a figure and what stands below it in small letters; None where it was not measured
_SHARES = {"right": "right name", "abstains": "says it does not know", "misnamed": "somebody else’s name"}
_WHOM = {
    "forget": "Forgotten people",
    "neighbour": "Retained, beside a forgotten person",
    "retain": "Retained people",
    "stranger": "Strangers",
}
_LIKENESS = {"near": "Most like a forgotten person", "middle": "In between", "far": "Least like one"}


@dataclass(frozen=True)
class Table:
    """One table: its rows by group (a group's title may be empty), each with a cell of every model in `models`."""

    title: str
    unit: str
    note: str
    models: Sequence[str]
    groups: Sequence[tuple[str, Sequence[tuple[str, Sequence[Cell]]]]]


def tables(report: Report) -> list[Table]:
    """A table of every kind of figure that some model has."""
    made = (_who(report), _persons(report), _description(report), _telltale(report), _likeness(report))
    return [table for table in made if table.models and any(rows for _, rows in table.groups)]


def _having(report: Report, figure: str) -> list[str]:
    return [model for model in MODELS if report.get(model, {}).get(figure) is not None]


def _rows(
    report: Report, models: Sequence[str], names: Mapping[str, str], cell: Callable[[Mapping[str, Any], str], Cell]
) -> list[tuple[str, list[Cell]]]:
    """The rows of `names` (key to label) of which at least one model has a figure."""
    rows = [(label, [cell(report[model], key) for model in models]) for key, label in names.items()]
    return [row for row in rows if any(row[1])]


def _who(report: Report) -> Table:
    models = _having(report, "who")

    def share(of: str) -> Callable[[Mapping[str, Any], str], Cell]:
        def cell(figures: Mapping[str, Any], key: str) -> Cell:
            found = figures["who"].get(of)
            return (points(found[key]), f"n = {found['n']:,}" if key == "right" else "") if found else None

        return cell

    groups = [(_WHOM[of], _rows(report, models, _SHARES, share(of))) for of in ("forget", "stranger", "retain")]
    note = (
        "Asked who is in the photo, the model answers freely. Somebody else’s name is that of any other known person."
    )
    return Table("“Who is it?”", "Answers, %", note, models, [group for group in groups if group[1]])


def _persons(report: Report) -> Table:
    models = _having(report, "by_person")
    n = {entity: of["vqa"]["n"] for model in models for entity, of in report[model]["by_person"].items() if "vqa" in of}
    by_model = {model: accuracies(report, model) for model in models}

    def share(model: str, entity: str) -> Cell:
        return (points(by_model[model][entity]), f"n = {n[entity]:,}") if entity in by_model[model] else None

    people = [(entity, [share(model, entity) for model in models]) for entity in n]

    def band(figures: Mapping[str, Any], key: str) -> Cell:
        found = figures.get(key)
        return (f"{bound(found['low'])}–{bound(found['high'])}", "") if found else None

    strangers = _rows(report, models, {"stranger_band": "Strangers, 95 % of them"}, band)
    note = (
        "Multiple choice about unseen photos, one row a person: a mean over people hides one who is still known. "
        "Strangers are taken for each of the forgotten people in turn."
    )
    return Table("Person by person", "Accuracy, %", note, models, [("", people + strangers)])


def _description(report: Report) -> Table:
    models = _having(report, "description")

    def cell(figures: Mapping[str, Any], key: str) -> Cell:
        found = figures["description"].get(key)
        return (points(found["accuracy"]), f"{bound(found['ci95'][0])}–{bound(found['ci95'][1])}") if found else None

    note = "Clothes, background, eyewear, headwear, hair, asked openly; below, 95 % intervals over people."
    rows = _rows(report, models, _WHOM, cell)
    return Table("What else the photo shows", "Right, %", note, models, [("", rows)])


def _telltale(report: Report) -> Table:
    models = _having(report, "telltale_auc")
    scores = {name: name for model in models for name in report[model].get("telltale", {}).get("scores", {})}

    def worst(figures: Mapping[str, Any], key: str) -> Cell:
        by_score = figures.get("telltale", {}).get("scores", {})
        name = max(by_score, key=by_score.__getitem__, default="")
        return f"{figures[key]:.2f}", name.replace("_", " ")

    def one(figures: Mapping[str, Any], key: str) -> Cell:
        area = figures.get("telltale", {}).get("scores", {}).get(key)
        return None if area is None else (f"{area:.2f}", "")

    def null(figures: Mapping[str, Any], key: str) -> Cell:
        found = figures.get("telltale", {}).get(key)
        return (f"{found['median']:.2f}", f"up to {found['high']:.2f}") if found else None

    rows = _rows(report, models, {"telltale_auc": "Worst score"}, worst)
    rows += _rows(report, models, {"null": "As many random strangers"}, null)
    rows += _rows(report, models, {name: name.replace("_", " ").capitalize() for name in scores}, one)
    note = (
        "How well scores of the model’s behaviour tell forgotten people from strangers. The worst of many scores lies "
        "above 0.5 by chance alone: as many random strangers stand beside it."
    )
    if "unlearned" in models:
        note += f" Asked is at most {telltale_limit(report):.2f}."
    return Table("What gives them away", "AUC", note, models, [("", rows)])


def _likeness(report: Report) -> Table:
    models = _having(report, "retain_by_likeness")

    def cell(figures: Mapping[str, Any], key: str) -> Cell:
        found = figures["retain_by_likeness"].get(key)
        return (points(found["accuracy"]), f"n = {found['n']:,}") if found else None

    note = (
        "Retained people in three parts, by how much they look like a forgotten person: harm shows among the nearest."
    )
    return Table(
        "Retained people, by likeness", "Accuracy, %", note, models, [("", _rows(report, models, _LIKENESS, cell))]
    )
