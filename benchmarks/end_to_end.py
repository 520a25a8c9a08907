"""A whole unlearning run of the demo's data by every method: how long until the model has forgotten, and what is left.

    python benchmarks/end_to_end.py --json benchmarks/results/end-to-end.json

Every method trains the visual weights of the same vanilla model, in a process of its own. Time is that of preparation
(loading, teacher features, saliency) and of steps, the median of several runs that do the same; saving and asking
questions on the way are not counted. There are two bars. `reached`: the first checkpoint whose forget accuracy lies
within 0.10 of chance, whatever is left of the rest. `kept`: the first such checkpoint with at least 95 % of the vanilla
model's accuracy on retained people. Baselines are tried gently, firmly and hastily, so that the quickest of them is not
slow for want of tuning, and VKD at three lengths.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from world import World, command, write

from fastvkd.data.demo_data import CHANCE
from fastvkd.environment import measured_on
from fastvkd.models.loading import load_model
from fastvkd.unlearning.loop import unlearn

BAND, KEPT, SAMPLES = 0.10, 0.95, 504
LONG = 10.0  # seconds; a run that takes longer is not repeated
OUTPUT_LEVEL = ("ga", "gd", "kl", "npo", "idk", "rmu", "mmunlearner")
# Forgetting alone, as fast as the objective allows; relearning undoes it, which configs/demo.yaml is there to prevent.
QUICK = {
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


def recipes(size: str) -> list[dict[str, Any]]:
    """`method`, `what` tells its settings apart, `overrides`, `every` steps a checkpoint, and whose `config`."""
    steps, every = (80, 2) if size == "default" else (20, 10)
    robust, careful, quick, hasty = (800, 44, 4, 40) if size == "default" else (40, 20, 10, 10)
    demo = "configs/demo.yaml"
    found = [
        recipe("vkd", "configs/demo.yaml: closed against relearning", robust, 10 * every, {}, demo),
        recipe("vkd", "careful: noise, no views, cached teacher", careful, every // 2, CAREFUL, demo),
        recipe("vkd", "quick: noise, no views, cached teacher", quick, every // 2, QUICK, demo),
    ]
    tries = ((1e-4, 1.0, 16, steps, every), (3e-4, 4.0, 16, steps, every), (1e-3, 4.0, 8, hasty, every // 2))
    for method in OUTPUT_LEVEL:
        for rate, retain, batch, last, between in tries:
            overrides = {
                "method": method,
                "learning_rate": rate,
                "lambda_retain": retain,
                "lr_scheduler_type": "constant",
                "per_device_train_batch_size": batch,
            }
            what = f"lr {rate:g}, lambda {retain:g}, {batch} images a step"
            found.append(recipe(method, what, last, between, overrides, None))
    return found


def recipe(
    method: str, what: str, steps: int, every: int, overrides: dict[str, Any], config: str | None
) -> dict[str, Any]:
    return {
        "method": method,
        "what": what,
        "overrides": {"max_steps": steps, "save_steps": every, "save_total_limit": steps // every + 1, **overrides},
        "config": config,
    }


def measure(world: World, plan: dict[str, Any], repeats: int, vanilla: float) -> dict[str, Any]:
    """One row of the table; times are medians over `repeats` runs. `vanilla` is the model's accuracy on retained people
    before."""
    folder = world.out / "end-to-end" / f"{plan['method']}-{plan['what'].replace(' ', '-').replace('/', '-')}"
    # A cache of its own: teacher features are part of the price.
    overrides = {**plan["overrides"], "cache_dir": str(folder / "teacher_cache")}
    settings = world.settings(folder, overrides, config=plan["config"])
    prepare, per_step = [], []
    for _ in range(repeats):
        shutil.rmtree(folder, ignore_errors=True)
        run = unlearn(settings)
        lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
        prepare.append(run.seconds["prepare"])
        per_step.append([sum(value for key, value in line.items() if key.endswith("_seconds")) for line in lines])
        if prepare[0] + sum(per_step[0]) > LONG:
            break
    preparation, steps = statistics.median(prepare), [statistics.median(times) for times in zip(*per_step, strict=True)]
    images = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    curve: list[dict[str, Any]] = []
    saved = sorted(int(f.name.removeprefix("checkpoint-")) for f in folder.glob("checkpoint-*"))
    for step in dict.fromkeys([*saved[:10], *saved[10::4], saved[-1]]):  # asking takes longer than training
        point = {
            "step": step,
            "seconds": preparation + sum(steps[:step]),
            "images": step * images,
        }
        model = world.at(folder / f"checkpoint-{step}")
        point |= world.accuracy(model, SAMPLES, ("forget",))
        curve.append(point)
        if at_the_bar(point):
            point |= world.accuracy(model, SAMPLES, ("retain",))
            kept = point["retain"] >= KEPT * vanilla
            if kept or not any(at_the_bar(p) for p in curve[:-1]):
                point |= world.accuracy(model, SAMPLES, ("test", "realworld"))
            if kept:
                break
    return {
        "method": plan["method"],
        "what": plan["what"],
        "seconds": preparation + sum(steps),
        "seconds_prepare": preparation,
        "ms_per_step": 1e3 * sum(steps) / len(steps),
        "images": run.images_seen,
        "peak_memory_bytes": run.peak_memory_bytes,
        "repeats": len(per_step),
        "reached": next(filter(at_the_bar, curve), None),
        "kept": next((p for p in curve if at_the_bar(p) and p["retain"] >= KEPT * vanilla), None),
        "curve": curve,
        "final": world.accuracy(world.at(run.checkpoint)),
    }


def at_the_bar(point: dict[str, Any]) -> bool:
    return abs(point["forget"] - CHANCE) <= BAND


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/end-to-end.json"))
    parser.add_argument("--out", type=Path, default=Path("out/end-to-end"))
    parser.add_argument("--size", default="default", help="default or tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=3, help="runs of which times are the median")
    parser.add_argument("--methods", nargs="*", help="only these")
    parser.add_argument("--vanilla", type=float, help=argparse.SUPPRESS)  # its accuracy on retained people
    parser.add_argument("--only", type=int, metavar="N", help=argparse.SUPPRESS)  # one recipe, in this process
    arguments = parser.parse_args()
    plans = recipes(arguments.size)
    if arguments.only is not None:
        world = World(arguments.seed, arguments.out, size=arguments.size)
        write(arguments.json, measure(world, plans[arguments.only], arguments.repeats, arguments.vanilla))
        return
    world = World(arguments.seed, arguments.out, size=arguments.size)  # trains the vanilla model, outside every clock
    vanilla = world.accuracy(load_model(world.vanilla), SAMPLES, ("retain",))["retain"]
    report: dict[str, Any] = {
        "benchmark": "end_to_end",
        **measured_on("cpu"),
        "command": command(__file__),
        "seed": arguments.seed,
        "size": arguments.size,
        "repeats": arguments.repeats,
        "bar": {"chance": CHANCE, "band": BAND, "kept": KEPT, "vanilla_retain": vanilla, "samples": SAMPLES},
        "rows": [],
        "failed": [],
    }
    part = arguments.out / "row.json"
    for number, plan in enumerate(plans):
        if arguments.methods is not None and plan["method"] not in arguments.methods:
            continue
        options = ["--only", str(number), "--json", str(part), "--out", str(arguments.out)]
        options += ["--size", arguments.size, "--seed", str(arguments.seed), "--repeats", str(arguments.repeats)]
        options += ["--vanilla", str(vanilla)]
        done = subprocess.run([sys.executable, __file__, *options], capture_output=True, text=True)
        name = f"{plan['method']} ({plan['what']})"
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
            report["failed"].append({"method": plan["method"], "what": plan["what"], "reason": reason})
            print(f"{name}: failed: {reason}", flush=True)
        else:
            row = json.loads(part.read_text())
            report["rows"].append(row)
            when = [f"{row[bar]['seconds']:.1f} s" if row[bar] else "never" for bar in ("reached", "kept")]
            print(f"{name}: forgotten after {when[0]}, with 95 % kept {when[1]}; final {row['final']}", flush=True)
        write(arguments.json, report)
    sys.exit(1 if report["failed"] else 0)


if __name__ == "__main__":
    main()
