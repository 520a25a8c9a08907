"""Weight files whose headers or pickles are not what a library writes: one line that names the file and the mend."""

import io
import json
import random
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fastvkd.errors import ModelError
from fastvkd.models.shards import header_of, read_bin, read_safetensors_header, read_tensor, samples_of


def written(file: Path, header: Any, data: int) -> Path:
    """A safetensors file with this header and so many bytes of data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))
    return file


def entry(begin: Any, end: Any, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [begin, end]}


WRONG: dict[str, tuple[Any, int, str]] = {
    "overlapping": ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "b begins at byte 4"),
    "the same place twice": ({"a": entry(0, 8), "b": entry(0, 8)}, 8, "b begins at byte 0"),
    "a hole": ({"a": entry(0, 8), "b": entry(12, 20)}, 20, "b begins at byte 12"),
    "a hole at the start": ({"a": entry(8, 16)}, 16, "a begins at byte 8"),
    "out of range": ({"a": entry(0, 8), "b": entry(8, 160)}, 16, "truncated"),
    "negative offset": ({"a": entry(-8, 0), "b": entry(0, 8)}, 8, "data_offsets of a"),
    "backwards": ({"a": entry(8, 0)}, 8, "data_offsets of a"),
    "offsets that are texts": ({"a": entry("0", "8")}, 8, "data_offsets of a"),
    "offsets that are truths": ({"a": entry(False, True, (1,), "U8")}, 1, "data_offsets of a"),
    "offsets with a fraction": ({"a": entry(0, 8.0)}, 8, "data_offsets of a"),
    "three offsets": ({"a": entry(0, 8) | {"data_offsets": [0, 4, 8]}}, 8, "data_offsets of a"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, 8, "data_offsets of a"),
    "more bytes than the shape": ({"a": entry(0, 12)}, 12, "a has 12 bytes, its shape and dtype 8"),
    "fewer bytes than the shape": ({"a": entry(0, 8, (2, 3))}, 8, "a has 8 bytes, its shape and dtype 24"),
    "another dtype": ({"a": entry(0, 8, (2,), "F16")}, 8, "a has 8 bytes, its shape and dtype 4"),
    "a shape beyond all memory": ({"a": entry(0, 8, (2**62, 2**62))}, 8, "a has 8 bytes"),
    "negative shape": ({"a": entry(0, 8, (-1, -2))}, 8, "shape of a"),
    "a shape that is a number": ({"a": entry(0, 8, 2)}, 8, "shape of a"),
    "a shape of texts": ({"a": entry(0, 8, ("2",))}, 8, "shape of a"),
    "unknown dtype": ({"a": entry(0, 8, (2,), "F33")}, 8, "dtype of a"),
    "dtype that is a list": ({"a": entry(0, 8, (2,), ["F32"])}, 8, "dtype of a"),
    "an entry that is a list": ({"a": [0, 8]}, 8, "a is not an object"),
    "metadata that are a list": ({"__metadata__": [], "a": entry(0, 8)}, 8, "__metadata__"),
    "metadata of numbers": ({"__metadata__": {"format": 1}, "a": entry(0, 8)}, 8, "__metadata__"),
    "a name twice": (b'{"a": 1, "a": 2}', 8, "says 'a' twice"),
    "a list": ([], 8, "not an object"),
    "a number": (b"3", 8, "not an object"),
    "bytes behind": ({"a": entry(0, 8)}, 9, "longer than it says"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_header_that_is_not_true_of_its_file_is_refused(tmp_path: Path, kind: str) -> None:
    header, data, said = WRONG[kind]
    shard = written(tmp_path / "model.safetensors", header, data)
    for read in (read_safetensors_header, header_of, samples_of):
        with pytest.raises(ModelError) as error:
            read(shard)
        text = str(error.value)
        assert text.startswith(f"{shard}: ") and said in text and "\n" not in text
        assert "download it again" in text or "keep one of them" in text


def test_what_a_library_writes_is_read(tmp_path: Path) -> None:
    kinds = (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool, torch.uint8, torch.complex64)
    tensors = {f"t{i}": torch.zeros(3, i, dtype=kind) for i, kind in enumerate(kinds)}  # the first is empty
    tensors["scalar"] = torch.tensor(1.0)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = header_of(tmp_path / "model.safetensors")
    assert {name: tuple(entry["shape"]) for name, entry in found.items()} == {n: t.shape for n, t in tensors.items()}


def test_a_tensor_that_is_not_there_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "x.safetensors")
    torch.save({"a": torch.zeros(2)}, tmp_path / "x.bin")
    for name in ("x.safetensors", "x.bin"):
        assert read_tensor(tmp_path / name, "a").shape == (2,)
        with pytest.raises(ModelError, match=f"{name}: holds no tensor b; download the model folder whole"):
            read_tensor(tmp_path / name, "b")


def saved(content: Any, **how: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **how)
    return buffer.getvalue()


def repacked(whole: bytes, pickled: bytes) -> bytes:
    """A file of torch.save whose pickle is another one."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as archive, zipfile.ZipFile(buffer, "w") as other:
        for name in archive.namelist():
            other.writestr(name, pickled if name.endswith("data.pkl") else archive.read(name))
    return buffer.getvalue()


def test_a_damaged_bin_file_is_one_line(tmp_path: Path) -> None:
    """Whatever pickle, zipfile and torch make of it."""
    whole = saved({"layer.weight": torch.arange(6.0).view(2, 3), "layer.bias": torch.zeros(3)})
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        pickled = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    rng = random.Random(0)
    damaged = [whole[:cut] for cut in rng.sample(range(len(whole)), 20)]
    for _ in range(150):
        place, length = rng.randrange(len(pickled)), rng.choice((0, 1, 1, 4))
        damaged.append(repacked(whole, pickled[:place] + rng.randbytes(length) + pickled[place + length // 2 + 1 :]))
    damaged += [
        repacked(whole, text) for text in (b"", b".", b"K\x01K\x02R.", b"]K\x01b.", b"K\x01K\x02K\x03s.", b"(d")
    ]
    file, refused = tmp_path / "pytorch_model.bin", 0
    for content in damaged:
        file.write_bytes(content)
        try:
            header_of(file)
            samples_of(file)
        except ModelError as error:
            refused += 1
            assert str(file) in str(error) and "\n" not in str(error)
    assert refused > 120


ODD = {
    "numbers for names": {0: torch.zeros(2)},
    "a sparse tensor": {"a": torch.zeros(2).to_sparse()},
    "a tensor without data": {"a": torch.zeros(2, device="meta")},
    "a list": [torch.zeros(2)],
}


@pytest.mark.parametrize("kind", ODD)
def test_a_bin_file_of_other_things_is_refused(tmp_path: Path, kind: str) -> None:
    (tmp_path / "x.bin").write_bytes(saved(ODD[kind]))
    with pytest.raises(ModelError, match=r"x\.bin: .*take safetensors"):
        read_bin(tmp_path / "x.bin")
