"""Decoding of image bytes from datasets that nobody has vetted: what cannot be used is refused with its place named,
and an image too large to be honest is refused before a pixel is decoded. Resizing belongs to the model's processor.
"""

import hashlib
import io
import struct
import warnings
import zlib

import numpy as np
from PIL import Image, ImageOps

from fastvkd.errors import DataError, one_line
from fastvkd.files import lfs_pointer

MAX_PIXELS = 50_000_000  # a decoded RGB image of this size takes 150 MB
# Raster formats with decoders of Pillow's own: an EPS file, for one, would start Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_BITS_PER_SAMPLE = 258  # TIFF tag
# What Pillow's decoders raise on damaged files; UnidentifiedImageError and truncated files are OSErrors.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct.error, zlib.error)


def content_hash(data: bytes) -> str:
    """SHA-256 of the encoded bytes, in hex: the identity of an image across splits and caches."""
    return hashlib.sha256(data).hexdigest()


def decode_image(data: bytes, source: str) -> Image.Image:
    """Encoded bytes -> an upright RGB image (EXIF orientation applied, the first frame of an animation).

    Grey pixels of more than 8 bits, integer or float, are scaled to 8 bits by the range that their format has (see
    `_eight_bits`). `source` says where the bytes came from and opens the message. Raises `DataError` for empty or
    unreadable bytes, a format outside `FORMATS`, more than `MAX_PIXELS` pixels (checked on the header, before
    decoding), and pixels whose range nobody can tell.
    """
    if not data:
        raise DataError(f"{source}: the image is empty (0 bytes); replace it or drop the row")
    if pointer := lfs_pointer(data):
        raise DataError(f"{source}: the image {pointer}")
    with warnings.catch_warnings():
        # Pillow warns of sizes that are an error here (checked below) and of tags that are not read.
        warnings.simplefilter("ignore")
        return _decode(data, source)


def _decode(data: bytes, source: str) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise DataError(f"{source}: image refused, {one_line(error)}; resize it below 50 megapixels") from error
    except _DECODE_ERRORS as error:
        raise DataError(
            f"{source}: unreadable image ({len(data)} bytes; {one_line(error)}); allowed: {', '.join(FORMATS)}"
        ) from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise DataError(
            f"{source}: the image is {width} x {height}, that is {width * height / 1e6:.0f} megapixels; "
            f"at most {MAX_PIXELS / 1e6:.0f} are decoded; resize it"
        )
    try:
        upright = ImageOps.exif_transpose(image)
        seen = (_eight_bits(upright, image, source) if upright.mode[0] in "IF" else upright).convert("RGB")
    except _DECODE_ERRORS as error:
        raise DataError(
            f"{source}: damaged {image.format} image ({len(data)} bytes; {one_line(error)}); replace it or drop the row"
        ) from error
    seen.info = {"source": source}  # for whoever refuses it later
    return seen


def _eight_bits(pixels: Image.Image, opened: Image.Image, source: str) -> Image.Image:
    """Grey pixels of 16 or 32 bits -> 8 bits. Pillow's own conversion cuts off at 255 instead.

    The range is that of the format: 16 bits, or as many as a TIFF file says. Integers of 32 bits and floats have no
    range of their own: they are taken to run to the first of 1 (floats), 255 and 65535 that no pixel exceeds. `opened`
    is the file as Pillow opened it. Raises `DataError` for other values.
    """
    values = np.asarray(pixels, dtype=np.float64)
    low, high = float(values.min()), float(values.max())
    if pixels.mode.startswith("I;16"):
        bits = getattr(opened, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))[0]
        top = float(2**bits - 1)
    elif opened.format == "PPM" and pixels.mode == "I":
        top = 65535.0  # Pillow scales them to it
    else:
        ranges = (1.0, 255.0, 65535.0) if pixels.mode == "F" else (255.0, 65535.0)
        top = next((end for end in ranges if high <= end), 0.0)
    if not top or not low >= 0:
        raise DataError(
            f"{source}: pixels from {low:g} to {high:g}, whose range is unknown (0 to 1, 255 or 65535 are read); "
            "save the photo with 8 bits"
        )
    return Image.fromarray(np.rint(values * (255.0 / top)).astype(np.uint8))
