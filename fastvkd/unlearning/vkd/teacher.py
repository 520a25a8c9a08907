"""What the frozen original sees: its features at every site, cached on disk, or computed online for augmented views.

The original is never a second model. Either its features were written down once before training, or a copy of the
tower and projector runs beside the trained one and shares the frozen LLM.
"""

import contextlib
import copy
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from fastvkd.errors import TrainingError, disk_is_full
from fastvkd.models import families
from fastvkd.models.families import family_of
from fastvkd.models.visual_path import SiteFeatures, VisualBatch

T = TypeVar("T")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float8": torch.float8_e4m3fn}


class FeatureCache:
    """Features of images at one site, in memory-mapped files: rows of width H, an image's rows being contiguous.

    The folder is named by everything that shapes a feature: base weights, prompt prefix, preprocessing, site, dtype.
    Images inside it are named by their keys. So runs may share a cache, and a changed ingredient gets a new folder.
    Each rank of a job adds to a file and an index of its own and reads those of all. New rows are flushed before the
    index that names them is renamed into place, so an interrupted run leaves a cache that is valid and shorter.

    Raises:
        TrainingError: the disk is full, or the folder cannot be written.
    """

    def __init__(self, root: Path, *, site: str, dtype: str, ingredients: dict[str, Any], rank: int = 0):
        self.site, self.rank = site, rank
        self.dtype = _DTYPES[dtype]
        ingredients = {**ingredients, "site": site, "dtype": dtype, "format": 2}
        digest = hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = root / f"{site.replace(':', '-')}-{digest}"
        self.width = 0
        self.spans: dict[str, tuple[int, int]] = {}  # key -> (first row in its file, number of rows)
        self._file_of: dict[str, int] = {}  # key -> the rank that wrote it
        self._rows: dict[int, Tensor] = {}  # of each rank's file
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            description = self.folder / "ingredients.json"
            if not description.exists():
                description.write_text(json.dumps(ingredients, indent=1, sort_keys=True))
        except OSError as error:
            raise _disk_error(self.folder, error) from error
        self.reload()

    def reload(self) -> None:
        """Read the indices again, which other ranks may have written."""
        for file in sorted(self.folder.glob("index-*.json")):
            index = json.loads(file.read_text())
            rank = int(file.stem.removeprefix("index-"))
            self.width = index["width"]
            self.spans |= {k: (a, b) for k, (a, b) in index["spans"].items()}
            self._file_of |= dict.fromkeys(index["spans"], rank)
        self._rows.clear()

    def missing(self, keys: Iterable[str]) -> list[str]:
        return [key for key in dict.fromkeys(keys) if key not in self.spans]

    def add(self, rows: Mapping[str, Tensor]) -> None:
        """Append the features (N_i, H) of images by key, and make them durable."""
        if not rows:
            return
        spans = {key: span for key, span in self.spans.items() if self._file_of[key] == self.rank}
        total = sum(count for _, count in spans.values())
        data_file, index_file = self._data_file(self.rank), self.folder / f"index-{self.rank}.json"
        try:
            with open(data_file, "r+b" if data_file.exists() else "w+b") as file:
                self.width = next(iter(rows.values())).shape[1]
                file.truncate(total * self.width * self.dtype.itemsize)  # what an interrupted run left behind
                file.seek(0, os.SEEK_END)
                for key, features in rows.items():
                    file.write(features.detach().to("cpu", self.dtype).contiguous().view(torch.uint8).numpy().tobytes())
                    spans[key] = (total, len(features))
                    total += len(features)
                file.flush()
                os.fsync(file.fileno())
            temporary = index_file.with_suffix(f".{os.getpid()}.tmp")
            temporary.write_text(json.dumps({"width": self.width, "spans": spans}))
            os.replace(temporary, index_file)
        except OSError as error:
            raise _disk_error(self.folder, error) from error
        self.spans |= spans
        self._file_of |= dict.fromkeys(spans, self.rank)
        self._rows.pop(self.rank, None)

    def _data_file(self, rank: int) -> Path:
        return self.folder / f"features-{rank}.bin"

    def features(self, key: str) -> Tensor:
        """(N, H) of one image in the cache's dtype, memory-mapped and read-only by convention."""
        first, count = self.spans[key]
        rank = self._file_of[key]
        if rank not in self._rows:
            total = sum(count for k, (_, count) in self.spans.items() if self._file_of[k] == rank)
            shape = (total, self.width * self.dtype.itemsize)
            raw = np.memmap(self._data_file(rank), dtype=np.uint8, mode="c", shape=shape)
            self._rows[rank] = torch.from_numpy(raw).view(self.dtype)
        return self._rows[rank][first : first + count]


def _disk_error(folder: Path, error: OSError) -> TrainingError:
    if disk_is_full(error):
        return TrainingError(
            f"{folder}: no space left on disk for the teacher cache; free some or set cache_dir elsewhere"
        )
    return TrainingError(
        f"{folder}: the teacher cache cannot be written ({error.strerror}); set cache_dir to a writable folder"
    )


def split_by_image(features: SiteFeatures, n_images: int) -> list[Tensor]:
    """Features (N_i, H) of each image of a batch."""
    counts = torch.bincount(features.image_of_row, minlength=n_images).tolist()
    return list(features.gathered().split(counts))


@torch.no_grad()
def fill_caches(
    caches: dict[str, FeatureCache],
    path: Callable[[VisualBatch], Any],
    images: Mapping[str, T],
    collate: Callable[[Sequence[T]], VisualBatch],
    device: torch.device,
    *,
    batch_size: int = 16,
    progress: Callable[[int, int], None] = lambda done, total: None,
    all_ranks_run: bool = False,
) -> int:
    """Run the frozen model once on every image that some site's cache lacks; returns how many that were.

    `path` maps a batch to features by site. `images` maps keys to whatever `collate` makes a batch of. In a distributed
    job every rank computes and writes its share and reads the others' afterwards. With `all_ranks_run`, which ZeRO-3
    needs, a rank that has no images left runs along on some that another one writes.

    Raises TrainingError when the folder is not one that all ranks share.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank = torch.distributed.get_rank() if distributed else 0
    world_size = torch.distributed.get_world_size() if distributed else 1
    lacking = {key for cache in caches.values() for key in cache.missing(images)}
    todo = [key for key in images if key in lacking]
    if distributed:
        torch.distributed.barrier()  # nobody writes before all have looked
    for start in range(0, len(todo), batch_size * world_size):
        own = todo[start + rank * batch_size : start + (rank + 1) * batch_size]
        keys = own or todo[start : start + batch_size]
        if own or all_ranks_run:
            features = path(collate([images[key] for key in keys]).to(device))
        for site, cache in caches.items() if own else ():
            rows = zip(keys, split_by_image(features[site], len(keys)), strict=True)
            cache.add({key: own_rows for key, own_rows in rows if key not in cache.spans})
        progress(min(start + batch_size * world_size, len(todo)), len(todo))
    if distributed:
        torch.distributed.barrier()
        for cache in caches.values():
            cache.reload()
            if cache.missing(images):
                raise TrainingError(
                    f"{cache.folder}: rank {rank} does not see what other ranks wrote there; set cache_dir to a folder "
                    "that all nodes share"
                )
    return len(todo)


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy of `model` that shares its LLM and owns a frozen copy of everything else (tower and projector).

    Where ZeRO-3 has partitioned the weights, every rank's copy is whole; the shared LLM stays partitioned.
    """
    llm = families.language_model(model, family_of(model))
    shared: dict[int, Any] = {id(llm): llm}
    head = getattr(model, "lm_head", None)
    if head is not None:
        shared[id(head)] = head
    own = {id(p) for module in shared.values() for p in module.parameters()}
    partitioned = [p for p in model.parameters() if id(p) not in own and hasattr(p, "ds_id")]
    with contextlib.ExitStack() as whole:
        if partitioned:
            import deepspeed  # late: it takes seconds to import

            whole.enter_context(deepspeed.zero.GatheredParameters(partitioned))
        teacher = copy.deepcopy(model, shared)
    for parameter in teacher.parameters():
        if id(parameter) not in own:
            parameter.requires_grad_(False)
    return teacher.eval()
