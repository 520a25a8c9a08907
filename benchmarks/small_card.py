"""The whole job on a small card: a random model of real size is built, unlearned with its recipe, exported, evaluated
and attacked as `fastvkd plan` says for that card, and each phase's peak is written beside the planned one.

    python benchmarks/small_card.py --work /dev/shm/job --json out/small-card.json    # twice the model's bytes there

The script holds what a larger card has beyond `--gib`, so that commands find no more than a small one has. Weights are
random, so answers mean nothing, and runs are short; what goes through the model at once is what users' runs have.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from real_size import GIB, Job
from tables import ROOT

from fastvkd.demo.model import Shape
from fastvkd.engines.checkpoints import find_latest
from fastvkd.environment import measured_on
from fastvkd.planning.architecture import ARCHITECTURES
from fastvkd.planning.plan import Plan, plan
from fastvkd.settings import load_settings

HEAD = ["phase", "seconds", "GPU GiB", "planned", "host GiB", "what was done"]
STEPS = 12
# Shorter than a user's run, and as wide.
SHORT = {
    "stranger.steps": 2,
    "ends": "max_steps",
    "watch_steps": 0,
    "max_steps": STEPS,
    "warmup_steps": 0,
    "learning_rate": 1e-5,
    "save_steps": STEPS // 2,
    "save_total_limit": 1,
}
RELEARN = ["--kind", "relearn", "--shares", "1.0", "--steps", "0", "2", "--seeds", "0", "--learning-rates", "1e-4"]
RELEARN += ["--variants", "redrawn_projector", "--relearn-models", "unlearned"]
Row = tuple[float, float, str]


class SmallCardJob(Job):
    """The phases as `plan` recommends them for a card of so many GiB."""

    def __init__(self, work: Path, preset: str, facts: dict[str, Any], shape: Shape, device: str, gib: float) -> None:
        super().__init__(work, facts, shape, STEPS)
        self.preset, self.device, self.gib = preset, device, gib
        self.config = ROOT / "configs" / f"{preset}.yaml"
        self.on = ("--data", str(self.data_folder), "--device", device)

    def planned(self, **told: str) -> Plan:
        named = {"data": "DATA", "model_name_or_path": self.preset, "quantize_llm": "none"}
        return plan(load_settings(self.config, {**named, **told}), memory=f"{self.gib}GiB")

    @property
    def fitting(self) -> dict[str, str]:
        """What training is told so that it fits: `stranger.quantize=nf4`, say, for the search before it."""
        command = self.planned().recommendation["command"]
        return dict(word.split("=", 1) for word in command.split() if "=" in word)

    def command(self, log: str) -> list[str]:
        return [sys.executable, str(ROOT / "benchmarks" / "watched.py"), str(self.peak_file(log))]

    def peak_file(self, log: str) -> Path:
        return self.work / f"{log}.bytes"

    def train(self) -> Row:
        told = {
            "model_name_or_path": self.model,
            "data": self.data_folder,
            "forget_split": self.data.forget_split,
            "retain_split": self.data.retain_split,
            "output_dir": self.run,
            "engine": "local",
            "deepspeed": "null",
            "device": self.device,
            **self.fitting,
            **SHORT,
        }
        overrides = [f"{key}={value}" for key, value in told.items()]
        found = self.ran("train", "train", "--config", str(self.config), *overrides)
        lines = [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]
        rate = next((line["images_per_second"] for line in reversed(lines) if "images_per_second" in line), 0.0)
        latest = find_latest(self.run)
        assert latest is not None
        words = " ".join(f"{key}={value}" for key, value in self.fitting.items()) or "as the recipe is"
        return *found, f"{words}: search of 2 steps, {STEPS} updates, {rate:.0f} images/s, {latest.name}"

    def evaluate(self) -> Row:
        return self.judged_as("eval", "--max-samples", "16")

    def relearn(self) -> Row:
        return self.judged_as("attack", "--before", str(self.model), *RELEARN, "--max-samples", "64")

    def judged_as(self, name: str, *arguments: str) -> Row:
        """An evaluation or attack as the plan has it for this card."""
        told = self.job(name).command.partition("DATA")[2].split()
        if "--kind" in told:
            raise ValueError(f"{name}: {self.gib} GiB do not do for relearning")
        out = ("--out", str(self.work / f"{name}-out"))
        found = self.ran(name, name, "--model", str(self.merged), *self.on, *told, *arguments, *out, good=(0, 1))
        return *found, " ".join((*told, *arguments[-2:])) if told else "bfloat16"

    def job(self, name: str) -> Any:
        return next(job for job in self.planned().jobs if job.name == name)

    def expected(self, phase: str) -> float | None:
        """GiB by plan."""
        if phase == "train":
            return self.planned(**self.fitting).peak_bytes / GIB
        return self.job(phase).gpu_bytes / GIB if phase in ("eval", "attack") else None


PHASES: dict[str, Callable[[SmallCardJob], Row]] = {
    "build": SmallCardJob.build,
    "train": SmallCardJob.train,
    "export": SmallCardJob.export,
    "eval": SmallCardJob.evaluate,
    "attack": SmallCardJob.relearn,
}


def hold(gib: float) -> list[torch.Tensor]:
    """What keeps all of the card but `gib` from others; more than this process already takes."""
    free, total = torch.cuda.mem_get_info()
    beyond = total - int(gib * GIB)
    return [torch.empty(max(0, beyond - (total - free)), dtype=torch.uint8, device="cuda")]


def measure(job: SmallCardJob, result: Path, phases: list[str], origin: dict[str, Any]) -> None:
    """A row for each phase, on disk as soon as it has ended."""
    rows: list[list[str]] = []
    for phase in phases:
        seconds, host, done = PHASES[phase](job)
        file = job.peak_file(phase)
        allocated = f"{int(file.read_text()) / GIB:.1f}" if file.exists() and phase != "export" else ""
        expected = job.expected(phase)
        cells = [allocated, "" if expected is None else f"{expected:.1f}", f"{host:.1f}", done]
        rows.append([phase, f"{seconds:.0f}", *cells])
        tables = {"phases": {"head": HEAD, "rows": rows, "left": 1}}
        result.write_text(json.dumps({**origin, "tables": tables}, indent=1) + "\n")
        print(*rows[-1], sep=" | ", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--preset", default="llava-1.5-13b", choices=("llava-1.5-7b", "llava-1.5-13b"))
    parser.add_argument("--gib", type=float, default=22.5, help="of the card: what an L4 or an A10 has")
    parser.add_argument("--work", type=Path, required=True, help="a folder that does not exist yet")
    parser.add_argument("--phases", nargs="+", choices=list(PHASES), default=list(PHASES))
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    facts = json.loads((ARCHITECTURES / f"{options.preset}.json").read_text())
    facts.pop("name_or_path")
    origin = measured_on(torch.device("cuda")) | {"command": " ".join(["python", *sys.argv])}
    held = hold(options.gib)
    try:
        job = SmallCardJob(
            options.work, options.preset, facts, Shape(image_size=336, patch_size=14), "cuda", options.gib
        )
        measure(job, options.json, options.phases, origin)
    finally:
        del held
        shutil.rmtree(options.work, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
