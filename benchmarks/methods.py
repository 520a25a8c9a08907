"""Every method on the demo's data: forgetting, retention, text, and how well each resists relearning.

    python benchmarks/methods.py --seeds 0 1 2 --jobs 2

writes benchmarks/results/methods.json, row by row (finished rows are kept when it is run again), and the table as
Markdown beside it; `--markdown` only prints that table. A row is one method at its best point of the grid below: the
best retained accuracy among the points whose forget accuracy is within 0.10 of chance, or, where there is none, the
nearest to it. Points are judged on a sample of questions about forget and retain photos, the chosen one on all sets.
Seconds and images are those of the chosen point alone; a run that is followed along its way counts in proportion to its
steps. Steered models are attacked with the steering on.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from world import World, command, write

from fastvkd.attacks.relearning import area_under_curve
from fastvkd.data.demo_data import CHANCE
from fastvkd.demo.run import SIZES
from fastvkd.environment import measured_on
from fastvkd.evaluation.protocol import evaluate_cells
from fastvkd.models.families import all_parameters, family_of, visual_parameters
from fastvkd.models.loading import load_model
from fastvkd.paths import shipped
from fastvkd.settings import Settings
from fastvkd.unlearning.methods import steering

# Each method's grid. Runs of output-level methods are followed along their way: every `EVERY` steps are a point.
STEPS, EVERY, BATCH = 80, 20, 16
_GENTLE_TO_FIRM = (
    {"learning_rate": 1e-4, "lambda_retain": 1.0},
    {"learning_rate": 2e-4, "lambda_retain": 4.0},
    {"learning_rate": 3e-4, "lambda_retain": 1.0},
)
GRID: dict[str, tuple[dict[str, Any], ...]] = {
    "vanilla": ({},),
    "gold": ({},),
    "ga": ({"learning_rate": 1e-5}, {"learning_rate": 3e-5}, {"learning_rate": 1e-4}),
    "gd": _GENTLE_TO_FIRM,
    "kl": _GENTLE_TO_FIRM,
    "npo": _GENTLE_TO_FIRM,
    "idk": ({"learning_rate": 1e-4}, {"learning_rate": 3e-4}),
    "rmu": ({"learning_rate": 3e-4, "rmu_scale": 6.5}, {"learning_rate": 1e-3, "rmu_scale": 20.0}),
    "mmunlearner": _GENTLE_TO_FIRM,
    "gd-lora": (
        {"learning_rate": 3e-4, "lambda_retain": 1.0, "trainable": "lora"},
        {"learning_rate": 1e-3, "lambda_retain": 4.0, "trainable": "lora"},
    ),
    "manu": tuple({"manu_fraction": fraction} for fraction in (0.01, 0.02, 0.05, 0.1, 0.2, 0.4)),
    "steering": ({"layers": (1,)}, {"layers": (2,)}),  # each at every one of `STRENGTHS`
    "vkd": ({},),  # configs/demo.yaml as it is
}
STRENGTHS = (4.0, 8.0, 16.0, 32.0, 64.0)
GRID_SAMPLES = 160  # questions a set, to choose the point
SAMPLES = 504  # questions a set and kind, of the chosen point
ATTACK_SHARE, ATTACK_SAMPLES = 0.2, 168
NAMES = {
    "ga": "GA",
    "gd": "GD (GA + retain)",
    "kl": "KL-min",
    "npo": "NPO",
    "idk": "IDK",
    "rmu": "RMU",
    "mmunlearner": "MMUnlearner",
    "gd-lora": "GD, LoRA on the LLM",
    "manu": "MANU",
    "steering": "steering (MLLMEraser)",
    "vkd": "**VKD**",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/methods.json"))
    parser.add_argument("--out", type=Path, default=Path("out/methods"))
    parser.add_argument("--size", default="default", choices=SIZES)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="*", default=list(GRID), choices=GRID, metavar="METHOD")
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--markdown", action="store_true", help="print the table of finished rows and do nothing else")
    arguments = parser.parse_args()
    rows = json.loads(arguments.json.read_text())["rows"] if arguments.json.exists() else []
    if arguments.markdown:
        print(table(rows), end="")
        return
    wanted = [(seed, method) for seed in arguments.seeds for method in arguments.methods]
    done = {row["key"] for row in rows}
    missing = [task for task in wanted if key(arguments.size, *task) not in done]
    with ProcessPoolExecutor(
        arguments.jobs, multiprocessing.get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        list(pool.map(functools.partial(prepare, arguments.size, arguments.out), sorted({seed for seed, _ in missing})))
        futures = [pool.submit(measure, arguments.size, arguments.out, *task) for task in missing]
        for future in as_completed(futures):
            row = future.result()
            rows = [r for r in rows if (r["seed"], r["method"], r["size"]) != (row["seed"], row["method"], row["size"])]
            rows.append(row)
            rows.sort(key=lambda r: (r["seed"], list(GRID).index(r["method"])))
            write(
                arguments.json,
                {
                    **measured_on("cpu"),
                    "command": command(__file__),
                    "threads_a_job": 1,
                    "jobs": arguments.jobs,
                    "rows": rows,
                },
            )
            print(json.dumps({k: v for k, v in row.items() if k not in ("points", "curves")}), flush=True)
    for folder in arguments.out.glob("process-*"):
        shutil.rmtree(folder)
    arguments.json.with_suffix(".md").write_text(table(rows))


def key(size: str, seed: int, method: str) -> str:
    """What a finished row depends on."""
    recipe = shipped("configs/demo.yaml").read_text() if method == "vkd" else ""
    measured = [STRENGTHS, STEPS, EVERY, BATCH, GRID_SAMPLES, SAMPLES, ATTACK_SHARE, ATTACK_SAMPLES]
    facts = [size, repr(SIZES[size]), seed, method, GRID[method], recipe, measured]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def prepare(size: str, out: Path, seed: int) -> None:
    """Train the vanilla model, so that no two processes do (the gold one is only asked for by its own row)."""
    world_of(size, out, seed)


@functools.lru_cache(maxsize=1)
def world_of(size: str, out: Path, seed: int) -> World:
    """The data of a seed, in a folder of this process alone."""
    return World(seed, out / f"process-{os.getpid()}", size=size)


def measure(size: str, out: Path, seed: int, method: str) -> dict[str, Any]:
    """One row: the method's grid, and everything about its best point."""
    world = world_of(size, out, seed)
    points, models = [], []
    for point, model in candidates(world, method):
        if method not in ("vanilla", "gold", "vkd"):  # which have nothing to choose
            point |= world.accuracy(model, GRID_SAMPLES, cells=("forget", "retain"))
        points.append(point)
        models.append(model)
    chosen = best(points) if len(points) > 1 else points[0]
    model = models[next(i for i, point in enumerate(points) if point is chosen)]
    figures = evaluate_cells(
        model,
        world.processor,
        world.cells,
        batch_size=64,
        seed=seed,
        max_samples=min(SAMPLES, world.spec.max_samples),
        tasks=("choice",),
        photos=world.prepared,
    )
    curves = world.relearn(model, ATTACK_SHARE, ATTACK_SAMPLES)
    return {
        "key": key(size, seed, method),
        "size": size,
        "seed": seed,
        "method": method,
        "setting": {k: v for k, v in chosen.items() if k not in ("forget", "retain", "seconds", "images")},
        "vqa": {cell: kinds["vqa"]["accuracy"] for cell, kinds in figures.items()},
        "text_qa_worst": min(k["qa"]["accuracy"] for k in figures.values() if k["qa"]["accuracy"] is not None),
        "language_model_unchanged": same_language_model(model, world),
        "relearning_auc": {weights: area_under_curve(curve) for weights, curve in curves.items()},
        "unlearning_seconds": chosen["seconds"],
        "images_seen": chosen["images"],
        "curves": curves,
        "points": points if len(points) > 1 else [],
    }


def best(points: list[dict[str, Any]]) -> dict[str, Any]:
    """The point of equal forgetting, see above."""
    forgot = [p for p in points if abs(p["forget"] - CHANCE) <= 0.10]
    if forgot:
        return max(forgot, key=lambda p: p["retain"])
    return min(points, key=lambda p: abs(p["forget"] - CHANCE))


def candidates(world: World, method: str) -> Iterator[tuple[dict[str, Any], Any]]:
    """Every point of the method's grid with its model; `seconds` and `images` are what it took to get there."""
    if method in ("vanilla", "gold"):
        yield {"seconds": None, "images": None}, load_model(world.vanilla if method == "vanilla" else world.gold())
        return
    for setting in GRID[method]:
        if method == "vkd":
            model, run = world.unlearn(world.spec.overrides)
            yield {"seconds": sum(run.seconds.values()), "images": run.images_seen}, model
        elif method == "steering":
            yield from steered(world, setting)
        elif method == "manu":
            model, run = world.unlearn({"method": method, "per_device_train_batch_size": BATCH, **setting}, config=None)
            looked_at = Settings().manu_batches * BATCH  # to choose neurons
            yield {**setting, "seconds": sum(run.seconds.values()), "images": looked_at}, model
        else:
            overrides = {"method": method.removesuffix("-lora"), "per_device_train_batch_size": BATCH, **setting}
            for step, model, run in world.follow(overrides, steps=STEPS, every=EVERY):
                seconds = run.seconds["prepare"] + run.seconds["unlearn"] * step / STEPS
                yield {**setting, "step": step, "seconds": seconds, "images": step * BATCH}, model


def steered(world: World, setting: dict[str, Any]) -> Iterator[tuple[dict[str, Any], Any]]:
    """The vanilla model with hooks that stay on: one fit, at every strength."""
    started = time.perf_counter()
    vanilla, sides = load_model(world.vanilla), (world.cells["forget"], world.cells["retain"])
    vector = steering.fit(vanilla, world.processor, *sides, seed=world.seed, **setting)
    seconds = time.perf_counter() - started
    for strength in STRENGTHS:
        model = load_model(world.vanilla)
        steering.attach(model, dataclasses.replace(vector, strength=strength))
        images = 3 * steering.QUESTIONS  # photo, noise, retained
        yield {**setting, "strength": strength, "seconds": seconds, "images": images}, model


def same_language_model(model: Any, world: World) -> bool:
    """Whether every weight of the LLM and its head is the vanilla model's, bit for bit."""
    family = family_of(model)
    visual = {name for name, _ in visual_parameters(model, family, "vision+projector")}
    before = dict(load_model(world.vanilla).named_parameters())
    return all(torch.equal(p, before[name]) for name, p in all_parameters(model, family) if name not in visual)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for each seed and method; figures in %, `relearning_gap` in points."""
    gold = {(r["size"], r["seed"]): r["relearning_auc"] for r in rows if r["method"] == "gold"}
    lines = [
        "| seed | method | forget VQA | test VQA | retain VQA | real-world VQA | text QA, worst set | LLM unchanged "
        "| relearning AUC, visual / all | relearning gap, visual / all | seconds | images |",
        "|---:|---|---:|---:|---:|---:|---:|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = [row["vqa"][cell] for cell in ("forget", "test", "retain", "realworld")]
        figures = " | ".join(f"{100 * value:.1f}" for value in [*cells, row["text_qa_worst"]])
        areas = row["relearning_auc"]
        reference = gold.get((row["size"], row["seed"]))
        gap = " / ".join(f"{100 * (areas[w] - reference[w]):+.1f}" for w in areas) if reference else ""
        setting = ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in row["setting"].items())
        name = NAMES.get(row["method"], row["method"]) + (f" ({setting})" if setting else "")
        seconds = "" if row["unlearning_seconds"] is None else f"{row['unlearning_seconds']:.0f}"
        images = "" if row["images_seen"] is None else f"{row['images_seen']:,}"
        unchanged = "" if row["method"] in ("vanilla", "gold") else ("yes" if row["language_model_unchanged"] else "NO")
        auc = " / ".join(f"{100 * area:.1f}" for area in areas.values())
        shown = gap if row["method"] != "gold" else ""
        lines.append(f"| {row['seed']} | {name} | {figures} | {unchanged} | {auc} | {shown} | {seconds} | {images} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
