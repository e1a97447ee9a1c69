"""Decoding: every kind of image there is, whole and damaged."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from declip.data import decode
from declip.data.decode import Pixels, count_pixels, decode_image


def picture(height: int, width: int) -> Pixels:
    """Smooth colours with some noise."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    return np.clip(smooth + rng.integers(-20, 21, smooth.shape), 0, 255).astype(np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def test_decode_keeps_pixels() -> None:
    image = picture(20, 30)
    decoded = decode_image(encoded(Image.fromarray(image)))
    np.testing.assert_array_equal(decoded, image)
    assert decoded.dtype == np.uint8
    assert decoded.flags.c_contiguous
    assert decoded.flags.writeable


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_alpha_is_laid_on_white(kind: str) -> None:
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[:2] = (200, 0, 0, 255)
    pixels[2:] = (200, 0, 0, 0)
    decoded = decode_image(encoded(Image.fromarray(pixels), kind, lossless=True))
    assert (decoded[:2] == (200, 0, 0)).all()
    assert (decoded[2:] == 255).all()


def test_half_alpha_and_grey_alpha() -> None:
    decoded = decode_image(encoded(Image.new("LA", (3, 3), (0, 128))))
    assert (np.abs(decoded.astype(int) - 127) <= 1).all()


def test_transparent_palette() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putdata([0, 1])
    decoded = decode_image(encoded(palette, transparency=1))
    assert decoded.tolist() == [[[10, 20, 30], [255, 255, 255]]]


def test_other_modes() -> None:
    assert (decode_image(encoded(Image.new("L", (2, 2), 77))) == 77).all()
    assert (decode_image(encoded(Image.new("1", (2, 2), 1))) == 255).all()
    assert decode_image(encoded(Image.new("CMYK", (2, 2)), "JPEG")).shape == (2, 2, 3)
    deep = Image.fromarray(np.full((2, 2), 0x8000, np.uint16))
    assert (decode_image(encoded(deep)) == 0x80).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_upright_as_exif_says(orientation: int) -> None:
    pixels = picture(40, 64)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(pixels)
    decoded = decode_image(encoded(stored, "PNG", exif=exif))
    transposed = pixels.transpose(1, 0, 2) if orientation > 4 else pixels
    ways = {1: transposed, 2: transposed[:, ::-1], 3: transposed[::-1, ::-1], 4: transposed[::-1]}
    turned = {5: transposed, 6: transposed[:, ::-1], 7: transposed[::-1, ::-1], 8: transposed[::-1]}
    np.testing.assert_array_equal(decoded, (ways | turned)[orientation])


def test_an_image_too_large_to_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its header, before a pixel is decoded."""
    with pytest.raises(ValueError, match=r"it has 12000 x 12000 pixels, more than 134,217,728"):
        decode_image(huge_png(12_000, 12_000))
    monkeypatch.setattr(decode, "MOST_PIXELS", 99)
    with pytest.raises(ValueError, match="it has 10 x 10 pixels, more than 99"):
        decode_image(encoded(Image.new("RGB", (10, 10))))


def huge_png(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims a size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0" * 100)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


@pytest.mark.parametrize("side", [12_000, 60_000])
def test_pixels_are_counted_by_the_header(side: int) -> None:
    assert count_pixels(encoded(Image.new("RGB", (7, 3)))) == 21
    for data in (huge_png(side, side), b"no image"):
        with pytest.raises(ValueError, match="cannot be decoded"):
            count_pixels(data)


def test_first_frame_of_an_animation_and_contents_before_names() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    decoded = decode_image(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert decoded[0, 0].tolist() == [255, 0, 0]
    for size in ((1, 1), (1, 5000), (5000, 1)):
        assert decode_image(encoded(Image.new("RGB", size), "BMP")).shape == (size[1], size[0], 3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_damaged_bytes_give_pixels_or_value_error(kind: str, data: st.DataObject) -> None:
    damaged = bytearray(encoded(Image.fromarray(picture(24, 24)), kind))
    for _ in range(data.draw(st.integers(0, 5))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        pixels = decode_image(bytes(damaged[: data.draw(st.integers(0, len(damaged)))]))
    except ValueError as error:
        # Nothing else is raised; what is not ours says so too.
        said = str(error)
    else:
        said = "the image cannot be decoded" if pixels.dtype == np.uint8 and pixels.ndim == 3 else "no pixels"
    assert said.startswith("the image cannot be decoded")
