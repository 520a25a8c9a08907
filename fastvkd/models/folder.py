"""What a model folder is: where a hub id lies, its shards, its fingerprint, and a hash of its language model."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from fastvkd.errors import ModelError
from fastvkd.models.loading import VISUAL_KEY


@dataclass(frozen=True)
class BaseModel:
    """The frozen original that a run started from: its folder, and a fingerprint of its configuration and weights."""

    path: str
    fingerprint: str


def local_folder(model_name_or_path: str) -> Path:
    """The folder of a model: the path itself, or where a hub id was (or now is) downloaded whole.

    Raises ModelError when it is neither a folder nor a hub id that is cached or reachable.
    """
    if Path(model_name_or_path).is_dir():
        return Path(model_name_or_path)
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.md"]
    try:
        return Path(snapshot_download(model_name_or_path, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{model_name_or_path}: neither a folder nor a hub id that is cached or reachable "
            f"({' '.join(str(error).split())[:160]}); give the path of a model folder"
        ) from error


def shards_of(model_folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in order. Raises ModelError when there are none or one is missing."""
    index = model_folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    shards = [model_folder / name for name in names]
    for shard in shards:
        if not shard.is_file():
            raise ModelError(
                f"{model_folder}: no file {shard.name}; a model folder with safetensors weights is needed "
                "(download it whole, or convert .bin weights with save_pretrained)"
            )
    return shards


def read_safetensors_header(shard: Path) -> tuple[dict[str, Any], int]:
    """The JSON header of a safetensors file (tensor name -> dtype, shape, data_offsets) and where its data begin."""
    with shard.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > shard.stat().st_size - 8:
            raise ModelError(f"{shard}: truncated or not a safetensors file; download it again")
        header, data_start = json.loads(file.read(length)), 8 + length
    end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    if data_start + end > shard.stat().st_size:
        raise ModelError(
            f"{shard}: truncated, {shard.stat().st_size:,} of {data_start + end:,} bytes; download it again"
        )
    return header, data_start


def identify_base(model_folder: str | Path) -> BaseModel:
    """Fingerprint a local model folder (see `local_folder`) in well under a second, whatever its size.

    SHA-256 over config.json's values, and 256 bytes at the start, middle and end of every tensor with its name, dtype
    and shape. Another fine-tune of the same architecture differs in nearly every tensor, so it differs here. This tells
    models apart. It does not notice somebody who edits single weights on purpose.
    """
    folder = Path(model_folder)
    config = folder / "config.json"
    if not config.is_file():
        raise ModelError(f"{folder}: no config.json; a local model folder is needed")
    digest = hashlib.sha256(json.dumps(json.loads(config.read_text()), sort_keys=True).encode())
    samples: list[tuple[str, bytes]] = []
    for shard in shards_of(folder):
        header, data_start = read_safetensors_header(shard)
        with shard.open("rb") as file:
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                begin, end = entry["data_offsets"]
                sample = f"{entry['dtype']} {entry['shape']}".encode()
                for position in (begin, (begin + end) // 2, max(begin, end - 256)):
                    file.seek(data_start + position)
                    sample += file.read(min(256, end - position))
                samples.append((name, sample))
    for name, sample in sorted(samples):  # independent of how the tensors are spread over shards
        digest.update(name.encode())
        digest.update(sample)
    return BaseModel(str(folder), digest.hexdigest())


def language_model_sha256(folder: str | os.PathLike[str]) -> str:
    """SHA-256 (hex) over name, dtype, shape and bytes of every tensor outside the visual module, by name.

    It is equal before and after unlearning if not one bit of the language model changed.
    """
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
