"""What makes VKD resist relearning: worst-case training, null-space projection, masks, and sites.

Every row is one run of `STEPS` steps on one thread, then asked and attacked as in methods.py. `saturate` and the
gentle `noise` are those of ablation.py. `defences.py` tells what null space and worst case are.
"""

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from defences import ATTACK_RATE, MOMENT_BATCHES, defended
from world import World

from fastvkd.attacks.relearning import area_under_curve
from fastvkd.models.families import tower_depth
from fastvkd.models.loading import load_config
from fastvkd.settings import Settings
from fastvkd.unlearning.loop import unlearn
from study import Row, Study, percent, share_columns
from study.ablation import COMMON, SATURATE
from study.methods import ATTACK_SAMPLES, ATTACK_SHARE, SAMPLES

STEPS = {"noise": 300, "saturate": 800}  # of the latter fewer leave forget photos open
RECIPES: dict[str, dict[str, Any]] = {"noise": {"forget_target": "noise", **COMMON}, "saturate": SATURATE}


@dataclass(frozen=True)
class Variant:
    """What is added to a recipe. energy: the share of retained energy that updates keep clear of. attack_steps: of the
    simulated attacker. last_block: also supervise the tower's last block, with half the weight."""

    recipe: str
    energy: float | None = None
    attack_steps: int = 0
    last_block: bool = False
    overrides: dict[str, Any] = field(default_factory=dict)


def _half(granularity: str) -> dict[str, Any]:
    return {"saliency": {"granularity": granularity, "fraction": 0.5}}


VARIANTS = {
    "noise": Variant("noise"),
    "noise, null space of 99 %": Variant("noise", energy=0.99),
    "noise, null space of 99.9 %": Variant("noise", energy=0.999),
    "noise, null space of 99.99 %": Variant("noise", energy=0.9999),
    "noise, worst case of 1 step": Variant("noise", attack_steps=1),
    "noise, worst case of 3 steps": Variant("noise", attack_steps=3),
    "noise, null space of 99.9 %, worst case of 3 steps": Variant("noise", energy=0.999, attack_steps=3),
    "saturate": Variant("saturate"),
    "saturate, null space of 99.9 %": Variant("saturate", energy=0.999),
    "saturate, worst case of 1 step": Variant("saturate", attack_steps=1),
    "saturate, half of the neurons": Variant("saturate", overrides=_half("neuron")),
    "saturate, half of the weights": Variant("saturate", overrides=_half("weight")),
    "saturate, last block supervised too": Variant("saturate", last_block=True),
}


def measure(world: World, name: str) -> Row:
    """One row: the run, multiple choice on every set, and the relearning attack with visual and with all weights."""
    variant = VARIANTS[name]
    overrides = {**world.spec.overrides, **RECIPES[variant.recipe], **variant.overrides}
    overrides["max_steps"] = STEPS[variant.recipe]
    if variant.last_block:
        depth = tower_depth(load_config(str(world.vanilla)))
        overrides["sites"] = {"projector": 1.0, f"vision:{depth}": 0.5}
    with tempfile.TemporaryDirectory(dir=world.out) as folder:
        model, run = train(world, world.settings(Path(folder), {**overrides, "logging_steps": 1}), variant)
    curves = world.relearn(model, ATTACK_SHARE, ATTACK_SAMPLES)
    return {
        **run,
        "vqa": world.accuracy(model, min(SAMPLES, world.spec.max_samples)),
        "relearning_auc": {weights: area_under_curve(curve) for weights, curve in curves.items()},
        "curves": curves,
    }


def train(world: World, settings: Settings, variant: Variant) -> tuple[Any, Row]:
    """The whole model after a run with the variant's defences, and the run's figures."""
    with defended(energy=variant.energy, attack_steps=variant.attack_steps) as engines:
        run = unlearn(settings)
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    opened = [line["forget_open"] for line in lines if "forget_open" in line][-20:]
    space = engines[0].space
    figures = {
        # of the trained weights' degrees of freedom, those that a mask or the null space leaves
        "free_share": run.trained_share if space is None else space.free_share,
        "forget_open": sum(opened) / len(opened) if opened else None,  # of the last 20 batches' forget views
        "seconds": sum(run.seconds.values()),
    }
    return world.at(run.checkpoint), figures


def relearnt(weights: str) -> Callable[[Row], str]:
    def text(row: Row) -> str:
        after = {point["step"]: point["accuracy"] for point in row["curves"][weights]}
        return " / ".join(map(percent, (after[2], after[5], row["relearning_auc"][weights])))

    return text


STUDY = Study(
    about="Worst-case training, null space, masks, two sites",
    variants=VARIANTS,
    row=measure,
    columns={
        "recipe": lambda row: row["variant"],
        "seed": lambda row: row["seed"],
        "freedom": lambda row: percent(row["free_share"]),
        **share_columns(lambda row: row["vqa"]),
        "open": lambda row: percent(row["forget_open"]),
        "relearnt, visual weights: 2 steps / 5 / AUC": relearnt("visual"),
        "all weights: 2 steps / 5 / AUC": relearnt("all"),
        "seconds": lambda row: f"{row['seconds']:.0f}",
    },
    left=1,
    protocol=lambda: {
        "steps": STEPS,
        "samples": SAMPLES,
        "moment_batches": MOMENT_BATCHES,
        "attack_share": ATTACK_SHARE,
        "attack_samples": ATTACK_SAMPLES,
        "attack_rate": ATTACK_RATE,
        "recipes": {name: {"config": "configs/demo.yaml", **changes} for name, changes in RECIPES.items()},
    },
    seeds=(0,),
    by_seed=False,
    threads=1,
)
