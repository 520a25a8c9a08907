"""report.json: what one run did and measured, in one dictionary; how it is built, checked, written and judged.

Nothing here measures or draws anything: `fastvkd.evaluation` measures, `fastvkd.reporting.html` draws.
"""

import difflib
import json
import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from fastvkd.errors import DataError, TrainingError, disk_is_full
from fastvkd.settings import Certificate

SCHEMA_VERSION = 2
SETS = ("forget", "test", "retain", "realworld")
KINDS = ("vqa", "qa")
CELLS = tuple((name, kind) for name in SETS for kind in KINDS)
MODELS = ("vanilla", "unlearned", "gold")
ATTACKS = ("visual", "all")

REQUIRED_KEYS = (
    "schema_version",
    "settings",
    "versions",
    "chance",
    "vanilla",
    "unlearned",
    "seconds",
    "peak_memory_bytes",
    "parameters",
    "language_model_sha256",
    "relearning",
)
OPTIONAL_KEYS = ("gold", "comparison", "hardware", "notes", "relearning_auc", "attacks", "certificate")


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
            `n` (questions), `rouge_l` and `cloze` (fractions, or None where no such question was asked).
        seconds: wall-clock seconds of each phase, in order.
        peak_memory_bytes: the process's peak (device memory on a GPU, resident memory on a CPU).
        parameters: `trainable`, `frozen`, `total`.
        language_model_sha256: `before` and `after`, hex digests of the language model's weights.
        relearning: `{"visual"|"all": {"unlearned"|"gold": [{"step": int, "accuracy": fraction}, ...]}}`: accuracy on
            unseen photos of forgotten people while an attacker fine-tunes visual or all weights. `{}` if not attacked.
        relearning_auc: `{"visual"|"all": {"unlearned": area, "gold": area, "relearning_gap": unlearned - gold}}`, areas
            under those curves as mean accuracies.
        attacks: "questions", "membership" and "probe" as `fastvkd.attacks.run.attack` returns them.
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
        "attacks": attacks,
        "certificate": None if certificate is None else _certificate_summary(certificate),
        "comparison": comparison,
        "notes": notes,
    }
    plain: dict[str, Any] = _plain({key: value for key, value in report.items() if value not in (None, (), [])})
    problems = validate(plain, cells=cells)
    if problems:
        raise ValueError("report: " + "; ".join(problems))
    return plain


def _certificate_summary(paper: Mapping[str, Any]) -> dict[str, Any]:
    """What the report shows of a certificate: verdict, checks, and how much was to be forgotten."""
    forgotten = {key: paper["forgotten"][key] for key in ("entities", "images")}
    return {"verdict": paper["verdict"], "forgotten": forgotten, "checks": paper["checks"]}


def _plain(value: Any) -> Any:
    """JSON's own types only, so that what is checked is what is written."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in (sorted(value) if isinstance(value, set | frozenset) else value)]
    raise ValueError(f"report: {value!r} ({type(value).__name__}) cannot be written as JSON")


def library_versions() -> dict[str, str]:
    """Versions of Python and of the installed libraries that decide the numbers."""
    found = {"python": platform.python_version()}
    for name in ("fastvkd", "torch", "transformers", "triton", "deepspeed", "bitsandbytes"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def describe_hardware() -> dict[str, Any]:
    """`cpu` (name), `cpu_cores` (that this process may use), `memory_bytes`, `gpu` (name or None)."""
    import psutil  # heavy imports stay out of `import fastvkd.reporting`
    import torch

    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "cpu": cpu,
        "cpu_cores": cores,
        "memory_bytes": int(psutil.virtual_memory().total),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


# ---------------------------------------------------------------------------------------------------- validation


def validate(report: Any, *, cells: Iterable[tuple[str, str]] = CELLS) -> list[str]:
    """Every way in which `report` breaks the schema, as 'key: what was found, what is allowed'; empty if none.

    Args:
        report: the parsed content of report.json.
        cells: the (set, kind) pairs that every model must have; all eight unless the data lack some.
    """
    if not isinstance(report, dict):
        return [f"report: found {_shown(report)}, expected an object"]
    problems = [f"{key}: missing" for key in REQUIRED_KEYS if key not in report]
    known = REQUIRED_KEYS + OPTIONAL_KEYS
    for key in report:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            problems.append(f"{key}: unknown key" + (f", did you mean {near[0]}?" if near else ""))

    checks = {
        "schema_version": _check_schema_version,
        "settings": _check_mapping,
        "versions": _check_versions,
        "hardware": _check_mapping,
        "chance": _check_fraction,
        "seconds": _check_seconds,
        "peak_memory_bytes": _check_count,
        "parameters": _check_parameters,
        "language_model_sha256": _check_digests,
        "relearning": _check_relearning,
        "relearning_auc": _check_areas,
        "attacks": _check_attacks,
        "certificate": _check_certificate,
        "comparison": _check_comparison,
        "notes": _check_notes,
    }
    for key, check in checks.items():
        if key in report:
            problems += check(key, report[key])
    wanted = tuple(cells)
    for model in MODELS:
        if model in report:
            problems += _check_model(model, report[model], wanted)
    return problems


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_schema_version(key: str, value: Any) -> list[str]:
    is_ours = isinstance(value, int) and not isinstance(value, bool) and value == SCHEMA_VERSION
    return [] if is_ours else [f"{key}: found {_shown(value)}, expected {SCHEMA_VERSION}"]


def _check_mapping(key: str, value: Any) -> list[str]:
    return [] if isinstance(value, dict) else [f"{key}: found {_shown(value)}, expected an object"]


def _check_versions(key: str, value: Any) -> list[str]:
    if not isinstance(value, dict):
        return _check_mapping(key, value)
    return [f"{key}.{k}: found {_shown(v)}, expected text" for k, v in value.items() if not isinstance(v, str)]


def _check_fraction(key: str, value: Any) -> list[str]:
    if _is_number(value) and 0 <= value <= 1:
        return []
    return [f"{key}: found {_shown(value)}, expected a fraction from 0 to 1"]


def _check_count(key: str, value: Any) -> list[str]:
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return []
    return [f"{key}: found {_shown(value)}, expected a whole number above 0"]


def _check_seconds(key: str, value: Any) -> list[str]:
    if not isinstance(value, dict) or not value:
        return [f"{key}: found {_shown(value)}, expected an object of phase: seconds"]
    return [
        f"{key}.{phase}: found {_shown(took)}, expected seconds, 0 or more"
        for phase, took in value.items()
        if not (_is_number(took) and took >= 0)
    ]


def _check_parameters(key: str, value: Any) -> list[str]:
    if not isinstance(value, dict):
        return _check_mapping(key, value)
    problems = []
    for part in ("trainable", "frozen", "total"):
        count = value.get(part)
        if not (isinstance(count, int) and not isinstance(count, bool) and count >= 0):
            problems.append(f"{key}.{part}: found {_shown(count)}, expected a whole number")
    if not problems and value["trainable"] + value["frozen"] != value["total"]:
        problems.append(f"{key}.total: found {value['total']}, expected trainable + frozen")
    return problems


def _check_digests(key: str, value: Any) -> list[str]:
    if not isinstance(value, dict):
        return _check_mapping(key, value)
    problems = []
    for part in ("before", "after"):
        digest = value.get(part)
        if not (isinstance(digest, str) and len(digest) == 64 and set(digest) <= set("0123456789abcdef")):
            problems.append(f"{key}.{part}: found {_shown(digest)}, expected 64 lower-case hex digits")
    return problems


def _check_relearning(key: str, value: Any) -> list[str]:
    if not isinstance(value, dict):
        return _check_mapping(key, value)
    problems = []
    for attack, curves in value.items():
        where = f"{key}.{attack}"
        if attack not in ATTACKS:
            problems.append(f"{where}: unknown attack, expected one of {', '.join(ATTACKS)}")
        elif not isinstance(curves, dict) or "unlearned" not in curves:
            problems.append(f"{where}: found {_shown(curves)}, expected an object with the curve 'unlearned'")
        else:
            for model, curve in curves.items():
                if model not in ("unlearned", "gold"):
                    problems.append(f"{where}.{model}: unknown model, expected unlearned or gold")
                problems += _check_curve(f"{where}.{model}", curve)
    return problems


def _check_curve(key: str, curve: Any) -> list[str]:
    if not isinstance(curve, list) or not curve:
        return [f"{key}: found {_shown(curve)}, expected a list of {{step, accuracy}}"]
    problems = []
    last = -1
    for i, point in enumerate(curve):
        where = f"{key}[{i}]"
        if not isinstance(point, dict):
            problems.append(f"{where}: found {_shown(point)}, expected {{step, accuracy}}")
            continue
        step = point.get("step")
        if not isinstance(step, int) or isinstance(step, bool) or step <= last:
            problems.append(f"{where}.step: found {_shown(step)}, expected a whole number above {last}")
        else:
            last = step
        problems += _check_fraction(f"{where}.accuracy", point.get("accuracy"))
    return problems


def _check_areas(key: str, value: Any) -> list[str]:
    if not isinstance(value, dict):
        return _check_mapping(key, value)
    problems = []
    for attack, areas in value.items():
        if attack not in ATTACKS or not isinstance(areas, dict) or "unlearned" not in areas:
            problems.append(f"{key}.{attack}: found {_shown(areas)}, expected visual or all with the area 'unlearned'")
            continue
        for name, area in areas.items():
            if name != "relearning_gap":
                problems += _check_fraction(f"{key}.{attack}.{name}", area)
            elif not (_is_number(area) and -1 <= area <= 1):
                problems.append(f"{key}.{attack}.{name}: found {_shown(area)}, expected a number from -1 to 1")
    return problems


def _check_attacks(key: str, value: Any) -> list[str]:
    if not isinstance(value, dict):
        return _check_mapping(key, value)
    problems = [
        f"{key}.{name}: unknown key, expected questions, membership or probe"
        for name in value
        if name not in ("questions", "membership", "probe")
    ]
    questions = value.get("questions", [])
    if not isinstance(questions, list):
        return [*problems, f"{key}.questions: found {_shown(questions)}, expected a list"]
    for i, row in enumerate(questions):
        where = f"{key}.questions[{i}]"
        if not isinstance(row, dict) or not isinstance(row.get("figures"), dict):
            problems.append(f"{where}: found {_shown(row)}, expected {{kind, variant, chance, figures}}")
            continue
        problems += [f"{where}.{name}: missing" for name in ("kind", "variant") if name not in row]
        problems += _check_fraction(f"{where}.chance", row.get("chance"))
        problems += [] if "unlearned" in row["figures"] else [f"{where}.figures.unlearned: missing"]
        problems += _check_leaves(f"{where}.figures", row["figures"], 1, "accuracy")
    if "membership" in value:
        problems += _check_leaves(f"{key}.membership", value["membership"], 3, "auc")
    if "probe" in value:
        probe = value["probe"]
        if not isinstance(probe, dict) or not isinstance(probe.get("sites"), list):
            return [*problems, f"{key}.probe: found {_shown(probe)}, expected {{sites, models}}"]
        problems += _check_leaves(f"{key}.probe.models", probe.get("models"), 3, "accuracy")
    return problems


def _check_leaves(key: str, value: Any, depth: int, name: str) -> list[str]:
    """The fraction `name` of every object that lies `depth` levels below `value`."""
    if not isinstance(value, dict):
        return _check_mapping(key, value)
    if depth == 0:
        return _check_fraction(f"{key}.{name}", value.get(name))
    return [found for k, inner in value.items() for found in _check_leaves(f"{key}.{k}", inner, depth - 1, name)]


def _check_certificate(key: str, value: Any) -> list[str]:
    if not isinstance(value, dict) or not {"verdict", "forgotten", "checks"} <= set(value):
        return [f"{key}: found {_shown(value)}, expected {{verdict, forgotten, checks}}"]
    if value["verdict"] not in ("passed", "failed", "incomplete"):
        return [f"{key}.verdict: found {_shown(value['verdict'])}, expected passed, failed or incomplete"]
    return []


def _check_comparison(key: str, value: Any) -> list[str]:
    if not isinstance(value, list):
        return [f"{key}: found {_shown(value)}, expected a list of {{name, forget, retain}}"]
    problems = []
    for i, point in enumerate(value):
        if not isinstance(point, dict) or not isinstance(point.get("name"), str):
            problems.append(f"{key}[{i}]: found {_shown(point)}, expected {{name, forget, retain}}")
            continue
        for name in ("forget", "retain"):
            problems += _check_fraction(f"{key}[{i}].{name}", point.get(name))
    return problems


def _check_notes(key: str, value: Any) -> list[str]:
    if isinstance(value, list) and all(isinstance(note, str) for note in value):
        return []
    return [f"{key}: found {_shown(value)}, expected a list of sentences"]


def _check_model(key: str, value: Any, cells: tuple[tuple[str, str], ...]) -> list[str]:
    if not isinstance(value, dict):
        return _check_mapping(key, value)
    problems = []
    for name in value:
        if name not in SETS:
            problems.append(f"{key}.{name}: unknown set, expected one of {', '.join(SETS)}")
    present = [(name, kind) for name, kind in CELLS if isinstance(value.get(name), dict) and kind in value[name]]
    for name, kind in cells:
        if (name, kind) not in present:
            problems.append(f"{key}.{name}.{kind}: missing")
    for name, kind in present:
        problems += _check_cell(f"{key}.{name}.{kind}", value[name][kind])
    return problems


def _check_cell(key: str, cell: Any) -> list[str]:
    if not isinstance(cell, dict):
        return [f"{key}: found {_shown(cell)}, expected a cell"]
    problems = _check_fraction(f"{key}.accuracy", cell.get("accuracy"))
    problems += _check_count(f"{key}.n", cell.get("n"))
    interval = cell.get("ci95")
    if not isinstance(interval, list) or len(interval) != 2:
        problems.append(f"{key}.ci95: found {_shown(interval)}, expected [low, high]")
    else:
        bounds = _check_fraction(f"{key}.ci95[0]", interval[0]) + _check_fraction(f"{key}.ci95[1]", interval[1])
        if not bounds and interval[0] > interval[1]:
            bounds = [f"{key}.ci95: found {_shown(interval)}, expected low <= high"]
        problems += bounds
    for name in ("rouge_l", "cloze"):
        if name not in cell:
            problems.append(f"{key}.{name}: missing (null where no such question was asked)")
        elif cell[name] is not None:
            problems += _check_fraction(f"{key}.{name}", cell[name])
    return problems


def measured_cells(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The (set, kind) pairs that both the vanilla and the unlearned model have, in the order of `CELLS`."""
    return [
        (name, kind)
        for name, kind in CELLS
        if all(kind in report[model].get(name, {}) for model in ("vanilla", "unlearned"))
    ]


# ---------------------------------------------------------------------------------------------------- files


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` so that `path` holds all of it or what it held before, never a part.

    Raises:
        TrainingError: the folder cannot be written, or the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if disk_is_full(error):
            mend = f"no space on disk for its {len(data):,} bytes; free some, or set another output_dir"
        else:
            mend = f"{error.strerror or error}; set an output_dir that can be written"
        raise TrainingError(f"{path}: cannot be written: {mend}") from error
    finally:
        # A path whose parent is a file has no temporary to remove, and asking would raise over the real error.
        if temporary.parent.is_dir():
            temporary.unlink(missing_ok=True)


def write_report(report: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write report.json atomically. Raises TrainingError as `write_atomically`, ValueError on NaN or infinity."""
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(path, (text + "\n").encode())


def read_report(path: str | os.PathLike[str], *, cells: Iterable[tuple[str, str]] = CELLS) -> dict[str, Any]:
    """Read and check report.json. Raises DataError, naming the first thing that is wrong with it."""
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; give the report.json of a finished run") from error
    except ValueError as error:
        raise DataError(f"{path}: is not JSON ({error}); give the report.json of a finished run") from error
    problems = validate(report, cells=cells)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise DataError(f"{path}: {problems[0]}{more}; make the report anew with this version of fastvkd")
    checked: dict[str, Any] = report
    return checked


# ---------------------------------------------------------------------------------------------------- judgement


@dataclass(frozen=True)
class Criterion:
    """One thing that is asked of an unlearned model. `found` and `asked` are ready to be shown."""

    name: str
    found: str
    asked: str
    met: bool


@dataclass(frozen=True)
class Clause:
    """A part of the headline: a verb phrase about `topic` ('forget', 'retain', 'text') and its figures."""

    topic: str
    text: str
    figures: str


def percent(fraction: float) -> str:
    """'97%'; a decimal only where rounding would claim exactly 100 % or 0 % of what is not."""
    rounded = f"{100 * fraction:.0f}"
    if (rounded == "100" and fraction < 1) or (rounded == "0" and fraction > 0):
        rounded = f"{math.floor(1000 * fraction) / 10:.1f}" if fraction < 1 else "100"
    return rounded + "%"


def points(fraction: float) -> str:
    """'96.3': an accuracy in percent, to a tenth."""
    return f"{100 * fraction:.1f}"


def percent_change(before: float, after: float) -> str:
    """'96% → 28%', on one line; with a decimal in both where one of them needs it."""
    figures = percent(before), percent(after)
    if any("." in figure for figure in figures):
        figures = f"{100 * before:.1f}%", f"{100 * after:.1f}%"
    return "\N{NO-BREAK SPACE}→\N{NO-BREAK SPACE}".join(figures)


def text_accuracy(report: Mapping[str, Any], model: str) -> float | None:
    """Accuracy over the text questions of every set, pooled (weighted by n); None if none was asked."""
    cells = [report[model][name][kind] for name, kind in measured_cells(report) if kind == "qa"]
    asked = sum(cell["n"] for cell in cells)
    return sum(cell["accuracy"] * cell["n"] for cell in cells) / asked if asked else None


def _accuracy(report: Mapping[str, Any], model: str, name: str, kind: str = "vqa") -> float:
    return float(report[model][name][kind]["accuracy"])


def thresholds(report: Mapping[str, Any]) -> Certificate:
    """The bar that the run was held to: its `certificate` settings, null where a check was left out."""
    given = report["settings"].get("certificate")
    return Certificate(**{key: given[key] for key in vars(Certificate()) if key in given} if given else {})


def _threshold(report: Mapping[str, Any], key: str) -> float:
    """The default where the run left that check out: words and pictures need one."""
    given = getattr(thresholds(report), key)
    return float(getattr(Certificate(), key) if given is None else given)


def chance_band(report: Mapping[str, Any]) -> float:
    """How far off chance counts as forgotten, below as much as above: a model that avoids the right answer still knows
    it."""
    return _threshold(report, "chance_band")


def kept_visual(report: Mapping[str, Any]) -> float:
    """The share of its visual accuracy that a model is to keep."""
    return _threshold(report, "kept_visual")


# The tolerance keeps 0.35 - 0.25 from counting as more than 0.10.
_TOLERANCE = 1e-9


def _near_chance(report: Mapping[str, Any], name: str) -> bool:
    return abs(_accuracy(report, "unlearned", name) - report["chance"]) <= chance_band(report) + _TOLERANCE


def _keeps(report: Mapping[str, Any], name: str) -> bool:
    before, after = (_accuracy(report, model, name) for model in ("vanilla", "unlearned"))
    return after >= kept_visual(report) * before - _TOLERANCE


def _worst_text(report: Mapping[str, Any]) -> tuple[float, float] | None:
    """Accuracy before and after of the text questions of the set that lost most, so that a loss in one small set cannot
    hide in the mean; None if none was asked."""
    pairs = [
        (_accuracy(report, "vanilla", name, "qa"), _accuracy(report, "unlearned", name, "qa"))
        for name, kind in measured_cells(report)
        if kind == "qa"
    ]
    return min(pairs, key=lambda pair: pair[1] / pair[0] if pair[0] else 1.0) if pairs else None


def _keeps_text(report: Mapping[str, Any]) -> bool:
    worst = _worst_text(report)
    return worst is None or worst[1] >= _threshold(report, "kept_text") * worst[0] - _TOLERANCE


def _tenths(fraction: float) -> str:
    return f"{points(fraction)}%"


def criteria(report: Mapping[str, Any]) -> list[Criterion]:
    """What is asked of the unlearned model, and whether it was met; only for the cells that were measured, and without
    the checks that the run's `certificate` settings leave out."""
    cells = measured_cells(report)
    bar, chance = thresholds(report), report["chance"]
    result = []
    if bar.chance_band is not None:
        low, high = percent(max(0.0, chance - bar.chance_band)), percent(min(1.0, chance + bar.chance_band))
        for name, label in (("forget", "Forgotten people, known photos"), ("test", "Forgotten people, unseen photos")):
            if (name, "vqa") in cells:
                found = _tenths(_accuracy(report, "unlearned", name))
                result.append(Criterion(label, found, f"{low} to {high} (chance)", _near_chance(report, name)))
    if bar.kept_visual is not None:
        for name, label in (("retain", "Retained people"), ("realworld", "Real world")):
            if (name, "vqa") in cells:
                before, after = (_accuracy(report, model, name) for model in ("vanilla", "unlearned"))
                asked = f"at least {_tenths(bar.kept_visual * before)}"
                result.append(Criterion(label, _tenths(after), asked, _keeps(report, name)))
    worst = _worst_text(report)
    if bar.kept_text is not None and worst is not None:
        before, after = worst
        asked = f"at least {_tenths(bar.kept_text * before)}"
        result.append(Criterion("Text, worst set", _tenths(after), asked, _keeps_text(report)))
    if bar.language_model_unchanged:
        digest = report["language_model_sha256"]
        same = digest["before"] == digest["after"]
        result.append(Criterion("Language model", "unchanged" if same else "changed", "unchanged, bit by bit", same))
    return result


def headline(report: Mapping[str, Any]) -> list[Clause]:
    """The verdict as clauses about forgetting, keeping and text; `headline_sentence` joins them."""
    chance, band = report["chance"], chance_band(report)
    before, after = _accuracy(report, "vanilla", "forget"), _accuracy(report, "unlearned", "forget")
    figures = f"{percent_change(before, after)} right, chance {percent(chance)}"
    has_test = ("test", "vqa") in measured_cells(report)
    if before <= chance + band:
        text = "hardly knew the people to be forgotten in the first place"
    elif after < chance - band - _TOLERANCE:
        text = "avoids the right answer about the forgotten people, which still gives them away"
    elif _near_chance(report, "forget"):
        text = "no longer recognises the forgotten people"
        if has_test and not _near_chance(report, "test"):
            unseen = percent(_accuracy(report, "unlearned", "test"))
            text += " in known photos"
            figures += f"; in unseen photos {unseen}"
    elif after - chance <= 0.5 * (before - chance):
        text = "recognises the forgotten people less often, but not yet at chance"
    else:
        text = "still recognises the people it was to forget"
    clauses = [Clause("forget", text, figures)]

    figures = percent_change(*(_accuracy(report, model, "retain") for model in ("vanilla", "unlearned")))
    kept = _keeps(report, "retain")
    clauses.append(Clause("retain", ("still knows" if kept else "knows fewer of") + " the retained people", figures))
    texts = [text_accuracy(report, model) for model in ("vanilla", "unlearned")]
    if texts[0] is not None and texts[1] is not None:
        verb = "keeps its text knowledge" if _keeps_text(report) else "lost some text knowledge"
        clauses.append(Clause("text", verb, percent_change(texts[0], texts[1])))
    return clauses


def headline_sentence(report: Mapping[str, Any]) -> str:
    """The verdict in one sentence with its key figures."""
    parts = [f"{clause.text} ({clause.figures})" for clause in headline(report)]
    return "The model " + ", ".join(parts[:-1]) + " and " + parts[-1] + "."
