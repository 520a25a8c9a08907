"""The demo over several seeds: what it reports, in one table.

    python benchmarks/seeds.py --seeds 0 1 2

Vanilla and gold models are those of the demo's cache, trained first where there are none.
"""

import argparse
import json
from pathlib import Path

from world import command, write

from fastvkd.demo.run import demo
from fastvkd.environment import measured_on

MODELS = ("vanilla", "gold", "unlearned")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/seeds.json"))
    parser.add_argument("--out", type=Path, default=Path("out/seeds"))
    parser.add_argument("--size", default="default", help="default or tiny")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    arguments = parser.parse_args()
    rows = []
    for seed in arguments.seeds:
        report = demo(arguments.out / f"demo-{seed}", size=arguments.size, seed=seed, gold=True)
        kept = ("seconds", "peak_memory_bytes", "language_model_sha256", "relearning_auc")
        row = {"seed": seed, **{key: report[key] for key in kept}, "certificate": report["certificate"]["verdict"]}
        for name in MODELS:
            row[name] = {c: {k: f["accuracy"] for k, f in kinds.items()} for c, kinds in report[name].items()}
        rows.append(row)
        print(json.dumps(row), flush=True)
        write(arguments.json, {**measured_on("cpu"), "command": command(__file__), "rows": rows})
    arguments.json.with_suffix(".md").write_text(table(rows))


def table(rows: list[dict]) -> str:
    """Markdown: a line for each seed and model; figures in %."""
    lines = [
        "| seed | model | forget VQA | test VQA | retain VQA | real-world VQA | text QA, worst set "
        "| relearning AUC, visual / all | LLM unchanged | certificate | s to unlearn | s in all |",
        "|---:|---|---:|---:|---:|---:|---:|---:|---|---|---:|---:|",
    ]
    for row in rows:
        for name in MODELS:
            cells = [row[name][c]["vqa"] for c in ("forget", "test", "retain", "realworld")]
            worst = min(kinds["qa"] for kinds in row[name].values() if kinds["qa"] is not None)
            figures = " | ".join(f"{100 * v:.1f}" for v in [*cells, worst])
            areas = [row["relearning_auc"][weights].get(name) for weights in ("visual", "all")]
            auc = " / ".join(f"{100 * area:.1f}" for area in areas) if None not in areas else ""
            last = ["", "", "", ""]
            if name == "unlearned":
                unchanged = "yes" if len(set(row["language_model_sha256"].values())) == 1 else "NO"
                seconds = row["seconds"]
                last = [unchanged, row["certificate"], f"{seconds['unlearn']:.0f}", f"{sum(seconds.values()):.0f}"]
            lines.append(f"| {row['seed']} | {name} | {figures} | {auc} | {' | '.join(last)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
