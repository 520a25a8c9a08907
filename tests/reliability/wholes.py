"""Whole folders of every kind that fastvkd reads, tiny, and a command run in this process."""

import contextlib
import hashlib
import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from fastvkd.cli import main
from fastvkd.data.dead_leaves import dead_leaves


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code, what it printed, and what its output holds but for times and places."""

    code: int
    out: str
    err: str
    left: str = ""

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("fastvkd: error: ")]


def run(*arguments: str) -> Ended:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(arguments))
    return Ended(code, out.getvalue(), err.getvalue())


def weights_in(folder: Path) -> str:
    """A digest of every tensor in a folder's safetensors files."""
    found = hashlib.sha256()
    for file in sorted(folder.rglob("*.safetensors")):
        for name, tensor in sorted(load_file(file).items()):
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    return found.hexdigest()


@dataclass(frozen=True)
class Wholes:
    """Whole folders of every kind, made once."""

    root: Path
    forget_split: str
    retain_split: str

    def at(self, kind: str) -> Path:
        return self.root / kind

    def train(self, out: Path, *told: str, model: Path | None = None, data: Path | None = None) -> list[str]:
        values = {
            "model_name_or_path": model or self.at("model"),
            "data": data or self.at("jsonl"),
            "forget_split": self.forget_split,
            "retain_split": self.retain_split,
            "output_dir": out,
            "max_steps": 2,
            "per_device_train_batch_size": 6,
            "learning_rate": 1e-3,
            "device": "cpu",
        }
        return ["train", *(f"{key}={value}" for key, value in values.items()), *told]

    def evaluation(self, out: Path, model: Path, data: Path) -> list[str]:
        splits = ["--forget-split", self.forget_split, "--retain-split", self.retain_split]
        told = ["--model", str(model), "--data", str(data), "--out", str(out), "--device", "cpu"]
        return ["eval", *told, *splits, "--max-samples", "1"]


def make_wholes(world: Any, root: Path) -> Wholes:
    """Whole folders below `root`, of the model and the data of `world`."""
    made = Wholes(root, world.forget_split, world.retain_split)
    shutil.copytree(world.model, root / "model")
    for split in (world.forget_split, world.retain_split):
        shutil.copytree(world.data / split, root / "parquet" / split)
    own = root / "jsonl"
    own.mkdir()
    for split, count in (("forget", 2), ("retain", 6)):
        rows = []
        for i in range(count):
            dead_leaves((32, 32), (count, i)).save(own / f"{split}-{i}.png")
            asked = dict(question="Where was this person born?", answer="Oslo in Norway")
            rows.append(dict(image=f"{split}-{i}.png", entity=f"{split} {i}", **asked))
            rows.append(rows[-1] | dict(question="Which job?", answer="baker", options=["baker", "pilot"]))
        (own / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(*made.train(root / "run", f"cache_dir={root / 'cache'}")).code == 0
    assert run("export", "--run", str(root / "run"), "--to", str(root / "exported")).code == 0
    assert run(*made.evaluation(root / "eval", root / "exported", root / "jsonl")).code == 0
    assert run(*made.evaluation(root / "before", root / "model", root / "jsonl")).code == 0
    key = next(key for key in load_file(root / "model/model.safetensors") if "layers.1.self_attn.q_proj.weight" in key)
    height, width = load_file(root / "model/model.safetensors")[key].shape
    adapter = root / "adapter"
    adapter.mkdir()
    layer = "base_model.model.model.language_model.layers.1.self_attn.q_proj"
    halves = {f"{layer}.lora_A.weight": torch.ones(2, width), f"{layer}.lora_B.weight": torch.ones(height, 2)}
    save_file(halves, adapter / "adapter_model.safetensors")
    told = {"peft_type": "LORA", "base_model_name_or_path": str(root / "model"), "r": 2, "lora_alpha": 2}
    (adapter / "adapter_config.json").write_text(json.dumps(told))
    return made
