"""What the frozen original sees: its features at every site, cached on disk, or computed online for augmented views.

The original is never a second model. Either its features were written down once before training, or a copy of the
tower and projector runs beside the trained one and shares the frozen LLM.
"""

import contextlib
import copy
import dataclasses
import hashlib
import json
import logging
import os
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from fastvkd.errors import TrainingError, disk_is_full
from fastvkd.files import DELETED, delete_unfinished
from fastvkd.models import families
from fastvkd.models.families import family_of
from fastvkd.models.visual_path import SiteFeatures, VisualBatch

log = logging.getLogger("fastvkd")

T = TypeVar("T")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float8": torch.float8_e4m3fn}


@dataclass(frozen=True)
class _Place:
    """Where an image's features lie: rows `first` to `first + count` of a writer's file, and SHA-256 (hex) of their
    shape and them."""

    writer: str
    first: int
    count: int
    sha256: str


class FeatureCache:
    """Features of images at one site, in memory-mapped files: rows of width H, an image's rows being contiguous.

    The folder is named by everything that shapes a feature: base weights, prompt prefix, preprocessing, site, dtype.
    Images inside it are named by their keys. So runs may share a cache, and a changed ingredient gets a new folder.
    Each process adds to a file and an index of its own and reads those of all, so that runs may share one at the same
    time. New rows are flushed before the index that names them is renamed into place, so an interrupted run leaves a
    cache that is valid and shorter. Each image's rows have a digest: what is damaged is missing, and computed again.

    Raises:
        TrainingError: the disk is full, or the folder cannot be written.
    """

    def __init__(self, root: Path, *, site: str, dtype: str, ingredients: dict[str, Any], rank: int = 0):
        self.site = site
        self.dtype = _DTYPES[dtype]
        ingredients = {**ingredients, "site": site, "dtype": dtype, "format": 4}
        digest = hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = root / f"{site.replace(':', '-')}-{digest}"
        self.spans: dict[str, tuple[int, int]] = {}  # key -> (first row in its file, number of rows)
        self._writer = f"{rank}-{secrets.token_hex(8)}"
        self._places: dict[str, list[_Place]] = {}  # key -> where its features are; the first are those that are read
        self._checked: set[str] = set()  # whose first place was compared with its digest, or written by this process
        self._damaged: set[_Place] = set()
        self._widths: dict[str, int] = {}  # of each writer's rows
        self._rows: dict[str, Tensor] = {}  # of each writer's file
        delete_unfinished(root, DELETED)  # of a purge that was killed
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            description = self.folder / "ingredients.json"
            if not description.exists():
                self._replace(description, json.dumps(ingredients, indent=1, sort_keys=True))
        except OSError as error:
            raise _disk_error(self.folder, error) from error
        self.reload()

    @property
    def width(self) -> int:
        """H, or 0 while there is nothing."""
        return next(iter(self._widths.values()), 0)

    def reload(self) -> None:
        """Read the indices that other processes have written since."""
        for file in sorted(self.folder.glob("index-*.json")):
            writer = file.stem.removeprefix("index-")
            if writer == self._writer:
                continue
            try:
                index = json.loads(file.read_text())
                width = index["width"]
                places = {key: _Place(writer, *place) for key, place in index["places"].items()}
                _refuse_no_rows(list(places.values()), width)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                log.warning("%s: damaged, so what it names is computed again", file)
                continue
            self._widths[writer] = width
            self._rows.pop(writer, None)
            for key, place in places.items():
                known = self._places.setdefault(key, [])
                if place not in known and place not in self._damaged:
                    known.append(place)
                if known:
                    self._choose(key)

    def _choose(self, key: str) -> None:
        place = self._places[key][0]
        self.spans[key] = (place.first, place.count)

    def missing(self, keys: Iterable[str]) -> list[str]:
        """The keys whose features are nowhere, or damaged everywhere: what others wrote is compared with its digest."""
        found = []
        for key in dict.fromkeys(keys):
            while key in self.spans and key not in self._checked:
                if self._is_whole(self._places[key][0]):
                    self._checked.add(key)
                    break
                log.warning("%s: the features of image %s are damaged, and computed again", self.folder, key[:12])
                self._damaged.add(self._places[key].pop(0))
                if self._places[key]:
                    self._choose(key)
                else:
                    del self.spans[key]
            if key not in self.spans:
                found.append(key)
        return found

    def _is_whole(self, place: _Place) -> bool:
        file, width = self._data_file(place.writer), self._widths[place.writer] * self.dtype.itemsize
        if not file.is_file() or file.stat().st_size < (place.first + place.count) * width:
            return False
        with file.open("rb") as opened:
            opened.seek(place.first * width)
            return self._digest(opened.read(place.count * width), place.count, width) == place.sha256

    @staticmethod
    def _digest(data: bytes, count: int, width: int) -> str:
        """Of `count` rows of `width` bytes: the same bytes in another shape are other features."""
        return hashlib.sha256(f"{count} {width} ".encode() + data).hexdigest()

    def add(self, rows: Mapping[str, Tensor]) -> None:
        """Append the features (N_i, H) of images by key, and make them durable."""
        if not rows:
            return
        own = {key: place for key, places in self._places.items() for place in places if place.writer == self._writer}
        total = max((place.first + place.count for place in own.values()), default=0)
        data_file, width = self._data_file(self._writer), next(iter(rows.values())).shape[1]
        row = width * self.dtype.itemsize
        try:
            with open(data_file, "r+b" if data_file.exists() else "w+b") as file:
                file.truncate(total * width * self.dtype.itemsize)  # what a write that failed left behind
                file.seek(0, os.SEEK_END)
                for key, features in rows.items():
                    data = features.detach().to("cpu", self.dtype).contiguous().view(torch.uint8).numpy().tobytes()
                    file.write(data)
                    own[key] = _Place(self._writer, total, len(features), self._digest(data, len(features), row))
                    total += len(features)
                file.flush()
                os.fsync(file.fileno())
            places = {key: list(dataclasses.astuple(place)[1:]) for key, place in own.items()}
            self._replace(self.folder / f"index-{self._writer}.json", json.dumps({"width": width, "places": places}))
        except OSError as error:
            raise _disk_error(self.folder, error) from error
        self._widths[self._writer] = width
        self._rows.pop(self._writer, None)
        for key in rows:
            self._places[key] = [own[key], *(p for p in self._places.get(key, []) if p.writer != self._writer)]
            self._choose(key)
        self._checked |= set(rows)

    def _replace(self, file: Path, text: str) -> None:
        temporary = file.with_suffix(f".{self._writer}.tmp")
        temporary.write_text(text)
        os.replace(temporary, file)

    def _data_file(self, writer: str) -> Path:
        return self.folder / f"features-{writer}.bin"

    def features(self, key: str) -> Tensor:
        """(N, H) of one image in the cache's dtype, memory-mapped and read-only by convention."""
        place = self._places[key][0]
        if place.writer not in self._rows:
            raw = np.memmap(self._data_file(place.writer), dtype=np.uint8, mode="c")
            width = self._widths[place.writer] * self.dtype.itemsize
            self._rows[place.writer] = (
                torch.from_numpy(raw[: len(raw) // width * width]).view(-1, width).view(self.dtype)
            )
        return self._rows[place.writer][place.first : place.first + place.count]


def _refuse_no_rows(places: Sequence[_Place], width: Any) -> None:
    """Raises ValueError where an index names other things than rows of some width."""
    whole = (*(one for place in places for one in (place.first, place.count)), width)
    known = all(isinstance(place.sha256, str) for place in places)
    if not known or not all(type(one) is int and one >= 0 for one in whole) or width < 1:
        raise ValueError("an index of other things than rows")


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
    if distributed:  # one list for all, since another run may be adding to the cache; and nobody writes before it
        torch.distributed.broadcast_object_list(shared := [todo], src=0)
        todo = shared[0]
        torch.distributed.barrier()
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
