"""certificate.json: what was to be forgotten, by whom it was made, what every test found, and whether that meets the
thresholds of the settings. It names images by hash alone: no image, no name, no answer of a forgotten entity is in it.
"""

import hashlib
import importlib.util
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastvkd.attacks.probe import probe_gap
from fastvkd.data.images import content_hash
from fastvkd.data.records import Profile
from fastvkd.reporting.report import write_atomically
from fastvkd.settings import Certificate

CERTIFICATE_VERSION = 1
_FORGOTTEN = ("forget", "test", "forget_faces")  # sets about what was to be forgotten; all others are to be kept
_TOLERANCE = 1e-9  # 0.35 - 0.25 is not more than 0.10


def figures_of(
    evaluated: Mapping[str, Mapping[str, Mapping[str, Mapping[str, Any]]]],
    attacks: Mapping[str, Any],
    *,
    chance: float | None,
    relearning_gaps: Iterable[float] = (),
    language_model: Mapping[str, str] | None = None,
) -> dict[str, float | None]:
    """The figures that `judge` knows, from `{model: {set: {kind: cell}}}`, the result of `attack`, the gaps of its
    relearning (`mean_gaps`) and the digests `before` and `after` of the language model; None where not measured.

    `chance` is that of the forget set's questions. `*_excess` are the unlearned model's accuracy above chance in the
    worst variant of an attack; `membership` the area furthest from 0.5, mirrored to lie above; `relearning_gap` the
    largest gap; the `kept_*` are shares of the accuracy before, of the worst set.
    """
    unlearned, vanilla = evaluated["unlearned"], evaluated.get("vanilla")
    rows = attacks.get("questions", [])

    def accuracy(name: str, kind: str) -> float | None:
        value = unlearned.get(name, {}).get(kind, {}).get("accuracy")
        return None if value is None else float(value)

    def kept(names: Sequence[str], kind: str) -> float | None:
        ratios = []
        for name in names if vanilla is not None else ():
            before = (vanilla or {}).get(name, {}).get(kind, {}).get("accuracy")
            after = accuracy(name, kind)
            if before and after is not None:
                ratios.append(after / before)
        return min(ratios, default=None)

    def excess(kind: str) -> float | None:
        found = [row["figures"]["unlearned"]["accuracy"] - row["chance"] for row in rows if row["kind"] == kind]
        return max(found, default=None)

    areas = [
        abs(found["auc"] - 0.5) + 0.5
        for by_score in attacks.get("membership", {}).get("unlearned", {}).values()
        for found in by_score.values()
    ]
    return {
        "chance": chance,
        "forget": accuracy("forget", "vqa"),
        "test": accuracy("test", "vqa"),
        "kept_visual": kept([name for name in unlearned if name not in _FORGOTTEN], "vqa"),
        "kept_text": kept(tuple(unlearned), "qa"),
        "language_model_unchanged": None
        if language_model is None
        else float(language_model["before"] == language_model["after"]),
        **{f"{kind}_excess": excess(kind) for kind in ("paraphrase", "fewshot", "reverse", "images", "quantize")},
        "membership": max(areas, default=None),
        "relearning_gap": max(relearning_gaps, default=None),
        "probe_gap": probe_gap(attacks["probe"]["models"]) if "probe" in attacks else None,
    }


def mean_gaps(rows: Iterable[Mapping[str, Any]]) -> list[float]:
    """The mean `relearning_gap` over seeds of every kind of weights and share, from the rows of `relearn`."""
    gaps: dict[tuple[str, float], list[float]] = {}
    for row in rows:
        if "relearning_gap" in row["auc"]:
            gaps.setdefault((row["weights"], row["share"]), []).append(row["auc"]["relearning_gap"])
    return [sum(of) / len(of) for of in gaps.values()]


def judge(figures: Mapping[str, float | None], thresholds: Certificate) -> list[dict[str, Any]]:
    """Every check whose threshold is set: {"name", "figure" (None if not measured), "asked" (text), "met" (None if not
    measured)}."""
    checks: list[dict[str, Any]] = []

    def check(key: str, name: str, limit: float | None, *, at_least: bool = False) -> None:
        if limit is None:
            return
        value, sign = figures.get(key), 1 if at_least else -1
        met = None if value is None else sign * (value - limit) >= -_TOLERANCE
        asked = f"{'at least' if at_least else 'at most'} {limit:.2f}"
        checks.append({"key": key, "name": name, "figure": value, "asked": asked, "met": met})

    def band(key: str, name: str) -> None:
        if thresholds.chance_band is None:
            return
        value, chance = figures.get(key), figures.get("chance")
        met = None
        asked = f"within {thresholds.chance_band:.2f} of chance"
        if value is not None and chance is not None:
            met = abs(value - chance) <= thresholds.chance_band + _TOLERANCE
            asked += f" ({chance:.2f})"
        checks.append({"key": key, "name": name, "figure": value, "asked": asked, "met": met})

    band("forget", "Forgotten entities, known photos")
    band("test", "Forgotten entities, unseen photos")
    check("kept_visual", "Kept of visual accuracy, worst set", thresholds.kept_visual, at_least=True)
    check("kept_text", "Kept of text accuracy, worst set", thresholds.kept_text, at_least=True)
    if thresholds.language_model_unchanged:
        same = figures.get("language_model_unchanged")
        name = "Language model unchanged, bit by bit"
        met = None if same is None else bool(same)
        checks.append({"key": "language_model_unchanged", "name": name, "figure": same, "asked": "yes", "met": met})
    for kind, name in (
        ("paraphrase", "Paraphrased questions, above chance"),
        ("fewshot", "Few-shot prompts, above chance"),
        ("reverse", "Answers in reverse, above chance"),
        ("images", "Edited photos, above chance"),
        ("quantize", "Quantised weights, above chance"),
    ):
        check(f"{kind}_excess", name, thresholds.attack_above_chance)
    check("membership", "Membership inference, AUC", thresholds.membership_auc)
    check("relearning_gap", "Relearning, area above gold", thresholds.relearning_gap)
    check("probe_gap", "Linear probe, worst site above gold", thresholds.probe_gap)
    return checks


def verdict_of(checks: Sequence[Mapping[str, Any]]) -> str:
    """`failed` where a check is not met; else `incomplete` where one was not measured; else `passed`."""
    if any(check["met"] is False for check in checks):
        return "failed"
    return "passed" if checks and all(check["met"] for check in checks) else "incomplete"


def certificate(
    *,
    forget: Sequence[Profile],
    settings: Mapping[str, Any] | None,
    model_fingerprint: str,
    figures: Mapping[str, float | None],
    thresholds: Certificate,
    versions: Mapping[str, str],
) -> dict[str, Any]:
    """The content of certificate.json. `settings` are those of the run that made the model; None if unknown."""
    hashes = sorted({content_hash(photo.data) for profile in forget for photo in profile.photos})
    checks = judge(figures, thresholds)
    return {
        "certificate_version": CERTIFICATE_VERSION,
        "verdict": verdict_of(checks),
        "forgotten": {
            "entities": len({profile.entity for profile in forget}),
            "images": len(hashes),
            "image_sha256": hashes,
        },
        "model_fingerprint": model_fingerprint,
        "settings": None if settings is None else dict(settings),
        "code": {"fastvkd": versions.get("fastvkd", ""), "source_sha256": source_sha256(), "versions": dict(versions)},
        "python": platform.python_version(),
        "thresholds": asdict(thresholds),
        "figures": dict(figures),
        "checks": checks,
    }


def source_sha256() -> str:
    """SHA-256 (hex) over the installed package's own Python files, by relative path: the version of the code to the
    bit, also where it was changed after its release."""
    spec = importlib.util.find_spec("fastvkd")
    assert spec is not None and spec.origin is not None
    root = Path(spec.origin).parent
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root).as_posix()} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def write_certificate(content: Mapping[str, Any], path: Path) -> None:
    """Write certificate.json atomically. Raises TrainingError."""
    write_atomically(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
