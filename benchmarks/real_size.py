"""The whole job at real size on a CPU: a random LLaVA-1.5-7B in the published layout is built, trained, killed,
resumed, exported, evaluated and attacked, and each phase's wall time and peak memory are written down.

    python benchmarks/real_size.py --work FOLDER    # 45 GB of disk there; all is deleted at the end

Weights are random, so answers mean nothing; loading, memory and writing are those of the real model. A row is written
to benchmarks/results/real-size.json as soon as its phase has ended, and phases that have one are not run again.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from tables import ROOT
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

from fastvkd.data import mllmu
from fastvkd.demo.data import make_demo_data
from fastvkd.demo.model import Shape, build_processor
from fastvkd.engines.checkpoints import find_latest, load_weights
from fastvkd.engines.exporting import match_keys
from fastvkd.environment import measured_on
from fastvkd.models.shards import read_safetensors_header, shards_of

RESULT = ROOT / "benchmarks" / "results" / "real-size.json"
GIB = 1024**3
SHARDS = 3
_CLIP_PREFIX = "vision_tower.vision_model."
HEAD = ["phase", "seconds", "peak GiB", "what was checked"]
NOTE = "Other work ran on the machine, so seconds are upper bounds. Peak: resident memory of all processes together."


def published_name(name: str) -> str:
    """The key under which LLaVA-1.5's published files hold the weight that transformers now calls `name`."""
    name = name.removeprefix("model.")
    if name.startswith("vision_tower.") and not name.startswith(_CLIP_PREFIX):
        return _CLIP_PREFIX + name.removeprefix("vision_tower.")
    if name.startswith("language_model."):
        return "language_model.model." + name.removeprefix("language_model.")
    return "language_model." + name if name.startswith("lm_head.") else name


def build(folder: Path, facts: dict[str, Any], processor: Any) -> None:
    """Write random float16 weights in `SHARDS` shards, piece by piece, so that memory holds little of them."""
    folder.mkdir(parents=True)
    config: Any = AutoConfig.for_model(**facts)
    config.image_token_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    config.text_config.pad_token_id = processor.tokenizer.pad_token_id
    with torch.device("meta"):
        weights = AutoModelForImageTextToText.from_config(config).state_dict()
    shapes = {published_name(name): weight.shape for name, weight in weights.items()}
    total = 2 * sum(shape.numel() for shape in shapes.values())
    parts: list[dict[str, torch.Size]] = [{} for _ in range(SHARDS)]
    begun = 0
    for name, shape in shapes.items():
        parts[min(SHARDS - 1, begun * SHARDS // total)][name] = shape
        begun += 2 * shape.numel()
    noise = 0.02 * torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)).half()
    places: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{SHARDS:05d}.safetensors"
        places |= dict.fromkeys(part, file)
        _write_shard(folder / file, part, noise)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.architectures, config.dtype = ["LlavaForConditionalGeneration"], "float16"
    config.save_pretrained(folder)
    processor.save_pretrained(folder)


def _write_shard(path: Path, shapes: dict[str, torch.Size], noise: Tensor) -> None:
    entries: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * shape.numel()
        entries[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    head = len(header).to_bytes(8, "little") + header
    path.write_bytes(head)
    with path.open("ab") as file:
        for number, (name, shape) in enumerate(shapes.items()):
            ones = "norm" in name and name.endswith("weight")
            own = torch.ones_like(noise) if ones else noise.roll(number * 7919)  # or all would begin alike
            content = own.view(torch.uint8).numpy()
            left = 2 * shape.numel()
            while left:
                left -= file.write(content[: min(left, len(content))])


class Peak:
    """A context that notes how long it lasts and the most memory that a process and its children have in it."""

    def __init__(self, pid: int) -> None:
        self._process, self._over = psutil.Process(pid), threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self.seconds, self.gib = 0.0, 0.0

    def __enter__(self) -> "Peak":
        self._started = time.perf_counter()
        self._watcher.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._over.set()
        self._watcher.join()
        self.seconds = time.perf_counter() - self._started

    def _watch(self) -> None:
        while not self._over.wait(0.05):
            with contextlib.suppress(psutil.NoSuchProcess):  # one ended while it was counted
                tree = (self._process, *self._process.children(recursive=True))
                self.gib = max(self.gib, sum(one.memory_info().rss for one in tree) / GIB)


class Job:
    """The phases over one model; each gives its row's seconds, GiB and what was checked."""

    def __init__(self, work: Path, facts: dict[str, Any], shape: Shape, steps: int) -> None:
        self.work, self.facts, self.steps = work, facts, steps
        self.model, self.data_folder, self.run, self.killed = (work / n for n in ("model", "data", "run", "killed"))
        work.mkdir(parents=True, exist_ok=True)
        self.data = make_demo_data(people=12, forget_percent=15, photos=2, test_photos=1, flag_photos=1, seed=0)
        for split, profiles in self.data.splits.items():
            mllmu.write_split(self.data_folder, split, profiles)
        self.processor = build_processor(self.data.splits["Full_Set"] + self.data.splits["Retain_Set"], shape)

    def command(self, log: str) -> list[str]:
        """What starts fastvkd, whose output goes to the file `log`."""
        return [sys.executable, "-m", "fastvkd.cli"]

    def started(self, log: str, *arguments: str) -> subprocess.Popen[bytes]:
        with (self.work / f"{log}.log").open("w") as output:
            command = [*self.command(log), *arguments]
            return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT)

    def ran(self, log: str, *arguments: str, good: tuple[int, ...] = (0,)) -> tuple[float, float]:
        """Seconds and GiB of a command. RuntimeError, with its last lines, where its exit code is not `good`."""
        process = self.started(log, *arguments)
        with Peak(process.pid) as peak:
            code = process.wait()
        said = (self.work / f"{log}.log").read_text()
        if code not in good or "Traceback (most recent call last)" in said:  # which also ends with 1
            raise RuntimeError(f"{log} ended with {code}:\n{said[-3000:]}")
        return peak.seconds, peak.gib

    def settings(self, output: Path, site: str, **more: Any) -> list[str]:
        values = {
            "model_name_or_path": self.model,
            "data": self.data_folder,
            "forget_split": self.data.forget_split,
            "retain_split": self.data.retain_split,
            "output_dir": output,
            "cache_dir": self.work / "cache",
            "sites": site,
            "forget_target": "noise",
            "learning_rate": 1e-5,
            "ends": "max_steps",
            "watch_steps": 0,
            "max_steps": self.steps,
            "warmup_steps": 0,
            "per_device_train_batch_size": 4,
            "auxiliary_images": 0,
            "auxiliary_share": 0.0,
            "elsewhere": 0.0,
            "beside": 0.0,
            "augment": "false",
            "optim": "adamw_8bit",
            "bf16": "true",
            "device": "cpu",
            "save_steps": 1,
            "save_total_limit": 2,
            **more,
        }
        return [f"{key}={value}" for key, value in values.items()]

    def build(self) -> tuple[float, float, str]:
        with Peak(os.getpid()) as peak:
            build(self.model, self.facts, self.processor)
        size = sum(shard.stat().st_size for shard in shards_of(self.model))
        return peak.seconds, peak.gib, f"{size / 1e9:.1f} GB in {SHARDS} shards, float16"

    def plan(self) -> tuple[float, float, str]:
        found = self.ran("plan", "plan", *self.settings(self.run, "projector"), "--memory", "24GiB")
        return *found, "of training at `projector`"

    def train_projector(self) -> tuple[float, float, str]:
        found = self.ran("train", "train", *self.settings(self.run, "projector"))
        return *found, f"{self.steps} steps of 4 images, bf16, 8-bit AdamW, a checkpoint a step"

    def kill(self) -> tuple[float, float, str]:
        process = self.started("kill", "train", *self.settings(self.killed, "projector"))
        with Peak(process.pid) as peak:
            while process.poll() is None and find_latest(self.killed) is None:
                time.sleep(0.02)
            process.send_signal(signal.SIGKILL)
            process.wait()
        latest = find_latest(self.killed)
        if latest is None:
            raise RuntimeError("no checkpoint: " + (self.work / "kill.log").read_text()[-3000:])
        return peak.seconds, peak.gib, f"SIGKILL left {latest.name}"

    def resume(self) -> tuple[float, float, str]:
        resumed = self.settings(self.killed, "projector", resume_from_checkpoint="auto")
        found = self.ran("resume", "train", *resumed)
        straight, killed = (load_weights(latest) for run in (self.run, self.killed) if (latest := find_latest(run)))
        same = all(torch.equal(straight[name], killed[name]) for name in straight)
        return *found, f"weights {'equal' if same else 'DIFFER from'} the uninterrupted run's"

    def train_llm(self) -> tuple[float, float, str]:
        found = self.ran("llm", "train", *self.settings(self.work / "llm", "llm:2"))
        shutil.rmtree(self.work / "llm")
        return *found, f"{self.steps} steps of 4 images, bf16, 8-bit AdamW"

    def export(self) -> tuple[float, float, str]:
        found = self.ran("export", "export", "--run", str(self.run), "--to", str(self.merged))
        checkpoint = find_latest(self.run)
        assert checkpoint is not None
        trained = set(load_weights(checkpoint))
        headers = [read_safetensors_header(shard)[0] for shard in shards_of(self.model)]
        keys = set(match_keys(sorted(trained), {key for header in headers for key in header}).values())
        same = all(self._same_outside(shard, keys) for shard in shards_of(self.model))
        return *found, f"{'same' if same else 'OTHER'} bytes outside the trained weights"

    @property
    def merged(self) -> Path:
        return self.work / "merged"

    def _same_outside(self, shard: Path, trained: set[str]) -> bool:
        header, start = read_safetensors_header(shard)
        with shard.open("rb") as base, (self.merged / shard.name).open("rb") as merged:
            if base.read(start) != merged.read(start):
                return False
            for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                begin, end = entry["data_offsets"]
                base.seek(start + begin)
                merged.seek(start + begin)
                if base.read(end - begin) != merged.read(end - begin) and key not in trained:
                    return False
        return True

    def judged(self, name: str, samples: int, *arguments: str) -> tuple[float, float]:
        common = ["--model", str(self.merged), "--data", str(self.data_folder), "--device", "cpu", "--bf16"]
        out = ["--max-samples", str(samples), "--batch-size", "4", "--out", str(self.work / name)]
        return self.ran(name, name, *common, *out, *arguments, good=(0, 1))  # 1: nothing is certified

    def evaluate(self) -> tuple[float, float, str]:
        return *self.judged("eval", 4), "bf16, 4 questions a cell and task"

    def attack(self) -> tuple[float, float, str]:
        asked = self.judged("attack", 1, "--kind", "reverse", "--before", str(self.model))
        return *asked, "answers in reverse, and what certifies: both models, bf16, 1 question a cell and task"


PHASES: dict[str, Callable[[Job], tuple[float, float, str]]] = {
    "build": Job.build,
    "plan": Job.plan,
    "train, `projector`": Job.train_projector,
    "the same, killed": Job.kill,
    "and resumed": Job.resume,
    "export": Job.export,
    "train, `llm:2`": Job.train_llm,
    "eval": Job.evaluate,
    "attack": Job.attack,
}


def measure(job: Job, result: Path, phases: list[str], origin: dict[str, Any]) -> None:
    """Run `phases` that `result` lacks, and write each one's row when it has ended."""
    report: dict[str, Any] = json.loads(result.read_text()) if result.exists() else {}
    rows = report.get("tables", {}).get("phases", {}).get("rows", [])
    for name in phases:
        if name in {row[0] for row in rows} and (name != "build" or job.model.exists()):
            continue
        seconds, peak, checked = PHASES[name](job)
        row = [name, f"{seconds:.0f}", f"{peak:.1f}", checked]
        rows = [old for old in rows if old[0] != name] + [row]
        rows.sort(key=lambda row: list(PHASES).index(row[0]))
        tables = {"phases": {"head": HEAD, "rows": rows, "left": 1}}
        result.write_text(json.dumps({**origin, "note": NOTE, "tables": tables}, indent=1) + "\n")
        print(*row, sep=" | ", flush=True)


def architecture() -> dict[str, Any]:
    facts = json.loads((ROOT / "configs" / "architectures" / "llava-1.5-7b.json").read_text())
    facts.pop("name_or_path")
    return facts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="a folder that does not exist yet")
    parser.add_argument("--phases", nargs="+", choices=list(PHASES), default=list(PHASES))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--json", type=Path, default=RESULT)
    options = parser.parse_args()
    options.work.mkdir(parents=True)
    try:
        origin = measured_on(torch.device("cpu")) | {"command": "python benchmarks/real_size.py --work FOLDER"}
        job = Job(options.work, architecture(), Shape(image_size=336, patch_size=14), options.steps)
        measure(job, options.json, options.phases, origin)
    finally:
        shutil.rmtree(options.work)
    return 0


if __name__ == "__main__":
    sys.exit(main())
