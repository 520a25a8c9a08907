"""The weight files of a model folder: which there are, what their headers say, and whether they are whole.

Files of pickles (`.bin`) are read as well, by torch's reader that runs no code.
"""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from fastvkd.errors import ModelError, one_line
from fastvkd.files import lfs_pointer, parse_json, read_json_object

_LONGEST_HEADER = 100_000_000  # bytes; safetensors' own limit
# The index and the single file, in the order in which they are looked for.
WEIGHT_FILES = ((SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME), (WEIGHTS_INDEX_NAME, WEIGHTS_NAME))


def shards_of(model_folder: Path) -> list[Path]:
    """The weight files of a model folder, in order: safetensors, or `.bin` where there are none.

    Raises ModelError when there are none, one is missing, or the index is damaged.
    """
    for index_name, single in WEIGHT_FILES:
        if (model_folder / index_name).is_file():
            names = sorted(set(weight_map_of(model_folder / index_name).values()))
        elif (model_folder / single).is_file():
            names = [single]
        else:
            continue
        for name in names:
            if not (model_folder / name).is_file():
                raise ModelError(
                    f"{model_folder}: no file {name}, which {index_name} names; download the model folder whole"
                )
        return [model_folder / name for name in names]
    raise ModelError(
        f"{model_folder}: no file {SAFE_WEIGHTS_NAME} and no {SAFE_WEIGHTS_INDEX_NAME}; a model folder with weights is "
        "needed (download it whole)"
    )


def weight_map_of(index: Path) -> dict[str, str]:
    """Tensor name -> file name, of an index file. Raises ModelError where it is damaged or leads out of its folder."""
    mend = "download it again"
    found = read_json_object(index, ModelError, mend).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
        raise ModelError(f"{index}: has no weight_map that says which file holds a tensor; {mend}")
    for name in set(found.values()):
        if Path(name).name != name:
            raise ModelError(f"{index}: names {name!r}, which is no file of its own folder; {mend}")
    return found


def read_safetensors_header(shard: Path) -> tuple[dict[str, Any], int]:
    """The JSON header of a safetensors file (tensor name -> dtype, shape, data_offsets) and where its data begin.

    Raises ModelError where the file is no safetensors file, or shorter or longer than its header says.
    """
    size = shard.stat().st_size
    with shard.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if pointer := lfs_pointer(start + file.read(64)):
            raise ModelError(f"{shard}: {pointer}")
        if len(start) < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise ModelError(f"{shard}: truncated or not a safetensors file; download it again")
        file.seek(8)
        text = file.read(length)
    mend = "truncated or not a safetensors file; download it again"
    try:
        header = parse_json(text.decode("utf-8"), f"{shard}: its header", ModelError, mend)
        entries = [entry for name, entry in header.items() if name != "__metadata__"]
        ends = [int(end) for entry in entries for _, end in (entry["data_offsets"],)]
    except (UnicodeDecodeError, AttributeError, TypeError, KeyError, ValueError) as error:
        raise ModelError(f"{shard}: its header is damaged ({one_line(error)}): {mend}") from error
    whole = 8 + length + max(ends, default=0)
    if size != whole:
        what = "truncated" if size < whole else "longer than it says"
        raise ModelError(f"{shard}: {what} ({size:,} bytes, its header says {whole:,}); download it again")
    return header, 8 + length


def header_of(shard: Path) -> dict[str, Any]:
    """Tensor name -> its `dtype` and `shape` as a safetensors header writes them, also of a `.bin` file."""
    if shard.suffix == ".bin":
        return {name: _entry(tensor) for name, tensor in read_bin(shard).items()}
    header, _ = read_safetensors_header(shard)
    return {name: entry for name, entry in header.items() if name != "__metadata__"}


def _entry(tensor: Tensor) -> dict[str, Any]:
    kinds = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    size = tensor.numel() * tensor.element_size()
    kind = kinds.get(tensor.dtype, str(tensor.dtype))
    return {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [0, size]}


def read_bin(shard: Path) -> Mapping[str, Tensor]:
    """The tensors of a `.bin` file, mapped into memory and not read. Nothing but tensors is unpickled.

    Raises ModelError for a file that is damaged or holds anything else.
    """
    with shard.open("rb") as file:
        if pointer := lfs_pointer(file.read(64)):
            raise ModelError(f"{shard}: {pointer}")
    try:
        found = torch.load(shard, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError, KeyError) as error:
        raise ModelError(
            f"{shard}: no file of weights alone that torch can map into memory ({one_line(error, 120)}); download it "
            "again, or take safetensors"
        ) from error
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise ModelError(f"{shard}: holds other things than named tensors; take safetensors")
    return found


def read_tensor(shard: Path, name: str) -> Tensor:
    """One tensor of a shard as it is stored, on the CPU."""
    if shard.suffix == ".bin":
        return read_bin(shard)[name]
    with safe_open(shard, framework="pt") as file:
        return file.get_tensor(name)


def samples_of(shard: Path) -> list[tuple[str, bytes]]:
    """Of every tensor its name, and dtype, shape and 256 bytes at its start, middle and end."""
    if shard.suffix == ".bin":
        return [(name, _sample_of_tensor(tensor)) for name, tensor in read_bin(shard).items()]
    found: list[tuple[str, bytes]] = []
    header, data_start = read_safetensors_header(shard)
    with shard.open("rb") as file:
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            sample = f"{entry['dtype']} {entry['shape']}".encode()
            for position in _places(begin, end):
                file.seek(data_start + position)
                sample += file.read(min(256, end - position))
            found.append((name, sample))
    return found


def _places(begin: int, end: int) -> tuple[int, int, int]:
    return begin, (begin + end) // 2, max(begin, end - 256)


def _sample_of_tensor(tensor: Tensor) -> bytes:
    """The same of a tensor as of its place in a safetensors file."""
    entry = _entry(tensor)
    sample = f"{entry['dtype']} {entry['shape']}".encode()
    raw = tensor.contiguous().reshape(-1).view(torch.uint8)
    for position in _places(0, len(raw)):
        sample += raw[position : min(position + 256, len(raw))].numpy().tobytes()
    return sample


def check_shards(model_folder: Path) -> None:
    """Raises ModelError, naming the file, where a shard is missing, truncated or damaged. Only headers are read."""
    for shard in shards_of(model_folder):
        header_of(shard)


def write_index(folder: Path, weight_map: Mapping[str, str]) -> None:
    """The index that says which file holds a tensor, of safetensors or of `.bin` files."""
    index = {"metadata": {}, "weight_map": dict(weight_map)}
    pickled = any(name.endswith(".bin") for name in weight_map.values())
    (folder / (WEIGHTS_INDEX_NAME if pickled else SAFE_WEIGHTS_INDEX_NAME)).write_text(
        json.dumps(index), encoding="utf-8"
    )
