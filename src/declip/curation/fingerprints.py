"""An image in a few hundred bytes: enough to find its copies, and to say what is wrong with it.

A fingerprint has a hash of the file's bytes, one of its pixels, a perceptual hash that changes little where the picture
changes little, and a thumbnail that settles whether two pictures with similar hashes are the same.
"""

from __future__ import annotations

import hashlib
import re
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from declip.data.decode import MOST_PIXELS, opened_image, orientation, pixels_of

THUMBNAIL = 16 * 16 + 2 * 8 * 8
"""Bytes of a thumbnail: 16 x 16 grey levels, then 8 x 8 of each colour difference (Cb, Cr)."""

_SHORT_SIDE = 64  # JPEGs are decoded at the lowest scale that leaves at least so many pixels a side
_SIDE = 32  # the perceptual hash is taken of so many pixels a side


class Fingerprint(NamedTuple):
    """What is kept of an image.

    width, height: pixels, upright; kind: format and mode, as ``JPEG RGB``; data_hash, pixel_hash: equal for equal
    files and for equal pixels; perceptual_hash: 64 bits; thumbnail: uint8 [THUMBNAIL].
    """

    width: int
    height: int
    kind: str
    data_hash: int
    pixel_hash: int
    perceptual_hash: int
    thumbnail: NDArray[np.uint8]


def fingerprint(data: bytes) -> Fingerprint:
    """Of an image file's bytes. Raises ValueError where they cannot be decoded: a few words that say why.

    JPEGs are decoded at a reduced scale: every byte is read, so damage shows, at a fraction of the time. Their pixel
    hash is that of the reduced picture.
    """
    try:
        with opened_image(data) as image:
            kind, (width, height) = f"{image.format} {image.mode}", image.size
            image.draft("RGB", (_SHORT_SIDE, _SHORT_SIDE))
            rgb = Image.fromarray(pixels_of(image))
            if orientation(image) > 4:
                width, height = height, width
    except ValueError as error:
        raise ValueError(reason(data, error.__cause__ or error)) from error
    pixels = hashlib.blake2b(rgb.tobytes(), digest_size=8, salt=b"%08x%08x" % (width, height))
    return Fingerprint(
        width, height, kind, hash_bytes(data), int.from_bytes(pixels.digest(), "little"), *_perceptual(rgb)
    )


def hash_bytes(data: bytes) -> int:
    """64 bits."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def reason(data: bytes, error: BaseException) -> str:
    """Why an image cannot be decoded: the same words for the same kind of damage, whatever numbers Pillow says."""
    text = str(error)
    if "cannot identify" in text:
        return "it is a web page or text" if data[:256].lstrip()[:1] in (b"<", b"{") else "no known image format"
    if "truncated" in text:
        return "the image is truncated"
    if "pixels" in text:
        return f"it has more than {MOST_PIXELS:,} pixels"
    return re.sub(r"0x[0-9a-f]+|\d+", "…", text)[:120]


def _perceptual(rgb: Image.Image) -> tuple[int, NDArray[np.uint8]]:
    """The perceptual hash and the thumbnail.

    The hash is the signs of the 64 lowest frequencies of the cosine transform of the grey picture, as pHash takes them
    (Zauner 2010, "Implementation and benchmarking of perceptual image hash functions", section 3.2.1), without the
    mean, against their median.
    """
    luma, blue, red = rgb.resize((_SIDE, _SIDE), Image.Resampling.BOX).convert("YCbCr").split()
    grey = np.asarray(luma, np.float32)
    cosines, lowest = _transform()
    frequencies = (cosines @ grey @ cosines.T)[lowest]
    # Above the median by a margin: half of a symmetric picture's frequencies are nothing but noise around it.
    bits = frequencies > np.median(frequencies) + 0.1 * frequencies.std()
    small = [
        grey.reshape(16, 2, 16, 2).mean((1, 3)),
        *(np.asarray(band, np.float32).reshape(8, 4, 8, 4).mean((1, 3)) for band in (blue, red)),
    ]
    thumbnail = np.concatenate([plane.reshape(-1) for plane in small]) + 0.5
    return int.from_bytes(np.packbits(bits).tobytes(), "little"), thumbnail.astype(np.uint8)


@cache
def _transform() -> tuple[NDArray[np.float32], tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """The cosines [12, 32], and where in the [12, 12] frequencies the 64 lowest stand.

    They are dealt out over the four bands of 16 bits that the search looks at, so that each band has high and low ones.
    """
    steps = np.arange(_SIDE) + 0.5
    cosines = np.cos(np.pi / _SIDE * np.arange(12)[:, None] * steps)
    rows, columns = np.indices((12, 12)).reshape(2, -1)
    order = np.lexsort((rows, rows**2 + columns**2))[1:65]
    dealt = order.reshape(16, 4).T.reshape(-1)
    return cosines.astype(np.float32), (rows[dealt], columns[dealt])
