"""Image bytes that nobody has vetted: every kind of damage is a one-line error, and a bomb is never decoded."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from fastvkd.errors import DataError
from fastvkd.photos import FORMATS, content_hash, decode_image


def encoded(mode: str, fmt: str, size=(20, 12)) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, fmt)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("mode", "fmt"), [("RGB", "PNG"), ("RGBA", "PNG"), ("P", "GIF"), ("L", "JPEG"), ("CMYK", "JPEG"), ("RGB", "WEBP")]
)
def test_every_mode_becomes_rgb(mode, fmt):
    image = decode_image(encoded(mode, fmt), "x")
    assert image.mode == "RGB" and image.size == (20, 12)


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (20, 12)).save(buffer, "JPEG", exif=exif)
    assert decode_image(buffer.getvalue(), "x").size == (12, 20)


@pytest.mark.fault("damaged data")
@pytest.mark.parametrize(
    ("data", "needle"),
    [
        (b"", "empty"),
        (b"not an image at all", "unreadable"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "unreadable"),
        (encoded("RGB", "PNG", (300, 300))[:120], "damaged"),
        (encoded("RGB", "JPEG", (300, 300))[:700], "damaged"),
        (png_header(10_000, 10_000), "100 megapixels"),
        (png_header(60_000, 60_000), "refused"),
    ],
)
def test_bad_bytes_are_one_line_errors(data, needle):
    with pytest.raises(DataError, match=needle) as caught:
        decode_image(data, "forget.parquet:3")
    assert str(caught.value).startswith("forget.parquet:3: ") and "\n" not in str(caught.value)


@pytest.mark.fault("damaged data")
def test_a_flipped_byte_never_escapes_as_another_error():
    whole = {fmt: encoded("RGB", fmt, (24, 24)) for fmt in FORMATS}
    for data in whole.values():
        for position in range(0, len(data), max(1, len(data) // 60)):
            damaged = data[:position] + bytes([data[position] ^ 0xFF]) + data[position + 1 :]
            try:
                decode_image(damaged, "x")
            except DataError as error:
                assert "\n" not in str(error)


def test_content_hash_tells_bytes_apart():
    assert content_hash(b"a") != content_hash(b"b") and len(content_hash(b"a")) == 64


RAMP = np.linspace(0, 1, 2500).reshape(50, 50)
DEEP = [
    ((RAMP * 65535).astype(np.uint16), "PNG"),
    ((RAMP * 65535).astype(np.uint16), "TIFF"),
    ((RAMP * 65535).astype(np.uint16), "PPM"),
    ((RAMP * 65535).astype(">u2"), "TIFF"),
    ((RAMP * 65535).astype(np.int32), "TIFF"),
    ((RAMP * 255).astype(np.int32), "TIFF"),
    (RAMP.astype(np.float32), "TIFF"),
    ((RAMP * 255).astype(np.float32), "TIFF"),
    ((RAMP * 65535).astype(np.float32), "TIFF"),
]


def saved(pixels: np.ndarray, fmt: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, fmt)
    return buffer.getvalue()


@pytest.mark.fault("damaged data")
@pytest.mark.parametrize(("pixels", "fmt"), DEEP, ids=[f"{fmt}-{pixels.dtype}" for pixels, fmt in DEEP])
def test_pixels_of_more_than_eight_bits_are_scaled(pixels, fmt):
    read = np.asarray(decode_image(saved(pixels, fmt), "x"))
    assert read.shape == (50, 50, 3)
    np.testing.assert_allclose(read[..., 0], RAMP * 255, atol=1.0)


@pytest.mark.fault("damaged data")
@pytest.mark.parametrize("pixels", [RAMP - 0.5, RAMP * 1e9, np.full((4, 4), np.nan)])
def test_pixels_of_no_known_range_are_refused(pixels):
    with pytest.raises(DataError, match=r"whose range is unknown.*save the photo with 8 bits"):
        decode_image(saved(pixels.astype(np.float32), "TIFF"), "x.tiff")
