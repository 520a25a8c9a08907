"""Whether MMUnlearner's mask helps to retain: gradient difference with and without it, otherwise alike, on the demo's
data.

    python benchmarks/mask.py --seeds 0 1 2 --jobs 2

writes benchmarks/results/mask.json and the table as Markdown beside it. Every run is asked every fifth step how many
forget and retained photos it still knows, until the first one whose forget accuracy lies within 0.10 of chance; the
retained accuracy there is what is compared. The published rule, F_forget / F_retain >= 1, lets another share of the
weights move on each seed, so the mask is also tried with a share that is the same on all, and that share is drawn at
random as well, which tells the choice of weights from their number. Learning rate and lambda are the same with
and without a mask; a masked run takes more steps.
"""

import argparse
import functools
import itertools
import json
import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from methods import prepare, world_of
from world import command, write

from fastvkd.data.demo_data import CHANCE
from fastvkd.environment import measured_on

STEPS, EVERY, BATCH, SAMPLES, BAND = 300, 5, 16, 504, 0.10
STRENGTHS = {
    "lr 2e-4, lambda 1": {"learning_rate": 2e-4, "lambda_retain": 1.0},
    "lr 4e-4, lambda 2": {"learning_rate": 4e-4, "lambda_retain": 2.0},
}
_FISHER = {"granularity": "weight", "batches": 32}
MASKS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "ratio at least 1": {**_FISHER, "threshold": 1.0},
    "highest ratio, half": {**_FISHER, "fraction": 0.5},
    "highest ratio, a fifth": {**_FISHER, "fraction": 0.2},
    "random, half": {**_FISHER, "fraction": 0.5, "score": "random"},
    "random, a fifth": {**_FISHER, "fraction": 0.2, "score": "random"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/mask.json"))
    parser.add_argument("--out", type=Path, default=Path("out/mask"))
    parser.add_argument("--size", default="default", help="default or tiny")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--masks", nargs="*", default=list(MASKS), choices=MASKS, metavar="MASK")
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    arguments = parser.parse_args()
    cases = itertools.product(arguments.seeds, STRENGTHS, arguments.masks)
    rows: list[dict[str, Any]] = []
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.jobs, spawned, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        list(pool.map(functools.partial(prepare, arguments.size, arguments.out), arguments.seeds))
        for future in as_completed([pool.submit(measure, arguments.size, arguments.out, *case) for case in cases]):
            row = future.result()
            rows = sorted([*rows, row], key=order)
            print(json.dumps({key: value for key, value in row.items() if key != "curve"}), flush=True)
            protocol = {"steps": STEPS, "every": EVERY, "batch": BATCH, "samples": SAMPLES, "band": BAND}
            write(arguments.json, {**measured_on("cpu"), "command": command(__file__), **protocol, "rows": rows})
    for folder in arguments.out.glob("process-*"):
        shutil.rmtree(folder)
    arguments.json.with_suffix(".md").write_text(table(rows))


def order(row: dict[str, Any]) -> tuple[int, int, int]:
    return list(STRENGTHS).index(row["strength"]), list(MASKS).index(row["mask"]), row["seed"]


def measure(size: str, out: Path, seed: int, strength: str, mask: str) -> dict[str, Any]:
    """One run: `curve` until the bar, and `reached`, its last point, or None where the bar was not reached."""
    world, chosen = world_of(size, out, seed), MASKS[mask]
    overrides = {"method": "gd", "per_device_train_batch_size": BATCH, **STRENGTHS[strength]}
    if chosen is not None:
        overrides["saliency"] = chosen
    row: dict[str, Any] = {"strength": strength, "mask": mask, "seed": seed, "reached": None, "curve": []}
    for step, model, run in world.follow(overrides, steps=STEPS, every=EVERY):
        point = {"step": step, **world.accuracy(model, SAMPLES, ("forget", "retain"))}
        row["share"] = run.trained_share
        row["curve"].append(point)
        if abs(point["forget"] - CHANCE) <= BAND:
            row["reached"] = {**point, **world.accuracy(model, SAMPLES, ("test", "realworld"))}
            break
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for each run; figures in %."""
    lines = [
        "| strength | mask | seed | weights that may move | steps to the bar | forget | test | retain | real world |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        at = row["reached"]
        figures = [f"{100 * at[cell]:.1f}" for cell in ("forget", "test", "retain", "realworld")] if at else ["-"] * 4
        steps = str(at["step"]) if at else f"> {row['curve'][-1]['step']}"
        cells = [row["strength"], row["mask"], str(row["seed"]), f"{100 * row['share']:.0f}", steps, *figures]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
