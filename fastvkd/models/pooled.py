"""What many images take: threads, since Pillow and NumPy work without the GIL, and memory that has a bound."""

import copy
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import BatchFeature

from fastvkd.photos import decode_image
from fastvkd.records import Photo

Item = TypeVar("Item")
Made = TypeVar("Made")

DECODED_BYTES = 2 << 30  # of host memory, for images that are asked for again: 680 of 1024 px a side


def workers() -> int:
    """Threads that this process may keep busy: its share of the machine's cores, 16 at the most."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def in_threads(work: Callable[[Item], Made], items: Iterable[Item]) -> list[Made]:
    """`work` on each item, in order, by `workers` threads."""
    items = list(items)
    count = min(workers(), len(items))
    if count < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(count, "fastvkd-photos") as threads:
        return list(threads.map(work, items))


def pooled(processor: Any) -> Any:
    """The same processor with the images of a batch in threads, each by itself; batches are those of `processor`."""
    own = copy.copy(processor)
    own.image_processor = _PooledImages(processor.image_processor)
    return own


class _PooledImages:
    """An image processor that is asked for one image at a time. Of the rest it is the one that it stands for."""

    def __init__(self, image_processor: Any) -> None:
        self._image_processor = image_processor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._image_processor, name)

    def __call__(self, images: Any, *args: Any, **kwargs: Any) -> BatchFeature:
        if not isinstance(images, list | tuple) or len(images) < 2 or args:
            return self._image_processor(images, *args, **kwargs)
        ones = in_threads(lambda image: self._image_processor([image], **kwargs), images)
        return BatchFeature({key: _joined([one[key] for one in ones]) for key in ones[0]})


def _joined(parts: Sequence[Any]) -> Any:
    """One value for all images of what there is for each; where they have unequal numbers of crops, zeros follow."""
    if not isinstance(parts[0], Tensor):
        return [entry for part in parts for entry in part]
    if len({part.shape[1:] for part in parts}) > 1 and all(len(part) == 1 for part in parts):  # (1, crops, ...)
        most = max(part.shape[1] for part in parts)
        parts = [F.pad(part, (0, 0) * (part.dim() - 2) + (0, most - part.shape[1])) for part in parts]
    return torch.cat(list(parts))


class Recent(Generic[Made]):
    """What was made last, by key, in `limit` bytes of memory at the most; what was asked for longest ago goes first.

    Threads may share one. The newest is kept whatever its size, so that nothing is made twice in a row.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._bytes = limit, 0
        self._kept: OrderedDict[Hashable, tuple[Made, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._kept

    def get(self, key: Hashable, make: Callable[[], tuple[Made, int]]) -> Made:
        """What is kept under `key`, or else what `make` gives, with its bytes."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key][0]
        made, size = make()
        with self._lock:
            self._bytes += size - self._kept.pop(key, (made, 0))[1]
            self._kept[key] = made, size
            while self._bytes > self._limit and len(self._kept) > 1:
                self._bytes -= self._kept.popitem(last=False)[1][1]
        return made


class DecodedPhotos:
    """Photos as images, those of late without decoding them again."""

    def __init__(self) -> None:
        self._recent: Recent[Image.Image] = Recent(DECODED_BYTES)

    def __call__(self, photo: Photo) -> Image.Image:
        """Raises `DataError` for a photo that cannot be decoded."""

        def decode() -> tuple[Image.Image, int]:
            image = decode_image(photo.data, photo.source)
            return image, 3 * image.width * image.height

        return self._recent.get(photo.key, decode)
