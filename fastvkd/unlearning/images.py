"""The distinct images of a run, decoded and resized once, and the order in which training visits them.

Benchmarks ask some fifteen questions about one image; the feature losses need each image once, so repeated bytes are
merged here. Where a family has a fixed resolution the pixels stay in memory; elsewhere images are preprocessed when
used.
"""

import itertools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fastvkd.data.images import content_hash, decode_image
from fastvkd.data.records import Photo
from fastvkd.models.families import family_of
from fastvkd.models.visual_path import VisualBatch, batch_from_pixels, collate_images, encode_pixels

# What views differ in. Degrees, a factor, and shares of the sides and of the light:
_TURN, _ZOOM, _SHIFT, _LIGHT = 10.0, 1.1, 1 / 16, 0.15
_GREY_SHARE = 0.2  # of the views; a face that is known by its shades must be closed, or kept, without its colours too
_LUMA = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)  # ITU-R BT.601, as in "L" images


@dataclass(frozen=True)
class Views:
    """How the images of a batch are augmented: image i is number `positions[i]` of the `total` of all ranks.

    The ranks of a job therefore see the views that one process would see with the whole batch.
    """

    seed: tuple[int, ...]
    positions: Sequence[int]
    total: int


class ImageSet:
    """Images by position: `hashes[i]` (content hash, hex), and batches of any of them.

    Args:
        photos: encoded images; repeated bytes are kept once, in order of first appearance.
        dtype: of the pixels kept in memory (fixed-resolution families only).
        pin: whether those lie in page-locked memory, from which copies to a GPU are asynchronous.
    """

    def __init__(self, photos: Sequence[Photo], processor: Any, model_config: Any, *, dtype: torch.dtype, pin: bool):
        self._photos = list(self.distinct(photos).items())
        self.hashes = [digest for digest, _ in self._photos]
        self._processor, self._config = processor, model_config
        self._fixed_resolution = family_of(model_config).fixed_resolution
        self._dtype, self._pin = dtype, pin
        self._pixels: Tensor | None = None  # (prepared images, 3, S, S)
        self._row_of = np.full(len(self._photos), -1)  # of an image in `_pixels`; -1: not prepared yet
        self._normalisation = _normalisation(processor.image_processor)
        self._decode = lru_cache(maxsize=2048)(self._decode_uncached)

    @staticmethod
    def distinct(photos: Sequence[Photo]) -> dict[str, Photo]:
        """Content hash -> photo, in order of first appearance."""
        found: dict[str, Photo] = {}
        for photo in photos:
            found.setdefault(content_hash(photo.data), photo)
        return found

    def __len__(self) -> int:
        return len(self._photos)

    def prepare(self, indices: Sequence[int]) -> None:
        """Decode and resize images ahead, many at once. Not needed for `batch`, which prepares what it lacks.

        Does nothing where the family has no fixed resolution. Raises DataError for an image that cannot be decoded.
        """
        lacking = [i for i in dict.fromkeys(indices) if self._row_of[i] < 0]
        if not lacking or not self._fixed_resolution:
            return

        def encode(chunk: list[int]) -> Tensor:
            return encode_pixels(self._processor, [self._decode_uncached(i) for i in chunk]).to(self._dtype)

        chunks = [lacking[start : start + 32] for start in range(0, len(lacking), 32)]
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads:  # Pillow works without the GIL
            encoded = list(threads.map(encode, chunks))
        known = [] if self._pixels is None else [self._pixels]
        self._row_of[lacking] = np.arange(len(lacking)) + sum(len(pixels) for pixels in known)
        self._pixels = torch.cat([*known, *encoded])
        if self._pin:
            self._pixels = self._pixels.pin_memory()

    def image(self, index: int) -> Image.Image:
        return self._decode(index)

    def size(self, index: int) -> tuple[int, int]:
        """(width, height) of image `index` in pixels."""
        return self._decode(index).size

    def batch(self, indices: Sequence[int], views: Views | None = None) -> VisualBatch:
        """The images `indices` as model inputs; with `views` each is seen anew (see `_views`)."""
        if not self._fixed_resolution:
            images = [self._decode(int(i)) for i in indices]
            if views is not None:
                images = [
                    _view_of_image(image, (*views.seed, position))
                    for image, position in zip(images, views.positions, strict=True)
                ]
            return collate_images(self._processor, self._config, images)
        self.prepare(indices)
        assert self._pixels is not None
        pixels = self._pixels[torch.from_numpy(self._row_of[np.asarray(indices, dtype=np.int64)])]
        if views is not None:
            pixels = _views(pixels, views, *self._normalisation)
        return batch_from_pixels(self._processor, self._config, pixels)

    def _decode_uncached(self, index: int) -> Image.Image:
        photo = self._photos[index][1]
        return decode_image(photo.data, photo.source)


def _normalisation(image_processor: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (3, 1, 1) that the processor took off the colours, which lay in [0, 1]."""
    if not getattr(image_processor, "do_normalize", False):
        return torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in (image_processor.image_mean, image_processor.image_std))
    return mean, deviation


def _views(pixels: Tensor, views: Views, mean: Tensor, deviation: Tensor) -> Tensor:
    """(B, 3, H, W) -> the same: each turned, zoomed in or out, shifted (the border goes on outside) and lit anew, every
    second mirrored, one in five grey. `mean` and `deviation` (3, 1, 1) are those of the pixels' normalisation."""
    rng, of = np.random.default_rng(views.seed), np.asarray(views.positions)

    def drawn(low: float, high: float) -> np.ndarray:
        return rng.uniform(low, high, views.total)[of]

    turn, zoom = np.deg2rad(drawn(-_TURN, _TURN)), np.exp(drawn(-np.log(_ZOOM), np.log(_ZOOM)))
    # grid_sample's coordinates run from -1 to 1, so a share of a side is twice as much; from there to pixels and back
    # again, or turning an image that is no square would shear it.
    right, down = drawn(-2 * _SHIFT, 2 * _SHIFT), drawn(-2 * _SHIFT, 2 * _SHIFT)
    mirror = np.where(drawn(0, 1) < 0.5, -1.0, 1.0)
    ratio = pixels.shape[-2] / pixels.shape[-1]
    cos, sin = zoom * np.cos(turn), zoom * np.sin(turn)
    affine = np.stack([mirror * cos, -sin * ratio, right, mirror * sin / ratio, cos, down], axis=-1)
    grid = F.affine_grid(torch.from_numpy(affine).float().view(-1, 2, 3), list(pixels.shape), align_corners=False)
    light = torch.from_numpy(drawn(1 - _LIGHT, 1 + _LIGHT)).float().view(-1, 1, 1, 1)
    seen = light * F.grid_sample(pixels.float(), grid, padding_mode="border", align_corners=False)
    grey = torch.from_numpy(drawn(0, 1) < _GREY_SHARE)
    luma = ((seen[grey] * deviation + mean) * _LUMA).sum(1, keepdim=True)
    seen[grey] = (luma - mean) / deviation
    return seen.to(pixels.dtype)


def _view_of_image(image: Image.Image, seed: Sequence[int]) -> Image.Image:
    """The same kinds of view for an image whose size decides the number of tokens, so its size is kept."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    seen = _views(pixels, Views(tuple(seed), [0], 1), torch.zeros(3, 1, 1), torch.ones(3, 1, 1))[0]
    return Image.fromarray((seen.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy(), "RGB")


def noise_image(size: tuple[int, int], seed: Sequence[int]) -> Image.Image:
    """Uniform RGB noise of `size` (width, height); the same seed gives the same image."""
    rng = np.random.default_rng(list(seed))
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8), "RGB")


def draw(population: int, start: int, count: int, seed: Sequence[int]) -> list[int]:
    """Entries start ... start + count of an endless sequence of permutations of range(population).

    It has no state: any rank or a resumed run can ask for any part of it.
    """
    drawn: list[int] = []
    position = start
    while len(drawn) < count:
        turn, offset = divmod(position, population)
        order = np.random.default_rng([*seed, turn]).permutation(population)
        take = order[offset : offset + count - len(drawn)]
        drawn += [int(i) for i in take]
        position += len(take)
    return drawn


class BatchPlan:
    """Which images make up step `t` on rank `r`: as many of each kind on every rank and step.

    `auxiliary` images take `auxiliary_share` of the retained part of a batch and count as retained.
    """

    def __init__(
        self,
        forget: Sequence[int],
        retain: Sequence[int],
        *,
        batch_size: int,
        forget_share: float,
        seed: int,
        auxiliary: Sequence[int] = (),
        auxiliary_share: float = 0.0,
    ):
        self.forget, self.retain, self.auxiliary, self.seed = list(forget), list(retain), list(auxiliary), seed
        self.forget_per_rank = min(batch_size - 1, max(1, round(batch_size * forget_share)))
        kept = batch_size - self.forget_per_rank
        self.auxiliary_per_rank = round(kept * auxiliary_share) if self.auxiliary else 0
        self.retain_per_rank = kept - self.auxiliary_per_rank

    def indices(self, step: int, rank: int, world_size: int) -> tuple[list[int], list[int]]:
        """(forget, retained) image indices of micro-batch `step`, counted from 0."""

        def part(of: list[int], each: int, salt: int) -> list[int]:
            if not each:
                return []
            chosen = draw(len(of), (step * world_size + rank) * each, each, (self.seed, salt))
            return [of[i] for i in chosen]

        retained = part(self.retain, self.retain_per_rank, 12) + part(self.auxiliary, self.auxiliary_per_rank, 17)
        return part(self.forget, self.forget_per_rank, 11), retained

    def visited(self, steps: int, world_size: int) -> set[int]:
        """The images that any rank takes in the first `steps` micro-batches."""
        seen: set[int] = set()
        everything = len(self.forget) + len(self.retain) + (len(self.auxiliary) if self.auxiliary_per_rank else 0)
        for step, rank in itertools.product(range(steps), range(world_size)):
            for part in self.indices(step, rank, world_size):
                seen.update(part)
            if len(seen) == everything:
                break
        return seen

    def positions(self, rank: int, world_size: int) -> list[int]:
        """Where the images of `indices` stand in the batch of one process that takes all ranks' images at once."""
        found: list[int] = []
        start = 0
        for each in (self.forget_per_rank, self.retain_per_rank, self.auxiliary_per_rank):
            found += range(start + rank * each, start + (rank + 1) * each)
            start += world_size * each
        return found
