"""A whole unlearning run by every method: how long until the model has forgotten, and what is left.

Every method trains the visual weights of the same vanilla model, in a process of its own. Time is that of preparation
(loading, teacher features, saliency) and of steps, the median of several runs that do the same; saving and asking
questions on the way are not counted. There are two bars. `reached`: the first checkpoint whose forget accuracy lies
within 0.10 of chance, whatever is left of the rest. `kept`: the first such checkpoint with at least 95 % of the vanilla
model's accuracy on retained people. Baselines are tried gently, firmly and hastily, so that the quickest of them is not
slow for want of tuning, and VKD at three lengths.
"""

import json
import shutil
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from world import RECIPE, World

from fastvkd.demo.data import CHANCE
from fastvkd.models.loading import load_model
from fastvkd.unlearning.loop import unlearn
from study import Row, Study, share_columns
from study.ablation import FIXED

BAND, KEPT, SAMPLES, REPEATS = 0.10, 0.95, 504, 3
LONG = 10.0  # seconds; a run that takes longer is not repeated
OUTPUT_LEVEL = ("ga", "gd", "kl", "npo", "idk", "rmu", "mmunlearner")
# Forgetting alone, as fast as the objective allows.
QUICK = {
    **FIXED,
    "forget_target": "noise",
    "lambda_forget": 3.0,
    "lambda_retain": 4.0,
    "learning_rate": 2e-3,
    "per_device_train_batch_size": 8,
    "augment": False,
    "auxiliary_images": 0,
    "warmup_steps": 1,
}
CAREFUL = {
    **QUICK,
    "noise_images": "per_image",
    "learning_rate": 3e-3,
    "per_device_train_batch_size": 24,
    "auxiliary_images": 96,
    "auxiliary_share": 0.2,
    "warmup_steps": 5,
}


@dataclass(frozen=True)
class Plan:
    """One way to use a method. lengths: by the demo's size, steps of the run and steps between two checkpoints."""

    method: str
    what: str  # tells its settings apart
    overrides: dict[str, Any]
    lengths: dict[str, tuple[int, int]]
    config: str | None = None


def output_level(method: str, rate: float, retain: float, batch: int, lengths: dict[str, tuple[int, int]]) -> Plan:
    overrides = {
        "method": method,
        "learning_rate": rate,
        "lambda_retain": retain,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": batch,
    }
    return Plan(method, f"lr {rate:g}, lambda {retain:g}, {batch} images a step", overrides, lengths)


USUAL, HASTY = {"default": (80, 2), "tiny": (20, 10)}, {"default": (40, 1), "tiny": (10, 5)}
TRIES = ((1e-4, 1.0, 16, USUAL), (3e-4, 4.0, 16, USUAL), (1e-3, 4.0, 8, HASTY))
CACHED = "noise, no views, cached teacher"
PLANS = (
    Plan("vkd", f"{RECIPE}: a stranger", {}, {"default": (900, 20), "tiny": (90, 100)}, RECIPE),
    Plan("vkd", f"careful: {CACHED}", CAREFUL, {"default": (44, 1), "tiny": (20, 5)}, RECIPE),
    Plan("vkd", f"quick: {CACHED}", QUICK, {"default": (4, 1), "tiny": (10, 5)}, RECIPE),
    *(output_level(method, *how) for method in OUTPUT_LEVEL for how in TRIES),
)
VARIANTS = {f"{plan.method}: {plan.what}": plan for plan in PLANS}


def at_the_bar(point: Row) -> bool:
    return abs(point["forget"] - CHANCE) <= BAND


def measure(world: World, variant: str) -> Row:
    """One row of the table; times are medians over the runs."""
    plan = VARIANTS[variant]
    steps, every = plan.lengths[world.size]
    folder = world.out / "end-to-end" / variant.replace(" ", "-").replace("/", "-")
    along = {"max_steps": steps, "save_steps": every, "save_total_limit": steps // every + 1}
    # A cache of its own: teacher features are part of the price.
    own = {"cache_dir": str(folder / "teacher_cache")}
    settings = world.settings(folder, {**along, **plan.overrides, **own}, config=plan.config)
    prepare, per_step = [], []
    for _ in range(REPEATS):
        shutil.rmtree(folder, ignore_errors=True)
        run = unlearn(settings)
        lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
        prepare.append(run.seconds["prepare"])
        per_step.append([sum(value for key, value in line.items() if key.endswith("_seconds")) for line in lines])
        if prepare[0] + sum(per_step[0]) > LONG:
            break
    preparation, times = statistics.median(prepare), [statistics.median(t) for t in zip(*per_step, strict=True)]
    vanilla = world.accuracy(load_model(world.vanilla), SAMPLES, ("retain",))["retain"]
    images = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    curve = way(world, folder, lambda step: (preparation + sum(times[:step]), step * images), KEPT * vanilla)
    return {
        "method": plan.method,
        "what": plan.what,
        "seconds": preparation + sum(times),
        "seconds_prepare": preparation,
        "ms_per_step": 1e3 * sum(times) / len(times),
        "images": run.images_seen,
        "peak_memory_bytes": run.peak_memory_bytes,
        "repeats": len(per_step),
        "vanilla_retain": vanilla,
        "reached": next(filter(at_the_bar, curve), None),
        "kept": next((p for p in curve if at_the_bar(p) and p["retain"] >= KEPT * vanilla), None),
        "curve": curve,
        "final": world.accuracy(world.at(run.checkpoint)),
    }


def way(world: World, folder: Path, price: Callable[[int], tuple[float, int]], enough: float) -> list[Row]:
    """What checkpoints know, up to the first that has forgotten and kept `enough`; `price(step)`: (s, images)."""
    curve: list[Row] = []
    saved = sorted(int(f.name.removeprefix("checkpoint-")) for f in folder.glob("checkpoint-*"))
    for step in dict.fromkeys([*saved[:10], *saved[10::4], saved[-1]]):  # asking takes longer than training
        seconds, images = price(step)
        point: Row = {"step": step, "seconds": seconds, "images": images}
        model = world.at(folder / f"checkpoint-{step}")
        point |= world.accuracy(model, SAMPLES, ("forget",))
        curve.append(point)
        if at_the_bar(point):
            point |= world.accuracy(model, SAMPLES, ("retain",))
            kept = point["retain"] >= enough
            if kept or not any(at_the_bar(p) for p in curve[:-1]):
                point |= world.accuracy(model, SAMPLES, ("test", "realworld"))
            if kept:
                break
    return curve


def note(report: dict[str, Any]) -> list[str]:
    row, bar = report["rows"][0], report["bar"]
    return [
        f"Seed {row['seed']}, size {row['size']}. Forgotten: forget VQA within {bar['band']:.2f} of chance "
        f"({bar['chance']:.2f}), asked of {bar['samples']} questions every few steps; asking is not counted as time. "
        f"Kept: that, and retain VQA at least {bar['kept']:.0%} of the {100 * row['vanilla_retain']:.1f} before. Times "
        f"are medians of {report['repeats']} runs, of long ones a single run's."
    ]


def at(bar: str, text: Callable[[Row], str]) -> Callable[[Row], str]:
    return lambda row: text(row[bar]) if row[bar] else "-"


STUDY = Study(
    about="A whole run",
    variants=VARIANTS,
    row=measure,
    note=note,
    columns={
        "method": lambda row: row["method"],
        "settings": lambda row: row["what"],
        "s until forgotten": at("reached", lambda point: f"{point['seconds']:.1f}"),
        "steps to it": at("reached", lambda point: f"{point['step']}"),
        "images": at("reached", lambda point: f"{point['images']}"),
        "retain there": at("reached", lambda point: f"{100 * point['retain']:.1f}"),
        "s until kept": at("kept", lambda point: f"{point['seconds']:.1f}"),
        "steps to that": at("kept", lambda point: f"{point['step']}"),
        "s in all": lambda row: f"{row['seconds']:.1f}",
        "ms/step": lambda row: f"{row['ms_per_step']:.0f}",
        "peak MB": lambda row: f"{row['peak_memory_bytes'] / 1e6:.0f}",
        **share_columns(lambda row: row["final"]),
    },
    protocol=lambda: {"repeats": REPEATS, "bar": {"chance": CHANCE, "band": BAND, "kept": KEPT, "samples": SAMPLES}},
    seeds=(0,),
    fresh=True,
    uses_recipe=lambda variant: VARIANTS[variant].config is not None,
)
