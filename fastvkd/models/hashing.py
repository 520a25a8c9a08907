"""A hash of the language model in a model folder: equal before and after unlearning if not one of its bits changed."""

import hashlib
import os
from pathlib import Path

import torch
from safetensors import safe_open

from fastvkd.engines.checkpoints import shards_of
from fastvkd.models.loading import VISUAL_KEY


def language_model_sha256(folder: str | os.PathLike[str]) -> str:
    """SHA-256 (hex) over name, dtype, shape and bytes of every tensor outside the visual module, by name."""
    where: dict[str, Path] = {}
    for shard in shards_of(Path(folder)):
        with safe_open(shard, framework="pt") as file:
            where |= {key: shard for key in file.keys() if not VISUAL_KEY.search(key)}  # noqa: SIM118
    digest = hashlib.sha256()
    for key in sorted(where):
        with safe_open(where[key], framework="pt") as file:
            tensor = file.get_tensor(key).contiguous()
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
