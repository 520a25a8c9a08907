"""What fits which card: training, export, evaluation and attacks, by plan. Nothing is measured and no GPU is needed.

    python benchmarks/fits.py        # writes benchmarks/results/fits.json; docs/distributed.md shows it

Training is the recipe of configs/llava-1.5-13b.yaml on each model, its LLM not quantised unless that is what fits.
"""

import json
import re
from pathlib import Path
from typing import Any

from fastvkd.devices import GIB
from fastvkd.planning.plan import plan
from fastvkd.settings import load_settings

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "fits.json"
MODELS = {"7B": "llava-1.5-7b", "13B": "llava-1.5-13b", "34B": "llava-v1.6-34b", "72B": "qwen2.5-vl-72b"}
CARDS = {"L4, 24 GB": ("L4", 1), "2 x L4": ("L4", 2), "L40S, 48 GB": ("L40S", 1), "H100, 80 GB": ("H100", 1)}
HEADS = {
    "train": r"^(fastvkd train|deepspeed --num_gpus \d+ fastvkd/train\.py) --config YAML( engine=deepspeed)?",
    "export": "^fastvkd export --run RUN --to merged",
    "eval": "^fastvkd eval --model merged --data DATA",
    "attack": "^fastvkd attack --model merged --before MODEL --data DATA",
}


def cells(model: str, gpu: str, cards: int) -> dict[str, str]:
    """By job: what its command says beside its head, GiB on each card, and in host memory where weights lie there."""
    told = {"data": "DATA", "model_name_or_path": model, "quantize_llm": "none"}
    found = plan(load_settings(ROOT / "configs" / "llava-1.5-13b.yaml", told), gpu=gpu, world_size=cards)
    best = found.recommendation
    jobs = {"train": cell("train", best["command"], max(best["memory_bytes"] or 0, 0), 0)}
    for job in found.jobs:
        jobs[job.name] = cell(job.name, job.command if job.fits else None, job.gpu_bytes, job.host_bytes)
    return jobs


def cell(name: str, command: str | None, gpu: int, host: int) -> str:
    if command is None:
        return "does not fit"
    rest = re.sub(HEADS[name], "", command).strip()
    kinds = ""
    if "--kind" in rest:
        rest, _, named = rest.partition("--kind")
        without = [kind for kind in ("relearn", "quantize", "perturb") if kind not in named.split()]
        listed = " and ".join([", ".join(without[:-1]), without[-1]] if without[1:] else without)
        rest, kinds = rest.strip(), f" all kinds but {listed},"
    where = "no GPU" if name == "export" else f"{gpu / GIB:.1f}"
    if host and name != "export":
        where += f", host {host / GIB:.0f}"
    return f"`{rest}`{kinds} {where}" if rest else f"{kinds} {where}".strip()


def report() -> dict[str, Any]:
    rows = []
    for size, model in MODELS.items():
        by_card = [cells(model, gpu, cards) for gpu, cards in CARDS.values()]
        rows += [[size, name, *(found[name] for found in by_card)] for name in HEADS]
    return {"tables": {"fits": {"head": ["model", "job", *CARDS], "rows": rows, "left": 6}}}


if __name__ == "__main__":
    RESULT.write_text(json.dumps(report(), indent=1) + "\n")
