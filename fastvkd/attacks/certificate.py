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
from fastvkd.files import write_atomically
from fastvkd.records import Profile
from fastvkd.reporting.stranger import beside_strangers
from fastvkd.reporting.verdict import judge, kept_shares, verdict_of
from fastvkd.settings import Certificate

CERTIFICATE_VERSION = 1
# Sets about what was to be forgotten, and about strangers, of whom nothing is known; all others are to be kept.
_NOT_KEPT = ("forget", "test", "forget_faces", "pair", "stranger")


def figures_of(
    evaluated: Mapping[str, Mapping[str, Mapping[str, Mapping[str, Any]]]],
    attacks: Mapping[str, Any],
    people: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    chance: float | None,
    relearning: Sequence[Mapping[str, Any]] = (),
    language_model: Mapping[str, str] | None = None,
) -> dict[str, float | None]:
    """The figures that `judge` knows, from `{model: {set: {kind: cell}}}`, the result of `attack`, what comes of its
    relearning (`relearned`) and the digests `before` and `after` of the language model; None where not measured.
    `people` is `{model: the figures of examine person by person}`; what it lacks is absent here too.

    `chance` is that of the forget set's questions; `learnt` (absent without `vanilla`) the accuracy on them before.
    `*_excess` are the unlearned model's accuracy above chance in the worst variant of an attack; `membership` the area
    furthest from 0.5, mirrored to lie above; `relearning_gap` the largest gap, and `relearning_evidence` 1 if each kind
    of weights has a curve that is evidence, else 0; the `kept_*` are shares of the accuracy before, of the worst set;
    `telltale_gold` is gold's `telltale_auc`. `perturbation_excess` (absent if not measured) is the accuracy on unseen
    photos under the worst perturbation, above the highest of chance, gold's, and that on strangers' photos.
    """
    unlearned = evaluated["unlearned"]
    rows = attacks.get("questions", [])

    def accuracy(name: str, kind: str) -> float | None:
        value = unlearned.get(name, {}).get(kind, {}).get("accuracy")
        return None if value is None else float(value)

    def excess(kind: str) -> float | None:
        found = [row["figures"]["unlearned"]["accuracy"] - row["chance"] for row in rows if row["kind"] == kind]
        return max(found, default=None)

    seen = kept_shares(evaluated, "vqa")
    areas = [
        abs(found["auc"] - 0.5) + 0.5
        for by_score in attacks.get("membership", {}).get("unlearned", {}).values()
        for found in by_score.values()
    ]
    return {
        "chance": chance,
        **_learnt(evaluated.get("vanilla", {})),
        "forget": accuracy("forget", "vqa"),
        "test": accuracy("test", "vqa"),
        "kept_visual": min((kept for name, kept in seen.items() if name not in _NOT_KEPT), default=None),
        "kept_text": min(kept_shares(evaluated, "qa").values(), default=None),
        "language_model_unchanged": None
        if language_model is None
        else float(language_model["before"] == language_model["after"]),
        **{f"{kind}_excess": excess(kind) for kind in ("paraphrase", "fewshot", "reverse", "images", "quantize")},
        "membership": max(areas, default=None),
        "relearning_gap": max((row["gap"] for row in relearning if row["gap"] is not None), default=None),
        "relearning_evidence": _carried_out(relearning),
        "probe_gap": probe_gap(attacks["probe"]["models"]) if "probe" in attacks else None,
        **_perturbed(attacks.get("perturbation", [])),
        **_of_people(people or {}),
    }


def _learnt(vanilla: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, float]:
    """What the model before knew of the forget set: where that was nothing, no forgetting can be shown."""
    accuracy = vanilla.get("forget", {}).get("vqa", {}).get("accuracy")
    return {} if accuracy is None else {"learnt": float(accuracy)}


def _carried_out(relearning: Sequence[Mapping[str, Any]]) -> float | None:
    """Whether every kind of weights has a curve that is evidence; None where there are no curves."""
    kinds = {row["weights"] for row in relearning}
    return float(kinds == {row["weights"] for row in relearning if row["evidence"]}) if kinds else None


def _perturbed(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    def accuracy(model: str, on: str, size: int) -> list[float]:
        same = (row for row in rows if (row["on"], row["size"]) == (on, size) and model in row["figures"])
        return [row["figures"][model]["accuracy"] for row in same]

    excess = []
    for row in rows:
        if row["on"] == "unseen" and row["size"]:
            taught = accuracy("gold", "unseen", row["size"]) + accuracy("unlearned", "strangers", row["size"])
            if taught:  # a model that never knew anybody is above chance then too: beside chance alone it says nothing
                excess.append(row["figures"]["unlearned"]["accuracy"] - max([row["chance"], *taught]))
    return {"perturbation_excess": max(excess)} if excess else {}


def _of_people(people: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The figures about forgotten people beside strangers, as far as they were measured."""
    unlearned = people.get("unlearned", {})
    who, found = unlearned.get("who", {}), {}
    if "forget" in who:
        found["named_right"] = who["forget"]["right"]
    if {"forget", "stranger"} <= set(who):
        found["misnamed_excess"] = who["forget"]["misnamed"] - who["stranger"]["misnamed"]
    before, after = (people.get(model, {}).get("description", {}).get("forget") for model in ("vanilla", "unlearned"))
    if before and after and before["accuracy"]:
        found["description_kept"] = after["accuracy"] / before["accuracy"]
    if beside := beside_strangers(people):
        found["outside_band"] = sum(map(bool, beside.values())) / len(beside)
    for model, name in (("unlearned", "telltale_auc"), ("gold", "telltale_gold")):
        if "telltale_auc" in people.get(model, {}):
            found[name] = people[model]["telltale_auc"]
    return found


def relearned(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of `Relearning.rows` as means over seeds: {"variant", "weights", "share", "learning_rate", "gap" (None
    without gold), "evidence": whether no seed's curve of the unlearned model is marked as collapsed}."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    names = ("variant", "weights", "share", "learning_rate")
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    found = []
    for group, of in groups.items():
        gaps = [row["auc"]["relearning_gap"] for row in of if "relearning_gap" in row["auc"]]
        gap = sum(gaps) / len(gaps) if gaps else None
        evidence = not any(row["collapsed"].get("unlearned", True) for row in of)
        found.append({**dict(zip(names, group, strict=True)), "gap": gap, "evidence": evidence})
    return found


def certificate(
    *,
    forget: Sequence[Profile],
    settings: Mapping[str, Any] | None,
    model_fingerprint: str,
    figures: Mapping[str, float | None],
    relearning: Sequence[Mapping[str, Any]] = (),
    thresholds: Certificate,
    versions: Mapping[str, str],
    loading: Mapping[str, str] | None = None,
    edited: Sequence[str] = (),
    requests: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """The content of certificate.json. `settings` are those of the run that made the model; None if unknown.
    `relearning` is that of `relearned`, every way in which it was tried. `loading` is how the judged models were loaded
    (`Loading.described`): a quantised one is another than the folder holds. `edited` are the LLM's tensors that
    scrubs changed (`fastvkd.engines.exporting.edited_of`). `requests` are all that the model has met, and whether this
    certificate speaks of each (`fastvkd.engines.requests.judged`)."""
    hashes = sorted({photo.key for profile in forget for photo in profile.photos})
    checks = [_with_its_attack(check, relearning) for check in judge(figures, thresholds)]
    return {
        "certificate_version": CERTIFICATE_VERSION,
        "verdict": verdict_of(checks),
        "forgotten": {
            "entities": len({profile.entity for profile in forget}),
            "images": len(hashes),
            "image_sha256": hashes,
        },
        "requests": [dict(request) for request in requests],
        "model_fingerprint": model_fingerprint,
        "loading": None if loading is None else dict(loading),
        "language_model_edited": list(edited),
        "settings": None if settings is None else dict(settings),
        "code": {"fastvkd": versions.get("fastvkd", ""), "source_sha256": source_sha256(), "versions": dict(versions)},
        "python": platform.python_version(),
        "thresholds": asdict(thresholds),
        "figures": dict(figures),
        "relearning": list(relearning),
        "checks": checks,
    }


def _with_its_attack(check: Mapping[str, Any], relearning: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A failed check of relearning names the way that broke it."""
    ways = [row for row in relearning if row["gap"] is not None]
    if check["key"] != "relearning_gap" or check["met"] is not False or not ways:
        return dict(check)
    worst = max(ways, key=lambda row: row["gap"])
    named = f"{worst['variant'].replace('_', ' ')}, {worst['weights']} weights, rate {worst['learning_rate']:g}"
    return {**check, "asked": f"{check['asked']}; broken by {named}"}


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
