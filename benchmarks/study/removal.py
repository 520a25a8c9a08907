"""Gone, not hidden: every relearning attack on models that forgot in different ways, and on each idea against it.

Rows are the vanilla and the gold model, VKD by configs/demo.yaml as it is and by other targets, methods on answers at
the point that methods.py chose (or, where that chose none, in the middle of its grid), and VKD with one idea each:
`defences.py` has those that settings do not offer. An attack trains the visual or all weights, plainly at three rates
or at the highest of them after a first move, or with other photos; all are on the same questions about unseen photos.

What counts is how far the area under a curve lies above that of gold under the same attack. A curve has collapsed where
the attack took away what the model should keep. What it did not regain then shows nothing, so it does not count; but
what it did regain was there, so it does where it lies further above gold's than a certificate allows.
"""

import contextlib
import functools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from defences import ATTACK_RATE, MOMENT_BATCHES, defended
from tables import RESULTS, table
from world import World

from fastvkd.attacks.relearning import Relearning, Weights, area_under_curve, collapsed
from fastvkd.demo.run import SIZES
from fastvkd.options import Budget, RelearningVariant
from fastvkd.reporting.schema import PLAIN
from fastvkd.settings import Certificate
from study import Row, Study, methods, percent

ON_ANSWERS = ("gd", "npo", "rmu", "mmunlearner")
RATES = Budget.learning_rates  # of the plain attack; all others have the highest
OTHERS = [
    variant for variant in get_args(RelearningVariant) if not variant.startswith("public")
]  # there is no public one
RETAINED = 24  # questions that tell whether an attack wrecks a model
ALLOWED = Certificate.relearning_gap  # above gold, by a certificate
assert ALLOWED is not None


@dataclass(frozen=True)
class Variant:
    """A method of methods.py, what is changed in its settings, and how its run is defended (see `defended`)."""

    method: str
    changes: dict[str, Any] = field(default_factory=dict)
    defence: dict[str, Any] = field(default_factory=dict)


def _from_noise(size: float) -> Variant:
    # Where training starts kept images lie far off, which a run would take for damage.
    return Variant("vkd", {"max_drift": None}, {"noise": size})


VARIANTS = {
    **{
        name: Variant(name, methods.GRID[name][0])
        for name in ("vanilla", "gold", "vkd", "vkd-one-photo", "vkd-saturate", "vkd-noise")
    },
    **{name: Variant(name) for name in ON_ANSWERS},
    "vkd, projector and llm:1": Variant("vkd", {"sites": {"projector": 1.0, "llm:1": 1.0}}),
    "vkd, null space of 99.9 %": Variant("vkd", defence={"energy": 0.999}),
    "vkd, worst case of 1 step": Variant("vkd", defence={"attack_steps": 1}),
    "vkd, from noise of 0.3": _from_noise(0.3),
    "vkd, from noise of 1": _from_noise(1.0),
    # With n photos of a person training aims at 1 + beyond / sqrt(n) times the way.
    "vkd, twice as far": Variant("vkd", {"stranger.beyond": math.sqrt(SIZES["default"].photos)}),
    "vkd, scrub": Variant("vkd", {"scrub": True}),
}


def measure(world: World, name: str) -> Row:
    """One row: what the model knows and describes, and every attack's curve."""
    point, model = made(world, VARIANTS[name])
    return {
        "setting": {key: value for key, value in point.items() if key not in ("seconds", "images")},
        **methods.examined(world, model),
        "unlearning_seconds": point["seconds"],
        "relearning": attacked(world, model),
    }


def made(world: World, variant: Variant) -> tuple[dict[str, Any], Any]:
    """The model of a variant, and its point as in `methods.candidates`."""
    if variant.method in ON_ANSWERS:
        wanted = point_of(world.size, world.seed, variant.method)
        setting = {key: value for key, value in wanted.items() if key != "step"}
        points = methods.tried(world, variant.method, setting)
        return next(found for found in points if found[0]["step"] == wanted["step"])
    with defended(**variant.defence) if variant.defence else contextlib.nullcontext():
        return next(methods.tried(world, variant.method, variant.changes))


def point_of(size: str, seed: int, method: str) -> dict[str, Any]:
    """The settings of a method on answers and the step of its run: as chosen by methods.py, else the middle ones."""
    grid = methods.GRID[method]
    return _chosen().get((size, seed, method)) or {**grid[len(grid) // 2], "step": methods.STEPS // 2}


@functools.cache
def _chosen() -> dict[tuple[str, int, str], dict[str, Any]]:
    rows = json.loads((RESULTS / "methods.json").read_text())["rows"]
    return {(row["size"], row["seed"], row["variant"]): row["setting"] for row in rows}


def attacked(world: World, model: Any) -> list[Row]:
    """One {"share", "variant", "weights", "learning_rate", "seed", "photos", "curve", "auc", "collapsed"} an attack."""
    budget = Budget(
        relearning_shares=(methods.ATTACK_SHARE,),  # and all photos, as one of the variants
        relearning_variants=OTHERS,
        relearning_seeds=(world.seed,),
        relearning_steps=world.spec.attacks.relearning_steps,
        relearning_samples=methods.ATTACK_SAMPLES,
        relearning_retained=RETAINED,
        learning_rates=RATES,
    )
    relearning = Relearning(world.processor, world.cells, budget, prepared=world.prepared)
    (before,) = relearning.retained(model)
    rows = []
    for job in relearning.jobs:
        if job.plan.variant != PLAIN and job.learning_rate != max(RATES):
            continue
        found = relearning.curve(model, job)
        if found is not None:
            curve = found["curve"]
            rows.append({**job.names, **found, "auc": area_under_curve(curve), "collapsed": collapsed(curve, before)})
    return rows


def beside_gold(rows: Sequence[Row]) -> Iterator[Row]:
    """Rows whose curves have `gap`, their area above that of gold of the same seed under the same attack (None where
    there is no such gold, and for gold itself), with the `worst` of each kind of weights."""
    gold = {(row["size"], row["seed"]): row["relearning"] for row in rows if row["variant"] == "gold"}
    for row in rows:
        reference = None if row["variant"] == "gold" else gold.get((row["size"], row["seed"]))
        areas = None if reference is None else {_attack(curve): curve["auc"] for curve in reference}
        curves = [
            {**curve, "gap": None if areas is None else curve["auc"] - areas[_attack(curve)]}
            for curve in row["relearning"]
        ]
        yield {
            **row,
            "relearning": curves,
            "worst": {kind: worst([c for c in curves if c["weights"] == kind]) for kind in get_args(Weights)},
            "trained": row["variant"] not in ("vanilla", "gold"),
        }


def worst(curves: Sequence[Row]) -> Row | None:
    """The curve that counts and lies furthest above gold's or, where there is no gold, the highest that counts. None
    where none does: nothing was shown then."""

    def counts(curve: Row) -> bool:
        return not curve["collapsed"] or (curve["gap"] is not None and curve["gap"] > ALLOWED)

    return max(
        filter(counts, curves), key=lambda curve: curve["auc"] if curve["gap"] is None else curve["gap"], default=None
    )


def _attack(curve: Row) -> tuple[str, str, float]:
    return curve["variant"], curve["weights"], curve["learning_rate"]


def attack_named(curve: Row) -> str:
    name = curve["variant"].replace("_", " ")
    return f"{name} at {curve['learning_rate']:g}" if curve["variant"] == PLAIN else name


def area_of(curve: Row) -> str:
    return percent(curve["auc"]) + ("*" if curve["collapsed"] else "")


def model_named(row: Row) -> str:
    return methods.NAMES.get(row["variant"], row["variant"].replace("vkd", "VKD"))


def _worst(weights: Weights) -> Callable[[Row], str]:
    def text(row: Row) -> str:
        found = row["worst"][weights]
        if found is None:
            return "nothing shown"
        gap = "" if found["gap"] is None else f"{100 * found['gap']:+.1f}, "
        return f"{gap}{area_of(found)} by {attack_named(found)}"

    return text


def areas(report: dict[str, Any]) -> list[str]:
    """What the figures are, and the area of every attack."""
    rows = report["rows"]
    attacks = list(dict.fromkeys(attack_named(curve) for row in rows for curve in row["relearning"]))
    lines = []
    for row in rows:
        found: dict[str, list[str]] = {}
        for curve in row["relearning"]:
            found.setdefault(attack_named(curve), []).append(area_of(curve))
        lines.append([row["seed"], model_named(row), *(" / ".join(found.get(attack, [])) for attack in attacks)])
    about = (
        f"Areas under relearning curves on unseen photos in %, by an attacker who holds {methods.ATTACK_SHARE:.0%} of "
        f"the forget photos (or as many others, or all) and trains the visual / all weights, at {max(RATES):g} unless "
        "a rate is named. A star: the model lost so much of what it should keep that what it did not regain shows "
        "nothing."
    )
    below = (
        "Below, of the attacks that show something, the one that comes furthest above gold of the same seed: by how "
        f"much, and the area that it leaves. One with a star counts from {100 * ALLOWED:g} above gold."
    )
    return [about, "", *table(["seed", "model", *attacks], lines, 2), "", below]


STUDY = Study(
    about="Gone, not hidden: every relearning attack",
    note=areas,
    variants=VARIANTS,
    row=measure,
    lines=beside_gold,
    columns={
        "seed": lambda row: row["seed"],
        "model": model_named,
        "visual weights: gap, area": _worst("visual"),
        "all weights: gap, area": _worst("all"),
        **{
            head: methods.STUDY.columns[head]
            for head in (
                "unseen photos",
                "named right / wrong (strangers wrong)",
                "description: forgotten / strangers / retained / neighbours",
                "retain",
                "neighbours",
                "real world",
                "text QA, worst set",
                "LLM unchanged",
                "seconds",
            )
        },
    },
    left=4,
    protocol=lambda: {
        "steps": methods.STEPS,
        "every": methods.EVERY,
        "batch": methods.BATCH,
        "samples": {"examined": methods.SAMPLES, "attack": methods.ATTACK_SAMPLES, "retained": RETAINED},
        "attack_share": methods.ATTACK_SHARE,
        "rates": RATES,
        "attacks": OTHERS,
        "moment_batches": MOMENT_BATCHES,
        "attack_rate": ATTACK_RATE,
    },
    threads=1,
    uses_recipe=lambda variant: variant.startswith("vkd"),
    depends=lambda size, seed, variant: point_of(size, seed, variant) if variant in ON_ANSWERS else None,
)
