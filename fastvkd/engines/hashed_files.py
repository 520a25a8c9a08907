"""Files of tensors whose SHA-256 is known once they are written: every byte is handled once, and never read back."""

import hashlib
import io
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_CHUNK = 1 << 24  # bytes that are hashed while they are written
_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class HashedFile(io.FileIO):
    """A new file that hashes in a thread what is written to it in order; leaving its context puts it on the disk.

    `errors` has what the system said where a write failed, for callers between us and which that is lost.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "wb")
        self.errors: list[OSError] = []
        self._digest = hashlib.sha256()
        self._thread = ThreadPoolExecutor(1, "fastvkd-sha256")

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _CHUNK):
            chunk = view[start : start + _CHUNK]
            small = len(chunk) < _CHUNK // 64  # a thread would take longer than the hash
            hashing = None if small else self._thread.submit(self._digest.update, chunk)
            try:
                done = 0
                while done < len(chunk):  # a raw write may take a part
                    done += super().write(chunk[done:])
            except OSError as error:
                self.errors.append(error)
                raise
            finally:
                if hashing is None:
                    self._digest.update(chunk)
                else:
                    hashing.result()
        return len(view)

    def sha256(self) -> str:
        return self._digest.hexdigest()

    def __exit__(self, *failed: Any) -> None:
        try:
            if failed[0] is None:
                os.fsync(self.fileno())
        finally:
            self._thread.shutdown()
            super().__exit__(*failed)


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> str:
    """Write a safetensors file and return its SHA-256. Tensors come from their devices one by one.

    dtypes: float32, float16, bfloat16. Raises OSError when the file cannot be written.
    """
    entries: dict[str, Any] = {}
    order = sorted(
        tensors, key=lambda name: (-tensors[name].itemsize, name)
    )  # wide ones first, so that all are aligned
    end = 0
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + tensor.nbytes
        entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with HashedFile(path) as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in order:
            file.write(tensors[name].cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return file.sha256()


def save_object(content: Any, path: Path) -> str:
    """`torch.save`, and the SHA-256 of the file. Raises OSError when the file cannot be written.

    torch.save itself makes a RuntimeError of a full disk, and adds checksums that cost more than SHA-256 does.
    """
    with HashedFile(path) as file:
        checked = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)
        try:
            torch.save(content, file)
        except RuntimeError as error:
            raise file.errors[0] if file.errors else error from error
        finally:
            torch.serialization.set_crc32_options(checked)
    return file.sha256()
