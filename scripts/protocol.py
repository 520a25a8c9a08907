"""A published protocol from end to end: finetune, unlearn by every method, export, evaluate, attack, compare.

    python scripts/protocol.py mllmu llava-1.5-7b --data DATA --dry-run     # print the commands
    python scripts/protocol.py clear qwen2.5-vl-7b --data DATA --methods gd vkd

The recipe is configs/BENCHMARK-MODEL.yaml, for VKD configs/MODEL.yaml; everything is written below out/BENCHMARK-MODEL.
A command whose result stands there already is left out, so an interrupted protocol goes on where it stopped.
"""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("llava-1.5-7b", "qwen2.5-vl-7b")
# What a gold model, which never sees the forget set, is finetuned on; the vanilla one on the recipe's `finetune_split`.
GOLD_SPLIT = {"mllmu": "ft_Data-forget_5", "clear": "retain95+tofu"}
FINETUNE = ["method=finetune", "per_device_train_batch_size=4", "learning_rate=2.0e-5"]
METHODS = {  # on top of the recipe; four questions a batch, and four retained ones where a method has a retain side
    "ga": ["per_device_train_batch_size=4"],
    "gd": [],
    "kl": [],
    "npo": [],
    "undial": [],
    "pava": [],
    "idk": [],
    "rmu": ["rmu_layer=7"],
    "mmunlearner": ["trainable=vision+projector"],
    "kvw": ["trainable=all", "per_device_train_batch_size=2", "kvw_gamma=0.02", "kvw_batches=1000"],
    "smfa": ["trainable=vision+projector"],
    "manu": ["trainable=all"],
    "vkd": [],
}


@dataclass(frozen=True)
class Command:
    """The words of a command, and the file that stands when it is done."""

    words: list[str]
    makes: Path


def commands(
    benchmark: str, model: str, data: str, *, methods: Sequence[str] = tuple(METHODS), mode: str = "paper",
    train_data: str | None = None, attack: bool = True,
) -> Iterator[Command]:  # fmt: skip
    """The protocol's commands in order. `train_data`: the data that methods unlearn, where it is not `data`."""
    recipe, out = f"configs/{benchmark}-{model}.yaml", Path("out", f"{benchmark}-{model}")
    splits = yaml.safe_load((ROOT / recipe).read_text())
    forget, retain = splits["forget_split"], splits["retain_split"]
    asked = ["--data", data, "--forget-split", forget, "--retain-split", retain, "--bf16"]

    def train(name: str, config: str, source: str, *overrides: str) -> Iterator[Command]:
        run, whole = f"{out}/{name}", f"{out}/{name}-model"
        done = Path(whole, "config.json")
        words = ["fastvkd", "train", "--config", config, f"data={source}", f"output_dir={run}", *overrides]
        yield Command(words, done)
        yield Command(["fastvkd", "export", "--run", run, "--to", whole], done)

    def evaluate(name: str, *options: str) -> Command:
        folder = out / f"{name}-eval"
        words = ["fastvkd", "eval", "--model", f"{out}/{name}-model", *asked, "--mode", mode, *options]
        return Command([*words, "--out", str(folder)], folder / "results.json")

    yield from train("vanilla", recipe, data, *FINETUNE)
    yield from train("gold", recipe, data, *FINETUNE, f"finetune_split={GOLD_SPLIT[benchmark]}")
    yield evaluate("vanilla")
    yield evaluate("gold")
    # CLEAR measures the distance from the gold model; MLLMU-Bench in paper mode has no likelihoods to compare
    reference = ["--reference-eval", f"{out}/gold-eval"] if benchmark == "clear" else []
    for method in methods:
        config = f"configs/{model}.yaml" if method == "vkd" else recipe
        chosen = [f"forget_split={forget}", f"retain_split={retain}"] if method == "vkd" else [f"method={method}"]
        start = f"model_name_or_path={out}/vanilla-model"
        yield from train(method, config, train_data or data, start, *chosen, *METHODS[method])
        yield evaluate(method, *reference)
        if attack:
            models = ["--model", f"{out}/{method}-model", "--before", f"{out}/vanilla-model"]
            words = ["fastvkd", "attack", *models, "--gold", f"{out}/gold-model", *asked]
            yield Command([*words, "--out", f"{out}/{method}-attack"], out / f"{method}-attack" / "attacks.json")
    runs = [f"{out}/{name}-eval" for name in ("vanilla", "gold", *methods)]
    yield Command(["fastvkd", "compare", *runs, "--format", "latex"], out / "nothing")  # printed, and so never done


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("benchmark", choices=GOLD_SPLIT)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--data", required=True, help="the benchmark's folder")
    parser.add_argument("--train-data", help="what methods unlearn: of MLLMU-Bench, as published, baseline_train_split")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument(
        "--mode", choices=("paper", "corrected"), default="paper", help="docs/evaluation.md says what differs"
    )
    parser.add_argument("--no-attack", action="store_true")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and run none")
    a = parser.parse_args()
    options = {"methods": a.methods, "mode": a.mode, "train_data": a.train_data, "attack": not a.no_attack}
    # all of them now: training makes what the export after it makes
    left = [c for c in commands(a.benchmark, a.model, a.data, **options) if not (ROOT / c.makes).exists()]
    for command in left:
        print(shlex.join(command.words), flush=True)
        # 1: the attack's certificate was refused, which is a result
        if not a.dry_run and (code := subprocess.run(command.words, cwd=ROOT).returncode) > (
            command.words[1] == "attack"
        ):
            sys.exit(code)


if __name__ == "__main__":
    main()
