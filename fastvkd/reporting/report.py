"""report.json: what one run did and measured, in one dictionary; how it is built, written and read.

Nothing here measures, judges or draws: `fastvkd.evaluation` measures, `verdict` judges, `html` draws.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from fastvkd.bounds import is_finite_number
from fastvkd.environment import describe_hardware, library_versions
from fastvkd.errors import DataError
from fastvkd.files import parse_json, read_json, read_text, write_atomically
from fastvkd.reporting.schema import CELLS, KINDS, MODELS, SCHEMA_VERSION, SETS, validate
from fastvkd.settings import Certificate


def build_report(
    *,
    settings: Mapping[str, Any],
    chance: float,
    vanilla: Mapping[str, Any],
    unlearned: Mapping[str, Any],
    seconds: Mapping[str, float],
    peak_memory_bytes: int,
    parameters: Mapping[str, int],
    language_model_sha256: Mapping[str, str],
    relearning: Mapping[str, Any],
    relearning_auc: Mapping[str, Any] | None = None,
    relearning_variants: Sequence[Mapping[str, Any]] = (),
    attacks: Mapping[str, Any] | None = None,
    certificate: Mapping[str, Any] | None = None,
    gold: Mapping[str, Any] | None = None,
    comparison: Sequence[Mapping[str, Any]] = (),
    notes: Sequence[str] = (),
    versions: Mapping[str, str] | None = None,
    hardware: Mapping[str, Any] | None = None,
    cells: Iterable[tuple[str, str]] = CELLS,
) -> dict[str, Any]:
    """The content of report.json, checked.

    Args:
        settings: the run's settings; paths, tuples and nested mappings become plain JSON values.
        chance: accuracy of guessing, a fraction (0.25 for four options).
        vanilla, unlearned, gold: `{set: {kind: cell}}` as `evaluate_cells` returns it, for the model before unlearning,
            after it, and (optional) trained without the forget set. Cell: `accuracy` (fraction), `ci95` [low, high],
            `n` (questions), `rouge_l` and `cloze` (fractions, or None where no such question was asked). Beside the
            sets stand the figures about strangers (`schema.FIGURES`) that the data allow.
        seconds: wall-clock seconds of each phase, in order.
        peak_memory_bytes: the process's peak (device memory on a GPU, resident memory on a CPU).
        parameters: `trainable`, `frozen`, `total`.
        language_model_sha256: `before` and `after`, hex digests of the language model's weights.
        relearning: `{"visual"|"all": {"unlearned"|"gold": [{"step": int, "accuracy": fraction}, ...]}}`: accuracy on
            unseen photos of forgotten people while an attacker fine-tunes visual or all weights. `{}` if not attacked.
        relearning_auc: `{"visual"|"all": {"unlearned": area, "gold": area, "relearning_gap": unlearned - gold}}`, areas
            under those curves as mean accuracies.
        relearning_variants: `{"variant", "weights", "auc"}`, the same areas for every way in which an attacker prepared
            the model; the curves above are those of `plain`.
        attacks: "questions", "membership" and "probe" as `fastvkd.attacks.suite.Attack.run` returns them.
        certificate: content of certificate.json; of its settings, images and code only the counts of images are kept.
        comparison: further points of the trade-off plot, `{"name", "forget", "retain"}` (VQA accuracies).
        notes: sentences about this run's data and model that a reader must know, shown under "does not show".
        versions, hardware: found on this machine where not given.
        cells: the (set, kind) pairs that this run measured; all eight unless told.

    Raises:
        ValueError: a part is missing or ill-typed. That is the caller's mistake, not the user's.
    """
    report: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "settings": settings,
        "versions": library_versions() if versions is None else versions,
        "hardware": describe_hardware() if hardware is None else hardware,
        "chance": chance,
        "vanilla": vanilla,
        "unlearned": unlearned,
        "gold": gold,
        "seconds": seconds,
        "peak_memory_bytes": peak_memory_bytes,
        "parameters": parameters,
        "language_model_sha256": language_model_sha256,
        "relearning": relearning,
        "relearning_auc": relearning_auc,
        "relearning_variants": relearning_variants,
        "attacks": attacks,
        "certificate": None if certificate is None else certificate_summary(certificate),
        "comparison": comparison,
        "notes": notes,
    }
    given = {key: value for key, value in report.items() if value not in (None, (), [])}
    plain: dict[str, Any] = to_jsonable_python(given)
    problems = validate(plain, cells=cells)
    if problems:
        raise ValueError("report: " + "; ".join(problems))
    return plain


def certificate_summary(paper: Mapping[str, Any]) -> dict[str, Any]:
    """What the report shows of a certificate: verdict, checks, how much was to be forgotten, and, where these were
    noted, how the models were loaded and of which requests it speaks."""
    forgotten = {key: paper["forgotten"][key] for key in ("entities", "images")}
    noted = {key: paper[key] for key in ("loading", "requests") if paper.get(key)}
    return {"verdict": paper["verdict"], "forgotten": forgotten, "checks": paper["checks"], **noted}


def models_of(report: Mapping[str, Any]) -> list[str]:
    """The models that the report has figures of: vanilla (before), unlearned (after), gold."""
    return [model for model in MODELS if model in report]


def cells_of(report: Mapping[str, Any], figure: str = "accuracy") -> list[tuple[str, str]]:
    """The (set, kind) pairs of which the models before and after, where both are there, have `figure`."""
    models = [report[model] for model in ("vanilla", "unlearned") if model in report]
    return [
        (name, kind)
        for name in SETS
        for kind in KINDS
        if models and all(model.get(name, {}).get(kind, {}).get(figure) is not None for model in models)
    ]


def write_report(report: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write report.json atomically. Raises TrainingError as `write_atomically`, ValueError on NaN or infinity."""
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(path, (text + "\n").encode())


def read_report(path: str | os.PathLike[str], *, cells: Iterable[tuple[str, str]] = CELLS) -> dict[str, Any]:
    """Read and check report.json. Raises DataError, naming the first thing that is wrong with it."""
    report = read_json(Path(path), DataError, "give the report.json of a finished run")
    problems = validate(report, cells=cells)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise DataError(f"{path}: {problems[0]}{more}; make the report anew with this version of fastvkd")
    checked: dict[str, Any] = report
    return checked


def read_log(file: Path) -> list[dict[str, float]]:
    """The rows of metrics.jsonl, finite numbers by name, each with its step; [] where there is no file, and without
    what a kill left of a last line. What diverged, as a trial of a rate may, is infinite and has no place on a page.
    Raises DataError, naming the line, for anything else."""
    mend = "delete the file, and the page has no curves"
    if not file.is_file():
        return []
    rows = []
    *lines, last = read_text(file, DataError, mend).split("\n")
    for number, line in enumerate([*lines, last] if last.endswith("}") else lines, 1):
        row = parse_json(line, f"{file}:{number}", DataError, mend)
        if not isinstance(row, dict) or "step" not in row:
            raise DataError(f"{file}:{number}: no object with a step; {mend}")
        for key, value in row.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise DataError(f"{file}:{number}: {key} is no number; {mend}")
        rows.append({key: value for key, value in row.items() if is_finite_number(value)})
    return rows


def thresholds(report: Mapping[str, Any]) -> Certificate:
    """The bar that the run was held to: its `certificate` settings, null where a check was left out."""
    settings = report.get("settings", {})
    given = settings.get("certificate") or {}
    known = {key: given[key] for key in vars(Certificate()) if key in given}
    return Certificate.of({"certificate": known, "scrub": settings.get("scrub")})


def every_threshold(report: Mapping[str, Any]) -> Certificate:
    """As `thresholds`, with the default where the run left a check out: words and pictures need one."""
    given = asdict(thresholds(report))
    return Certificate(**{key: value for key, value in given.items() if value is not None})
