"""One table over several runs: results of `fastvkd eval` and reports of `fastvkd demo`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from fastvkd.bounds import is_finite_number
from fastvkd.errors import DataError, SettingsError, one_line
from fastvkd.files import read_json
from fastvkd.options import LMMS, TableFormat

FORMATS = get_args(TableFormat)
LMMS_PART = "lmms_eval"  # of results.json
_CELLS = (
    *("forget", "test", "retain", "realworld", "forget_faces", "retain_faces", "real_faces", "real_world"),
    *("stranger", "neighbour", "pair"),
)
# How the table calls a cell's figures, in its order; and those that only `json` holds, to keep it short.
_FIGURES = {
    "accuracy": "acc",
    "rouge_l": "R-L",
    "cloze": "cloze",
    "answer_prob": "p(answer)",
    "prob": "prob",
    "truth_ratio": "TR",
    "description": "seen",
}
_JSON_ONLY = {"rouge_1": "R-1", "rouge_2": "R-2", "rouge_l_recall": "R-L recall", "bleu": "BLEU"}
_KINDS = {"vqa": "VQA", "qa": "QA"}
_INTERVALS = {"accuracy": "ci95"}
# The figures person by person: of every part, what a group holds and how the table calls it.
_PEOPLE = {
    "by_person": {"accuracy": "acc"},
    "who": {"right": "right", "abstains": "abstains", "misnamed": "misnamed"},
    "description": {"accuracy": "acc"},
    "retain_by_likeness": {"accuracy": "acc"},
}


@dataclass(frozen=True)
class Row:
    """One model: its name, what was measured how, and `figures` by title with `intervals` where there are any."""

    name: str
    measured: str
    figures: dict[str, float]
    intervals: dict[str, list[float]]


def read_runs(paths: Sequence[str | Path]) -> list[Row]:
    """Rows of every run: a folder with `results.json` (one row) or `report.json` (one row per model of the demo), or
    such a file. Raises `DataError` naming the run that is neither."""
    rows: list[Row] = []
    for path in map(Path, paths):
        files = [path] if path.is_file() else [path / "results.json", path / "report.json"]
        file = next((one for one in files if one.is_file()), None)
        if file is None:
            raise DataError(
                f"{path}: holds neither results.json (of fastvkd eval) nor report.json (of fastvkd demo); give the "
                "--out folder of a finished run"
            )
        content = read_json(file, DataError, "run it again")
        name = path.name if path.is_dir() else path.parent.name
        try:
            rows += _rows_of(content, name)
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise DataError(f"{file}: not as fastvkd writes it ({one_line(error, 80)}); run it again") from error
    return rows


def _rows_of(content: Any, name: str) -> list[Row]:
    """Raises ValueError and others of its kind where a result is damaged, or is none."""
    if "cells" in content or LMMS_PART in content:
        own = [f"{content.get('benchmark')} {content.get('mode')}"] if "cells" in content else []
        row = _row(name, "", content.get("cells", {}), content.get("summary") or {}, content)
        return [replace(row, measured=", ".join(own + _add_lmms(row, content.get(LMMS_PART))))]
    if "unlearned" not in content:
        raise ValueError("neither a result of fastvkd eval nor a report of fastvkd demo")
    models = [model for model in ("vanilla", "unlearned", "gold") if model in content]
    return [_row(f"{name}/{model}", "demo corrected", *_split(content[model])) for model in models]


def _add_lmms(row: Row, part: Mapping[str, Any] | None) -> list[str]:
    """Add what lmms-eval measured, with the interval that its standard error gives, and say what measured it."""
    if part is None:
        return []
    for one in part["figures"]:
        read = "" if one["filter"] == "none" else f" {one['filter']}"
        title = f"{LMMS}{one['task']} {one['metric']}{read}"
        row.figures[title] = value = _number(one["value"])
        if one["stderr"] is not None:
            row.intervals[title] = [value - 1.96 * _number(one["stderr"]), value + 1.96 * _number(one["stderr"])]
    first = "" if part["max_samples"] is None else f" (first {part['max_samples']})"
    return [f"lmms-eval {part['version']}{first}"]


def _split(model: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], Mapping[str, Any]]:
    """Of a model in a report: its cells, no summary, and what stands beside the cells."""
    return {name: of for name, of in model.items() if name in _CELLS}, {}, model


def _row(
    name: str, measured: str, cells: Mapping[str, Any], summary: Mapping[str, Any], people: Mapping[str, Any]
) -> Row:
    figures: dict[str, float] = {}
    intervals: dict[str, list[float]] = {}

    def add(title: str, values: Mapping[str, Any], figure: str) -> None:
        if values.get(figure) is not None:
            figures[title] = _number(values[figure])
            interval = values.get(_INTERVALS.get(figure, f"{figure}_ci95"))
            if interval is not None:
                low, high = interval
                intervals[title] = [_number(low), _number(high)]

    for cell in (*(one for one in _CELLS if one in cells), *(one for one in cells if one not in _CELLS)):
        for kind, title in _KINDS.items():
            for figure, short in (_FIGURES | _JSON_ONLY).items():
                add(f"{cell} {title} {short}", cells[cell].get(kind, {}), figure)
    for part, titles in _PEOPLE.items():
        for group, values in people.get(part, {}).items():
            for figure, short in titles.items():
                add(f"{part} {group} {short}", values.get("vqa", values), figure)
    for end in ("low", "high"):
        add(f"stranger_band {end}", people.get("stranger_band", {}), end)
    add("telltale_auc", people, "telltale_auc")
    for key, value in summary.items():
        if isinstance(value, dict):  # joint figures of a cell
            for figure in value:
                if not figure.endswith("_ci95") and figure != "n_pairs":
                    add(f"{key} {figure}", value, figure)
        elif key != "utility_missing":
            add(key, summary, key)
    return Row(name, measured, figures, intervals)


def _number(value: Any) -> float:
    if not is_finite_number(value):
        raise ValueError(f"{value!r} is no number")
    return float(value)


def comparison_table(rows: Sequence[Row], format: str) -> str:
    """Figures down and runs across, as `text` or `latex` (a `tabular` of booktabs) with three decimals and the 95 %
    interval where there is one; or as `json` with all digits, and also ROUGE-1, ROUGE-2, recall of ROUGE-L and BLEU.
    Fractions are given as such, not in per cent; what lmms-eval measured is as lmms-eval gives it.

    Raises `SettingsError` for another format.
    """
    if format not in FORMATS:
        raise SettingsError(f"format={format!r}: allowed are {', '.join(FORMATS)}")
    if format == "json":
        return json.dumps([vars(row) for row in rows], indent=1)
    hidden = tuple(f" {kind} {short}" for kind in _KINDS.values() for short in _JSON_ONLY.values())
    titles = dict.fromkeys(title for row in rows for title in row.figures if not title.endswith(hidden))
    lines = [["", *(row.name for row in rows)], ["measured", *(row.measured for row in rows)]]
    lines += [[title, *(_entry(row, title) for row in rows)] for title in titles]
    if format == "latex":
        head, *body = [" & ".join(map(_latex, line)) + r" \\" for line in lines]
        start = rf"\begin{{tabular}}{{l{'r' * len(rows)}}}"
        return "\n".join([start, r"\toprule", head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}"])
    widths = [max(len(line[column]) for line in lines) for column in range(len(rows) + 1)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )


def _entry(row: Row, title: str) -> str:
    if title not in row.figures:
        return "-"
    value = f"{row.figures[title]:.3f}"
    if title not in row.intervals:
        return value
    low, high = row.intervals[title]
    return f"{value} [{low:.3f}, {high:.3f}]"


def _latex(text: str) -> str:
    return "".join({"\\": r"\textbackslash{}"}.get(c, "\\" + c if c in "&%$#_{}" else c) for c in text)
