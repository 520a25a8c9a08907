"""Ablation of VKD on the demo data: site x forget target, with the gentle settings `COMMON` on top of
configs/demo.yaml; that file's own target, `saturate`, which acts in the projector, keeps that file's settings.

    python benchmarks/ablation.py --json benchmarks/results/ablation.json

writes the figures and, beside them, the table as Markdown.
"""

import argparse
import json
from pathlib import Path

from world import World, command, write

from fastvkd.environment import measured_on

SITES = ("vision:2", "vision:4", "projector", "llm:2", "llm:4")
TARGETS = ("noise", "mean", "redirect", "reference", "repel")
STEPS = 250
COMMON = {
    "learning_rate": 1e-3,
    "lambda_forget": 1.0,
    "lambda_retain": 4.0,
    "per_device_train_batch_size": 32,
    "auxiliary_share": 0.25,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/ablation.json"))
    parser.add_argument("--out", type=Path, default=Path("out/ablation"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sites", nargs="*", default=SITES)
    parser.add_argument("--targets", nargs="*", default=TARGETS)
    arguments = parser.parse_args()
    world = World(arguments.seed, arguments.out)
    rows = [{"site": "-", "target": "(vanilla)", "seconds": 0.0, **world.accuracy(load(world.vanilla))}]
    for target in (*arguments.targets, "saturate"):
        for site in arguments.sites if target != "saturate" else ("projector",):
            overrides = {"sites": {site: 1.0}, "forget_target": target, "max_steps": STEPS}
            if target != "saturate":
                overrides |= COMMON
            if target == "reference":
                overrides |= {"reference_model": str(world.gold()), "augment": False}
            if target == "repel":
                overrides |= {"repel_margin": 3.0}
            model, run = world.unlearn(overrides)
            rows.append({"site": site, "target": target, "seconds": run.seconds["unlearn"], **world.accuracy(model)})
            print(json.dumps(rows[-1]), flush=True)
            write(
                arguments.json,
                {**measured_on("cpu"), "command": command(__file__), "seed": arguments.seed, "rows": rows},
            )
    arguments.json.with_suffix(".md").write_text(table(rows))


def load(folder: Path):
    from fastvkd.models.loading import load_model

    return load_model(folder)


def table(rows: list[dict]) -> str:
    lines = [
        "| target | site | forget | test | retain | real world | seconds |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = " | ".join(f"{100 * row[name]:.1f}" for name in ("forget", "test", "retain", "realworld"))
        lines.append(f"| {row['target']} | {row['site']} | {cells} | {row['seconds']:.0f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
