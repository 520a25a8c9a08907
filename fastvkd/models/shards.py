"""The weight files of a model folder: which there are, what their headers say, and whether they are whole.

Files of pickles (`.bin`) are read as well, by torch's reader that runs no code.
"""

import json
import math
import pickle
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from fastvkd.errors import ModelError, one_line
from fastvkd.files import lfs_pointer, parse_json, read_json_object

_LONGEST_HEADER = 100_000_000  # bytes; safetensors' own limit
_BITS = {
    "F4": 4,
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
# What torch's reader of pickles, which runs no code, raises for bytes that are damaged or hold other things.
UNPICKLING_ERRORS: tuple[type[Exception], ...] = (
    *(pickle.UnpicklingError, zipfile.BadZipFile, struct.error, EOFError, OSError, RuntimeError, NotImplementedError),
    *(ValueError, TypeError, AttributeError, LookupError, AssertionError, ArithmeticError, ImportError),
)
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

    Raises ModelError where the file is no safetensors file, or its header is not true of it: every byte of the data is
    one tensor's, and a tensor has as many as its shape and dtype take.
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
    except UnicodeDecodeError as error:
        raise ModelError(f"{shard}: its header is damaged ({one_line(error)}): {mend}") from error
    for problem in _wrong_entries(header):
        raise ModelError(f"{shard}: its header is damaged ({problem}): {mend}")
    places = sorted((*entry["data_offsets"], name) for name, entry in header.items() if name != "__metadata__")
    whole = 8 + length + max((end for _, end, _ in places), default=0)
    if size != whole:
        what = "truncated" if size < whole else "longer than it says"
        raise ModelError(f"{shard}: {what} ({size:,} bytes, its header says {whole:,}); download it again")
    after = 0
    for begin, end, name in places:
        if begin != after:
            raise ModelError(
                f"{shard}: its header is damaged ({name} begins at byte {begin:,}, the one before ends at {after:,}): "
                "download it again"
            )
        after = end
    return header, 8 + length


def _wrong_entries(header: Any) -> Iterator[str]:
    """What cannot be in a header, wherever its tensors lie."""
    if not isinstance(header, dict):
        yield "not an object"
        return
    for name, entry in header.items():
        if not isinstance(entry, dict):
            yield f"{name} is not an object"
        elif name == "__metadata__":
            if not all(isinstance(text, str) for text in entry.values()):
                yield f"{name} has other things than texts"
        else:
            yield from _wrong_entry(name, entry)


def _wrong_entry(name: str, entry: Mapping[str, Any]) -> Iterator[str]:
    offsets, shape, dtype = entry.get("data_offsets"), entry.get("shape"), entry.get("dtype")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        yield f"data_offsets of {name} are no place"
    elif not _are_sizes(shape):
        yield f"shape of {name} is no list of sizes"
    elif not isinstance(dtype, str) or dtype not in _BITS:
        yield f"dtype of {name} is none that is known"
    elif (offsets[1] - offsets[0]) * 8 != (bits := math.prod(shape) * _BITS[dtype]):
        yield f"{name} has {offsets[1] - offsets[0]:,} bytes, its shape and dtype {-(-bits // 8):,}"


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(one) is int and one >= 0 for one in value)


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
    except UNPICKLING_ERRORS as error:
        raise ModelError(
            f"{shard}: no file of weights alone that torch can map into memory ({one_line(error, 120)}); download it "
            "again, or take safetensors"
        ) from error
    if not isinstance(found, dict) or not all(isinstance(name, str) and _is_plain(found[name]) for name in found):
        raise ModelError(f"{shard}: holds other things than named tensors; take safetensors")
    return found


def _is_plain(value: Any) -> bool:
    """Whether a value is a tensor whose numbers lie in memory one by one."""
    return isinstance(value, Tensor) and value.layout == torch.strided and not (value.is_meta or value.is_quantized)


def read_tensor(shard: Path, name: str) -> Tensor:
    """One tensor of a shard as it is stored, on the CPU. Raises ModelError where it is not there."""
    try:
        if shard.suffix == ".bin":
            return read_bin(shard)[name]
        with safe_open(shard, framework="pt") as file:
            return file.get_tensor(name)
    except (KeyError, SafetensorError) as error:
        raise ModelError(f"{shard}: holds no tensor {name}; download the model folder whole") from error


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
