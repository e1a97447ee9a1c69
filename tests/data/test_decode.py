"""Decoding: every kind of image there is, whole and damaged."""

from __future__ import annotations

import io
import re
import struct
import zlib
from unittest import mock

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import picture
from PIL import Image

from declip.data import decode
from declip.data.decode import ImageFile, Pixels, as_rgb, count_pixels, decode_image


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
    # A JPEG is turned by its header, whole or reduced.
    data = encoded(stored, "JPEG", exif=exif, quality=95)
    np.testing.assert_array_equal(decode_image(data), by_pillow(data))
    file = ImageFile(data)
    assert (file.height, file.width) == decoded.shape[:2]
    half = np.asarray(Image.fromarray(decode_image(data)).reduce(2)).astype(int)
    assert np.abs(file.decode(2) - half).mean() < 4


def by_pillow(data: bytes) -> Pixels:
    """The slow way of `decode_image`, which it takes where a JPEG is damaged or of a kind of its own."""
    with mock.patch.object(simplejpeg, "decode_jpeg", side_effect=ValueError):
        return decode_image(data)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("size", [(48, 64), (37, 53), (5, 6), (1, 1), (7, 200)])
@pytest.mark.parametrize(
    "options",
    [{}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True}, {"optimize": True}, {"restart_marker_rows": 1}],
    ids=str,
)
def test_jpegs_are_as_pillow_decodes_them(mode: str, size: tuple[int, int], options: dict[str, object]) -> None:
    data = encoded(Image.fromarray(picture(*size)).convert(mode), "JPEG", quality=90, **options)
    decoded = decode_image(data)
    np.testing.assert_array_equal(decoded, by_pillow(data))
    assert decoded.flags.c_contiguous
    assert decoded.flags.writeable


def test_jpeg_that_stores_rgb() -> None:
    data = encoded(Image.fromarray(picture(30, 40)), "JPEG", keep_rgb=True)
    np.testing.assert_array_equal(decode_image(data), by_pillow(data))


@pytest.mark.parametrize("reduction", [2, 4, 8])
@pytest.mark.parametrize("progressive", [False, True])
def test_reduced_jpegs_are_means_of_pixels(reduction: int, progressive: bool) -> None:
    for height, width in ((96, 128), (89, 131)):
        data = encoded(Image.fromarray(picture(height, width)), "JPEG", quality=90, progressive=progressive)
        wanted = np.asarray(Image.fromarray(decode_image(data)).reduce(reduction)).astype(int)
        reduced = ImageFile(data).decode(reduction)
        assert reduced.shape == wanted.shape == (-(-height // reduction), -(-width // reduction), 3)
        assert np.abs(reduced - wanted).mean() < 4


def test_what_is_no_plain_jpeg_comes_whole() -> None:
    image = Image.fromarray(picture(64, 64))
    for data in (encoded(image), encoded(image.convert("CMYK"), "JPEG")):
        np.testing.assert_array_equal(ImageFile(data).decode(4), decode_image(data))


def test_turned_jpegs_are_reduced_by_what_divides_them() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for width, reduced in ((80, (10, 8)), (84, (21, 16)), (83, (83, 64))):
        file = ImageFile(encoded(Image.fromarray(picture(64, width)), "JPEG", exif=exif))
        assert file.decode(8).shape[:2] == reduced


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_damaged_jpegs_are_as_pillow_finds_them(data: st.DataObject) -> None:
    options = {"progressive": data.draw(st.booleans()), "quality": 90}
    damaged = bytearray(encoded(Image.fromarray(picture(24, 40)), "JPEG", **options))
    for _ in range(data.draw(st.integers(0, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(damaged[: data.draw(st.integers(len(damaged) // 2, len(damaged)))])
    try:
        wanted = by_pillow(cut)
    except ValueError as error:
        said = re.escape(str(error).split(" object at ")[0])
        with pytest.raises(ValueError, match=said):
            decode_image(cut)
    else:
        np.testing.assert_array_equal(decode_image(cut), wanted)


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


@pytest.mark.parametrize(("mode", "top"), [("I", 65535), ("I", 2**31 - 1), ("F", 1.0), ("F", 255.0), ("F", 40000.0)])
def test_wide_levels_are_scaled(mode: str, top: float) -> None:
    levels = np.linspace(0, top, 256, dtype=np.int32 if mode == "I" else np.float32).reshape(16, 16)
    found = np.asarray(as_rgb(Image.fromarray(levels)))[..., 0].reshape(-1)
    scaled = levels.reshape(-1) / (65535 if top == 40000.0 else top) * 255
    assert np.abs(found - scaled).max() <= 1
