"""What a model folder is: where a hub id lies, its shards, its fingerprint, and a hash of its language model."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from fastvkd.errors import ModelError
from fastvkd.models.foreign import read_config
from fastvkd.models.loading import VISUAL_KEY
from fastvkd.models.shards import header_of, read_tensor, samples_of, shards_of


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

    patterns = ["*.safetensors", "*.bin", "*.json", "*.jinja", "*.model", "*.txt", "*.md"]
    try:
        return Path(snapshot_download(model_name_or_path, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{model_name_or_path}: neither a folder nor a hub id that is cached or reachable "
            f"({' '.join(str(error).split())[:160]}); give the path of a model folder"
        ) from error


def identify_base(model_folder: str | Path) -> BaseModel:
    """Fingerprint a local model folder (see `local_folder`) in well under a second, whatever its size.

    SHA-256 over config.json's values, and 256 bytes at the start, middle and end of every tensor with its name, dtype
    and shape. Another fine-tune of the same architecture differs in nearly every tensor, so it differs here. This tells
    models apart. It does not notice somebody who edits single weights on purpose.
    """
    folder = Path(model_folder)
    digest = hashlib.sha256(json.dumps(read_config(folder), sort_keys=True).encode())
    samples = [sample for shard in shards_of(folder) for sample in samples_of(shard)]
    for name, sample in sorted(samples):  # independent of how the tensors are spread over shards
        digest.update(name.encode())
        digest.update(sample)
    return BaseModel(str(folder), digest.hexdigest())


def language_model_sha256(folder: str | os.PathLike[str]) -> str:
    """SHA-256 (hex) over name, dtype, shape and bytes of every tensor outside the visual module, by name.

    It is equal before and after unlearning if not one bit of the language model changed.
    """
    where = {key: shard for shard in shards_of(Path(folder)) for key in header_of(shard) if not VISUAL_KEY.search(key)}
    digest = hashlib.sha256()
    for key in sorted(where):
        tensor = read_tensor(where[key], key).contiguous()
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
