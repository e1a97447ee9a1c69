"""What goes into a shard comes out again, whatever its keys and captions; images are as large as they may be."""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import picture
from data.test_bad_input import IMAGES
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from declip.curation.shard import Images, safe_key, valid, write_shard
from declip.data.decode import decode_image
from declip.data.sources import Pair
from declip.data.sources.base import clean_captions
from declip.data.sources.tar import open_tar
from declip.pairs import Data


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@dataclass
class Listed:
    """As much of a source as a shard needs."""

    pairs: list[Pair]

    def __getitem__(self, i: int) -> Pair:
        return self.pairs[i]


texts = st.text(st.characters(exclude_categories=()), max_size=20)
keys = texts | st.text("ab./\\_2\0", max_size=6) | st.just("k" * 300) | st.just("é" * 150)
captions = st.lists(texts | st.sampled_from(["one", "two"]), max_size=4).map(clean_captions)
written = st.lists(
    st.tuples(keys, captions, st.none() | texts | st.integers(0, 99).map(str)).filter(
        lambda p: p[1] or p[2] is not None
    ),
    max_size=12,
)


@given(written)
@settings(max_examples=150, deadline=None)
def test_keys_captions_and_labels_of_any_kind(listed: list[tuple[str, tuple[str, ...], str | None]]) -> None:
    image = picture(1)
    source: Any = Listed([Pair(key, image, texts, label, "here") for key, texts, label in listed])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.tar"
        report = write_shard(path, source, range(len(listed)), Images(None, 90), lambda: None)
        after = open_tar("a", [str(path)], Data(), False)
        assert (after.problems, len(after), report["pairs"]) == ([], len(listed), len(listed))
        with tarfile.open(path) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
            assert len(members) == len(tar.getmembers())
        found = [after[i] for i in range(len(after))]
    assert len({one.key for one in found}) == len(found)
    for (key, texts, label), one in zip(listed, found, strict=True):
        assert one.captions == tuple(map(valid, texts))
        assert one.label == (None if label is None else valid(label))
        assert not one.key.startswith("/")
        assert "." not in one.key
        fields = json.loads(members.get(f"{one.key}.json", b"{}"))
        assert fields.get("key", one.key) == valid(key)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("cat/1.JPG", "cat/1"),
        ("/etc/../passwd", "etc/__/passwd"),
        ("v1.2", "v1_2"),
        ("..", "__"),
        ("", "pair"),
        ("a\n\\b", "a__b"),
        ("x" * 300 + "/y", "x" * 200),
    ],
)
def test_names_of_keys(key: str, name: str) -> None:
    assert safe_key(key) == name


def photo(width: int, height: int) -> Image.Image:
    coarse = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def test_resized() -> None:
    images = Images(100, 90)
    large = photo(900, 600)
    data, extension = images.pack(encoded(large, "JPEG", quality=95))
    pixels = decode_image(data)
    assert (extension, pixels.shape) == ("jpg", (100, 150, 3))
    wanted = np.asarray(large.resize((150, 100), Image.Resampling.BICUBIC), np.int16)
    assert np.abs(pixels - wanted).mean() < 2
    for small in (encoded(photo(100, 700), "JPEG"), encoded(photo(99, 99), "PNG"), picture(1)):
        assert images.pack(small)[0] == small
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.open(io.BytesIO(images.pack(encoded(large, "JPEG", exif=exif))[0]))
    assert (turned.size, dict(turned.getexif())) == ((100, 150), {})
    clear = Image.new("RGBA", (300, 200), (255, 0, 0, 0))
    assert (decode_image(images.pack(encoded(clear, "PNG"))[0]) > 250).all()
    assert Images(1, 90).pack(encoded(photo(500, 2), "PNG"))[1] == "jpg"
    assert images.pack(encoded(photo(9, 9), "WEBP"))[1] == "webp"
    with pytest.raises(ValueError, match=r"^the image is truncated$"):
        images.pack(encoded(large, "JPEG")[:-500])
    with pytest.raises(ValueError, match=r"^it has more than 134,217,728 pixels$"):
        images.pack(IMAGES["bomb"][0])
