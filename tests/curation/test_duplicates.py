"""Copies of images: found as all-against-all finds them, and no two pictures taken for one."""

from __future__ import annotations

import io
from itertools import combinations

import numpy as np
import pytest
from conftest import picture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from declip.curation.chances import expected_equals
from declip.curation.copies import common
from declip.curation.duplicates import DISTANCE, near_duplicates, similar_hashes
from declip.curation.fingerprints import THUMBNAIL, fingerprint


def scene(number: int, size: tuple[int, int] = (192, 160)) -> Image.Image:
    """A smooth picture with some edges, another one for each number."""
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    fine = np.asarray(coarse).copy()
    top, left = rng.integers(0, 100, 2)
    fine[top : top + 40, left : left + 60] = rng.integers(0, 256, 3)
    return Image.fromarray(fine)


def encoded(image: Image.Image, kind: str = "JPEG", **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def found(images: list[bytes]) -> list[list[int]]:
    seen = [fingerprint(image) for image in images]
    hashes = np.array([one.perceptual_hash for one in seen], np.uint64)
    return near_duplicates(hashes, np.stack([one.thumbnail for one in seen])).tolist()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 60))
def test_search_finds_what_all_against_all_finds(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 2**64, max(1, count // 6), dtype=np.uint64)
    hashes = values[rng.integers(0, len(values), count)]
    for row in range(count):  # up to ten bits off
        for bit in rng.integers(0, 64, rng.integers(0, 11)):
            hashes[row] ^= np.uint64(1) << np.uint64(bit)
    expected = [
        [i, j] for i, j in combinations(range(count), 2) if (int(hashes[i]) ^ int(hashes[j])).bit_count() <= DISTANCE
    ]
    assert similar_hashes(hashes).tolist() == expected


def test_nothing_among_nothing() -> None:
    none = near_duplicates(np.empty(0, np.uint64), np.empty((0, THUMBNAIL), np.uint8))
    assert none.shape == (0, 2)


@pytest.mark.parametrize("change", ["recompressed", "half", "cropped", "brighter", "darker", "png"])
def test_copies_are_found(change: str) -> None:
    image = scene(1)
    changed = {
        "recompressed": encoded(image, quality=30),
        "half": encoded(image.resize((96, 80)), quality=85),
        "cropped": encoded(image.crop((2, 2, 190, 158)), quality=90),
        "brighter": encoded(ImageEnhance.Brightness(image).enhance(1.1), quality=90),
        "darker": encoded(ImageEnhance.Brightness(image).enhance(0.8), quality=90),
        "png": encoded(image, "PNG"),
    }[change]
    others = [encoded(scene(number)) for number in range(2, 40)]
    assert found([encoded(image, quality=95), *others, changed]) == [[0, 39]]


def test_flat_and_coloured_pictures_stay_apart() -> None:
    flat = [encoded(Image.new("RGB", (64, 64), (level, level, level)), "PNG") for level in range(0, 250, 25)]
    shape = np.full((64, 64, 3), 255, np.uint8)
    hearts = []
    for colour in ((220, 40, 40), (40, 160, 40), (40, 40, 220)):
        shape[16:48, 16:48] = colour
        hearts.append(encoded(Image.fromarray(shape), "PNG"))
    assert found(flat + hearts) == []
    assert found([flat[0], flat[0], flat[3], flat[3]]) == [[0, 1], [2, 3]]


def test_fingerprints() -> None:
    image = scene(3)
    one, same_pixels = fingerprint(encoded(image, "PNG")), fingerprint(encoded(image, "WEBP", lossless=1))
    assert (one.width, one.height, one.kind) == (192, 160, "PNG RGB")
    assert one.pixel_hash == same_pixels.pixel_hash
    assert one.data_hash != same_pixels.data_hash
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif)
    turned = fingerprint(buffer.getvalue())
    assert (turned.width, turned.height) == (160, 192)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no known image format"),
        (b"<!DOCTYPE html>", "a web page or text"),
        (encoded(scene(4))[:2000], "truncated"),
        (picture(1)[:300], "truncated"),
    ],
)
def test_broken_images_have_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        fingerprint(data)


@given(st.lists(st.integers(0, 9)), st.lists(st.integers(0, 9)))
def test_common_is_the_first_equal(values: list[int], others: list[int]) -> None:
    every = common(np.array(values, int), np.arange(len(values)), np.array(others, int), np.arange(len(others)))
    assert every.tolist() == [[i, others.index(value)] for i, value in enumerate(values) if value in others]


@settings(deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(1, 9), st.integers(0, 3))
def test_expected_equals_is_the_mean_over_all_batches(groups: list[int], batch: int, alone: int) -> None:
    labels = [label for label, size in enumerate(groups) for _ in range(size)] + [-1 - i for i in range(alone)]
    batch = min(batch, len(labels))
    totals = [
        sum(drawn.count(label) > 1 for label in drawn) for drawn in (list(c) for c in combinations(labels, batch))
    ]
    assert expected_equals(len(labels), batch, groups) == pytest.approx(sum(totals) / len(totals), abs=1e-9)


def test_expected_equals_where_one_of_several_captions_is_shown() -> None:
    rng = np.random.default_rng(0)
    total, rounds = 0, 20_000
    for _ in range(rounds):  # pairs 0 … 9 of 30 hold one caption, and show it every third time
        drawn = rng.choice(30, 8, replace=False)
        shown = int(((drawn < 10) & (rng.random(8) < 1 / 3)).sum())
        total += shown if shown > 1 else 0
    assert expected_equals(30, 8, [10], 1 / 3) == pytest.approx(total / rounds, rel=0.05)
