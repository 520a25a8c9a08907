"""The distinct images of a run, decoded and resized once; their views; and images of noise.

Benchmarks ask some fifteen questions about one image. Feature losses need each image once, so repeated bytes are merged
here. Families of a fixed resolution keep the pixels in memory; others preprocess an image when it is used.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fastvkd.models.families import family_of
from fastvkd.models.pooled import DecodedPhotos, in_threads
from fastvkd.models.visual_path import VisualBatch, batch_from_pixels, collate_images, encode_pixels
from fastvkd.photos import decode_image
from fastvkd.records import Photo
from fastvkd.unlearning.vkd.scenes import Scenes

# What views differ in. Degrees, a factor, and shares of the sides and of the light:
_TURN, _ZOOM, _SHIFT, _LIGHT = 10.0, 1.1, 1 / 16, 0.15
_GREY_SHARE = 0.2  # of the views; a face that is known by its shades must be closed, or kept, without its colours too
_LUMA = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)  # ITU-R BT.601, as in "L" images


@dataclass(frozen=True)
class Views:
    """How the images of a batch are augmented: image i is number `positions[i]` of the `total` of all ranks.

    So the ranks of a job see the views that one process would see with the whole batch.
    """

    seed: tuple[int, ...]
    positions: Sequence[int]
    total: int


@dataclass(frozen=True)
class NoiseImage:
    """An image of uniform RGB noise that its size (in pixels) and seeds tell apart; `key` names it in caches.

    `source` is the place of the photo whose size it has, for messages."""

    width: int
    height: int
    seed: int
    number: int
    source: str = field(default="", compare=False)

    @property
    def key(self) -> str:
        return f"noise-{self.seed}-{self.number}-{self.width}x{self.height}"

    def draw(self) -> Image.Image:
        noise = noise_image((self.width, self.height), (self.seed, 15, self.number))
        return _from(self.source, noise)


class ImageSet:
    """Images by position: `keys[i]` is the key of photo i, and `batch` gives any of them as model inputs.

    Args:
        photos: encoded images; repeated bytes are kept once, in order of first appearance.
        dtype: of the pixels kept in memory (fixed-resolution families only).
        pin: whether those lie in page-locked memory, from which copies to a GPU are asynchronous.
    """

    def __init__(self, photos: Sequence[Photo], processor: Any, model_config: Any, *, dtype: torch.dtype, pin: bool):
        self._photos = distinct(photos)
        self.keys = [photo.key for photo in self._photos]
        self._processor, self.config = processor, model_config
        self.fixed_resolution = family_of(model_config).fixed_resolution
        self._dtype, self._pin = dtype, pin
        self._pixels: Tensor | None = None  # (prepared images, 3, S, S)
        self._row_of = np.full(len(self._photos), -1)  # of an image in `_pixels`; -1: not prepared yet
        self._normalisation = _normalisation(processor.image_processor)
        self._decoded = DecodedPhotos()

    def __len__(self) -> int:
        return len(self._photos)

    def prepare(self, indices: Sequence[int]) -> None:
        """Decode and resize images ahead, many at once; `batch` would prepare what it lacks one batch at a time.

        A family without a fixed resolution keeps nothing. Raises DataError for an image that cannot be decoded.
        """
        lacking = [i for i in dict.fromkeys(indices) if self._row_of[i] < 0]
        if not lacking or not self.fixed_resolution:
            return

        def encode(chunk: list[int]) -> Tensor:
            return encode_pixels(self._processor, [self._decode_uncached(i) for i in chunk]).to(self._dtype)

        chunks = [lacking[start : start + 32] for start in range(0, len(lacking), 32)]
        encoded = in_threads(encode, chunks)
        known = [] if self._pixels is None else [self._pixels]
        self._row_of[lacking] = np.arange(len(lacking)) + sum(len(pixels) for pixels in known)
        self._pixels = torch.cat([*known, *encoded])
        if self._pin:
            self._pixels = self._pixels.pin_memory()

    def photo(self, index: int) -> Photo:
        return self._photos[index]

    def image(self, index: int) -> Image.Image:
        return self._decoded(self._photos[int(index)])

    def noise_like(self, index: int, seed: int, number: int) -> NoiseImage:
        """Noise of the size of image `index`."""
        return NoiseImage(*self.image(index).size, seed, number, self._photos[index].source)

    def collate(self, wanted: Sequence[int | NoiseImage]) -> VisualBatch:
        """Images by position and of noise as model inputs."""
        if all(isinstance(one, int) for one in wanted):
            return self.batch([one for one in wanted if isinstance(one, int)])
        pictures = [one.draw() if isinstance(one, NoiseImage) else self.image(one) for one in wanted]
        return collate_images(self._processor, self.config, pictures)

    def batch(self, indices: Sequence[int], views: Views | None = None, scenes: Scenes | None = None) -> VisualBatch:
        """The images `indices` as model inputs; with `views` each is seen anew (see `_views`), then in its scene."""
        if not self.fixed_resolution:
            return collate_images(self._processor, self.config, self.pictures(indices, views, scenes))
        pixels = self._prepared(indices)
        if views is not None:
            pixels = _views(pixels, views, *self._normalisation)
        if scenes is not None:
            pixels = scenes.apply(pixels, self._prepared(scenes.other))
        return batch_from_pixels(self._processor, self.config, pixels)

    def pictures(
        self, indices: Sequence[int], views: Views | None = None, scenes: Scenes | None = None
    ) -> list[Image.Image]:
        """The images `indices` themselves; with `views` each is seen anew, with `scenes` in its scene."""
        images = in_threads(self.image, indices)
        if views is not None:
            seen = list(zip(images, views.positions, strict=True))
            images = in_threads(lambda one: _view_of_image(one[0], (*views.seed, one[1])), seen)
        if scenes is not None:
            for i in scenes.moved:
                images[i] = _scene_of_image(scenes.of(i), images[i], self.image(int(scenes.other[i])))
        return images

    def _prepared(self, indices: Sequence[int] | np.ndarray) -> Tensor:
        """(B, 3, S, S) pixels of images of a fixed resolution."""
        self.prepare([int(i) for i in indices])
        assert self._pixels is not None
        return self._pixels[torch.from_numpy(self._row_of[np.asarray(indices, dtype=np.int64)])]

    def _decode_uncached(self, index: int) -> Image.Image:
        photo = self._photos[index]
        return decode_image(photo.data, photo.source)


def distinct(photos: Sequence[Photo]) -> list[Photo]:
    """The first photo of each key, in order."""
    found: dict[str, Photo] = {}
    for photo in photos:
        found.setdefault(photo.key, photo)
    return list(found.values())


def _normalisation(image_processor: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (3, 1, 1) that the processor took off the colours, which lay in [0, 1]."""
    if not getattr(image_processor, "do_normalize", False):
        return torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in (image_processor.image_mean, image_processor.image_std))
    return mean, deviation


def _views(pixels: Tensor, views: Views, mean: Tensor, deviation: Tensor) -> Tensor:
    """(B, 3, H, W) -> the same: each is turned, zoomed in or out, shifted (the border goes on outside) and lit anew.

    Every second one is mirrored, one in five is grey. `mean` and `deviation` (3, 1, 1) are those of the pixels'
    normalisation.
    """
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
    seen = _views(_pixels_of(image), Views(tuple(seed), [0], 1), torch.zeros(3, 1, 1), torch.ones(3, 1, 1))
    return _from(image.info.get("source", ""), _image_of(seen))


def _scene_of_image(scene: Scenes, image: Image.Image, other: Image.Image) -> Image.Image:
    """An image in its scene, its size kept."""
    seen = scene.apply(_pixels_of(image), _pixels_of(other.resize(image.size)))
    return _from(image.info.get("source", ""), _image_of(seen))


def _pixels_of(image: Image.Image) -> Tensor:
    """(1, 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255


def _image_of(pixels: Tensor) -> Image.Image:
    return Image.fromarray((pixels[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy(), "RGB")


def _from(source: str, image: Image.Image) -> Image.Image:
    """The image, made from a photo at `source`: whoever refuses it names that, as for the photo itself."""
    image.info = {"source": source} if source else {}
    return image


def noise_image(size: tuple[int, int], seed: Sequence[int]) -> Image.Image:
    """Uniform RGB noise of `size` (width, height); the same seed gives the same image."""
    rng = np.random.default_rng(list(seed))
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8), "RGB")
