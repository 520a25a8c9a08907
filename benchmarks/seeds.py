"""The demo over several seeds, and VKD beside gradient ascent with retain at equal forgetting.

    python benchmarks/seeds.py --seeds 0 1 2 --json benchmarks/results/seeds.json

Gradient ascent with retain (`method: gd`, `-l_f + lambda l_r` on answers, the same weights) is followed along its way,
with lambda 1 as published and with 4. For each lambda the point counts that has the best retained accuracy among those
whose forget accuracy is within 0.10 of chance, or, where there is none, is the nearest to it.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from world import World, write

from fastvkd.data.demo_data import CHANCE
from fastvkd.demo.run import demo
from fastvkd.environment import measured_on

LAMBDAS = (1.0, 4.0)
STEPS, EVERY = 160, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/seeds.json"))
    parser.add_argument("--out", type=Path, default=Path("out/seeds"))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--learning-rates", type=float, nargs="*", default=[1e-4], help="of gradient ascent")
    parser.add_argument("--skip-gradient-ascent", action="store_true")
    arguments = parser.parse_args()
    rows = []
    for seed in arguments.seeds:
        report = demo(arguments.out / f"demo-{seed}", seed=seed)
        row: dict[str, Any] = {"seed": seed, "seconds": report["seconds"]}
        for name in ("vanilla", "unlearned"):
            row[name] = {c: {k: f["accuracy"] for k, f in kinds.items()} for c, kinds in report[name].items()}
        row["language_model_unchanged"] = len(set(report["language_model_sha256"].values())) == 1
        row["relearning"] = report["relearning"]
        if not arguments.skip_gradient_ascent:
            row["gradient_ascent"] = gradient_ascent(World(seed, arguments.out), arguments.learning_rates)
        rows.append(row)
        print(json.dumps(row), flush=True)
        write(arguments.json, {**measured_on("cpu"), "rows": rows})
    arguments.json.with_suffix(".md").write_text(table(rows))


def gradient_ascent(world: World, learning_rates: list[float]) -> dict[str, Any]:
    """Every point of the runs, and for each lambda the one at equal forgetting."""
    points: list[dict[str, Any]] = []
    settings_tried = [{"learning_rate": lr, "lambda_retain": weight} for weight in LAMBDAS for lr in learning_rates]
    for setting in settings_tried:
        overrides = {"method": "gd", "per_device_train_batch_size": 32, **setting}
        for step, model, _ in world.follow(overrides, steps=STEPS, every=EVERY):
            points.append({**setting, "step": step, **world.accuracy(model, max_samples=504)})
            print("  gd", json.dumps(points[-1]), flush=True)
    return {"chosen": [best([p for p in points if p["lambda_retain"] == w]) for w in LAMBDAS], "points": points}


def best(points: list[dict[str, Any]]) -> dict[str, Any]:
    """The point of equal forgetting, see above."""
    forgot = [p for p in points if abs(p["forget"] - CHANCE) <= 0.10]
    if forgot:
        return max(forgot, key=lambda p: p["retain"])
    return min(points, key=lambda p: abs(p["forget"] - CHANCE))


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| seed | model | forget VQA | test VQA | retain VQA | real-world VQA | text QA, worst set | LLM unchanged |",
        "|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        for name in ("vanilla", "unlearned"):
            cells = [row[name][c]["vqa"] for c in ("forget", "test", "retain", "realworld")]
            worst = min(kinds["qa"] for kinds in row[name].values())
            unchanged = "" if name == "vanilla" else ("yes" if row["language_model_unchanged"] else "NO")
            figures = " | ".join(f"{100 * v:.1f}" for v in [*cells, worst])
            lines.append(f"| {row['seed']} | {name} | {figures} | {unchanged} |")
        for p in row["gradient_ascent"]["chosen"] if "gradient_ascent" in row else ():
            cells = " | ".join(f"{100 * p[c]:.1f}" for c in ("forget", "test", "retain", "realworld"))
            name = f"GA + retain (lr {p['learning_rate']:g}, lambda {p['lambda_retain']:g}, {p['step']} steps)"
            lines.append(f"| {row['seed']} | {name} | {cells} | | yes |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
