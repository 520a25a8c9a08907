"""Edited photos: is a forgotten face recognised again when it is cropped, blurred, grey, noisy, mirrored or compressed?

Unlearning that works for the photos as they are may fail for photos that look a little different to the tower.
"""

import io
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from fastvkd.attacks.asking import Asked
from fastvkd.photos import decode_image
from fastvkd.records import Photo


def crop(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """80 % of either side, at a random place, at the old size."""
    width, height = image.size
    kept_width, kept_height = max(1, round(0.8 * width)), max(1, round(0.8 * height))
    x, y = int(rng.integers(width - kept_width + 1)), int(rng.integers(height - kept_height + 1))
    return image.crop((x, y, x + kept_width, y + kept_height)).resize((width, height), Image.Resampling.BICUBIC)


def blur(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Gaussian, standard deviation 1.5 % of the shorter side."""
    return image.filter(ImageFilter.GaussianBlur(0.015 * min(image.size)))


def grayscale(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    return ImageOps.grayscale(image).convert("RGB")


def noise(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Gaussian, standard deviation 20 of 255, on every channel."""
    noisy = np.asarray(image, dtype=np.float32) + rng.normal(0, 20, (*image.size[::-1], 3))
    return Image.fromarray(noisy.clip(0, 255).round().astype(np.uint8))


def flip(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Left and right exchanged."""
    return ImageOps.mirror(image)


def jpeg(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Compressed at quality 20."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=20)
    return Image.open(buffer).convert("RGB")


EDITS: dict[str, Callable[[Image.Image, np.random.Generator], Image.Image]] = {
    "crop": crop,
    "blur": blur,
    "grayscale": grayscale,
    "noise": noise,
    "flip": flip,
    "jpeg": jpeg,
}


def edited(photo: Photo, edit: str, seed: int) -> Photo:
    """The photo after an edit of `EDITS`, as PNG; the same bytes and seed give the same result."""
    rng = np.random.default_rng([seed, 34, int(photo.key[:8], 16)])
    buffer = io.BytesIO()
    EDITS[edit](decode_image(photo.data, photo.source), rng).save(buffer, "PNG", compress_level=1)
    return Photo(buffer.getvalue(), f"{photo.source} ({edit})")


def with_edited_photos(asked: Sequence[Asked], edit: str, seed: int) -> list[Asked]:
    """The same questions about the edited photos; each photo is edited once."""
    found: dict[int, Photo] = {}
    for one in asked:
        if id(one.photo) not in found:
            found[id(one.photo)] = edited(one.photo, edit, seed)
    return [Asked(one.entity, found[id(one.photo)], one.choice) for one in asked]
