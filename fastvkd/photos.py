"""Decoding of image bytes from datasets that nobody has vetted: what cannot be used is refused with its place named,
and an image too large to be honest is refused before a pixel is decoded. Resizing belongs to the model's processor.
"""

import hashlib
import io
import struct
import warnings
import zlib

from PIL import Image, ImageOps

from fastvkd.errors import DataError, one_line
from fastvkd.files import lfs_pointer

MAX_PIXELS = 50_000_000  # a decoded RGB image of this size takes 150 MB
# Raster formats with decoders of Pillow's own: an EPS file, for one, would start Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
# What Pillow's decoders raise on damaged files; UnidentifiedImageError and truncated files are OSErrors.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct.error, zlib.error)


def content_hash(data: bytes) -> str:
    """SHA-256 of the encoded bytes, in hex: the identity of an image across splits and caches."""
    return hashlib.sha256(data).hexdigest()


def decode_image(data: bytes, source: str) -> Image.Image:
    """Encoded bytes -> an upright RGB image (EXIF orientation applied, the first frame of an animation).

    `source` says where the bytes came from and opens the message. Raises `DataError` for empty or unreadable bytes, a
    format outside `FORMATS`, and more than `MAX_PIXELS` pixels (checked on the header, before decoding).
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
        upright = ImageOps.exif_transpose(image).convert("RGB")
    except _DECODE_ERRORS as error:
        raise DataError(
            f"{source}: damaged {image.format} image ({len(data)} bytes; {one_line(error)}); replace it or drop the row"
        ) from error
    upright.info = {"source": source}  # for whoever refuses it later
    return upright
