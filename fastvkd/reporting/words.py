"""How the page and the card word figures, settings and the parts of a run."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_SETS = {
    "forget": "Forgotten, known photos",
    "test": "Forgotten, unseen photos",
    "retain": "Retained",
    "realworld": "Real world",
    "forget_faces": "Forgotten, named",
    "retain_faces": "Retained, named",
    "real_faces": "Real faces",
    "real_world": "Real world",
    "stranger": "Strangers",
    "neighbour": "Retained, beside a forgotten person",
    "pair": "Forgotten, beside a retained person",
}
# What is asked in words alone is not about photos, so the sets are named by whom they are about.
_TEXT_SETS = _SETS | {"forget": "Forgotten people", "test": "Forgotten people, test set"}


def set_name(name: str, kind: str) -> str:
    """The set as a row of a table is called; `kind` is vqa or qa."""
    return (_SETS if kind == "vqa" else _TEXT_SETS)[name]


def percent(fraction: float) -> str:
    """'97%'; a decimal only where rounding would claim exactly 100 % or 0 % of what is not."""
    rounded = f"{100 * fraction:.0f}"
    if (rounded == "100" and fraction < 1) or (rounded == "0" and fraction > 0):
        rounded = f"{math.floor(1000 * fraction) / 10:.1f}" if fraction < 1 else "100"
    return rounded + "%"


def points(fraction: float) -> str:
    """'96.3': an accuracy in percent, to a tenth."""
    return f"{100 * fraction:.1f}"


def bound(fraction: float) -> str:
    """An end of an interval: as `points`, but '100' for '100.0', which leaves room for the other end on a phone."""
    return points(fraction).replace("100.0", "100")


def percent_change(before: float, after: float) -> str:
    """'96% → 28%', on one line; with a decimal in both where one of them needs it."""
    figures = percent(before), percent(after)
    if any("." in figure for figure in figures):
        figures = f"{100 * before:.1f}%", f"{100 * after:.1f}%"
    return "\N{NO-BREAK SPACE}→\N{NO-BREAK SPACE}".join(figures)


def points_change(before: float, after: float) -> str:
    """'+1.2', '−70.9': from the rounded figures, so that a table adds up."""
    difference = round(100 * after, 1) - round(100 * before, 1)
    if abs(difference) < 0.05:
        return "0.0"
    return f"{'+' if difference > 0 else '−'}{abs(difference):.1f}"


def signed(fraction: float) -> str:
    """'+22.1', '−3.0': a difference in percentage points."""
    return f"{100 * fraction:+.1f}".replace("-", "−")


def duration(seconds: float) -> str:
    """'8.4 s', '4 min 32 s', '2 h 05 min'."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def byte_size(count: float) -> str:
    """'1.9 GiB'."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def model_name(settings: Mapping[str, Any]) -> str:
    """The model as a reader knows it: a hub id, or the last two parts of a local folder."""
    parts = Path(str(settings.get("model_name_or_path") or "model")).parts
    return "/".join(part for part in parts[-2:] if part != "/")


def site_label(site: str) -> str:
    """'vision:3' -> 'V3', 'projector' -> 'P', 'llm:2' -> 'L2'."""
    kind, _, number = site.partition(":")
    return {"vision": "V", "projector": "P", "llm": "L"}[kind] + number


def some(names: Sequence[str], most: int = 3) -> str:
    """'015, 023' or '015, 023, 031 and 4 more'."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted keys with readable values."""
    flat: dict[str, str] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{name}.")
        elif isinstance(value, list | tuple):
            flat[name] = ", ".join(str(item) for item in value) or "none"
        else:
            words = {"None": "none", "True": "yes", "False": "no"}
            flat[name] = words.get(str(value), str(value))
    return flat


def is_right(answer: str, truth: str) -> bool:
    """Whether the answer holds the truth as whole words, ignoring case and punctuation."""

    def words(text: str) -> str:
        return " " + " ".join("".join(c if c.isalnum() else " " for c in text.casefold()).split()) + " "

    return bool(words(truth).strip()) and words(truth) in words(answer)
