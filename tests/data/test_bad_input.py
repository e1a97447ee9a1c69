"""Whatever is wrong with pairs: each is a pair or a broken one, an image gives pixels or ValueError, nothing else."""

from __future__ import annotations

import csv
import io
import json
import random
import struct
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import picture
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from declip.data.decode import decode_image
from declip.data.sources import BrokenPair, Pair, open_sources
from declip.data.sources.base import LONGEST_CAPTION
from declip.errors import InputError
from declip.pairs import Data


def encoded(mode: str, kind: str, **options: Any) -> bytes:
    channels = {"CMYK": 4, "I;16": 2, "P": 1}[mode]
    pixels = np.arange(20 * 24 * channels, dtype=np.uint32).astype(np.uint8)
    image = Image.frombytes(mode, (24, 20), pixels.tobytes())
    if mode == "P":
        image.putpalette([value for i in range(256) for value in (i, 255 - i, i // 2)])
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def animated() -> bytes:
    frames = [Image.new("RGB", (9, 7), colour) for colour in ("red", "green", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (24, 20), "red").save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG of 100 bytes that says it has 10 thousand million pixels."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"\0")),
        (b"IEND", b""),
    ]
    body = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


# Images, each with whether it can be decoded (None: it may be).
IMAGES: dict[str, tuple[bytes, bool | None]] = {
    "fine": (picture(1), True),
    "zero bytes": (b"", False),
    "truncated": (picture(2)[:300], False),
    "no image": (b"<html>404 Not Found</html>", False),
    "mislabelled": (encoded("P", "GIF"), True),
    "16 bits": (encoded("I;16", "PNG"), True),
    "CMYK": (encoded("CMYK", "JPEG"), True),
    "palette": (encoded("P", "PNG", transparency=3), True),
    "animated": (animated(), True),
    "rotated": (rotated(), True),
    "bomb": (bomb(), False),
    "noise": (random.Random(0).randbytes(500), None),
}

# Captions as bytes, each with what is read of it.
CAPTIONS: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "fine": (b"a red house", ("a red house",)),
    "empty": (b"", ()),
    "blank": (b" \t ", ()),
    "NUL": (b"one\0two", ("one two",)),
    "NUL alone": (b"\0\0", ()),
    "a megabyte": (b"word " * 200_000, (("word " * 200_000)[:LONGEST_CAPTION],)),
    "no UTF-8": (b"caf\xe9 \xff", ()),
    "Chinese": ("红色的房子".encode(), ("红色的房子",)),
    "markup": (b"&lt;b&gt; <b>\x07\x1b[31m", ("&lt;b&gt; <b>\x07\x1b[31m",)),
    "spaces of Unicode": ("\u3000\u00a0x\u2028".encode(), ("x",)),
}

PLACES = ("{}.png", "gone/{}.png", "../out-{}.png", "a folder/{}.png")


@dataclass(frozen=True)
class Row:
    """A pair that something may be wrong with. missing: its image, or the caption of it, is not there at all."""

    image: str
    caption: str
    missing: str | None = None
    place: str = PLACES[0]


rows = st.lists(
    st.builds(
        Row,
        st.sampled_from(list(IMAGES)),
        # The long one is drawn seldom: a million characters take their time.
        st.sampled_from([name for name in CAPTIONS if name != "a megabyte"] * 3 + ["a megabyte"]),
        st.sampled_from([None, None, None, "image", "caption"]),
        st.sampled_from(PLACES),
    ),
    min_size=1,
    max_size=20,
)


def values(row: Row) -> tuple[bytes | None, bytes | None]:
    image = None if row.missing == "image" else IMAGES[row.image][0]
    return image, None if row.missing == "caption" else CAPTIONS[row.caption][0]


def columns(rows: list[Row]) -> pa.Table:
    images, captions = zip(*map(values, rows), strict=True)
    texts = pa.array(captions, pa.binary()).view(pa.string())  # as a writer in another language leaves them
    return pa.table({"image": pa.array(images, pa.binary()), "caption": texts})


def as_parquet(folder: Path, rows: list[Row]) -> Path:
    pq.write_table(columns(rows), folder / "set.parquet", row_group_size=3)
    return folder / "set.parquet"


def as_arrow(folder: Path, rows: list[Row]) -> Path:
    table = columns(rows)
    with pa.OSFile(str(folder / "set.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return folder / "set.arrow"


def files_of(folder: Path, rows: list[Row]) -> list[tuple[str, str | None]]:
    """Write the images; the file names and the captions that a text table can hold."""
    listed = []
    for number, row in enumerate(rows):
        image, caption = values(row)
        name = row.place.format(number)
        if image is not None and not name.startswith("gone"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(image)
        # Invalid UTF-8 makes the whole file one that cannot be read: that is another test.
        listed.append((name, None if caption is None else caption.decode("utf-8", "replace")))
    return listed


def as_csv(folder: Path, rows: list[Row]) -> Path:
    with (folder / "set.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["filename", "caption"])
        writer.writerows(files_of(folder, rows))
    return folder / "set.csv"


def as_jsonl(folder: Path, rows: list[Row]) -> Path:
    lines = [json.dumps({"filename": name, "caption": caption}) for name, caption in files_of(folder, rows)]
    (folder / "set.jsonl").write_text("\n".join(lines), "utf-8")
    return folder / "set.jsonl"


def as_tar(folder: Path, rows: list[Row]) -> Path:
    with tarfile.open(folder / "set.tar", "w") as tar:
        for number, row in enumerate(rows):
            base = row.place.format(number).removesuffix(".png")
            for suffix, content in zip(("png", "txt"), values(row), strict=True):
                if content is not None:
                    member = tarfile.TarInfo(f"{base}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder / "set.tar"


def as_folder(folder: Path, rows: list[Row]) -> Path:
    """Pictures with text files beside them; those without are in no pair."""
    inside = folder / "set"
    inside.mkdir()
    for number, row in enumerate(rows):
        for suffix, content in zip(("png", "txt"), values(row), strict=True):
            if content is not None:
                (inside / f"{number:02}.{suffix}").write_bytes(content)
    return inside


FORMATS: dict[str, Callable[[Path, list[Row]], Path]] = {
    "parquet": as_parquet,
    "arrow": as_arrow,
    "csv": as_csv,
    "jsonl": as_jsonl,
    "tar": as_tar,
    "folder": as_folder,
}
many = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def read_all(path: Path) -> tuple[list[Pair], list[BrokenPair], str]:
    """All that is in a set, or the sentence of why there is none; any other exception, or count, fails the test."""
    try:
        source = open_sources([str(path)], Data())
    except InputError as error:
        return [], [], str(error)
    pairs, broken = [], []
    for i in range(len(source)):
        assert isinstance(source.key(i), str)
        assert isinstance(source.where(i), str)
        try:
            pairs.append(source[i])
        except BrokenPair as error:
            broken.append(error)
        else:
            assert pairs[-1].captions == source.captions(i) != ()
    assert len(pairs) + len(broken) == len(source) > 0
    return pairs, broken, ""


def decodes(data: bytes) -> bool:
    try:
        pixels = decode_image(data)
    except ValueError:
        return False
    assert pixels.dtype == np.uint8
    assert pixels.shape[2:] == (3,)
    return True


def usable(row: Row, form: str) -> bool:
    """Whether a source must give the pair."""
    in_table = form in ("csv", "jsonl")
    says = bool(CAPTIONS[row.caption][1]) or (in_table and row.caption == "no UTF-8")
    reachable = not in_table or not row.place.startswith("gone")
    reachable &= form != "tar" or not row.place.startswith("..")
    return row.missing is None and says and reachable and row.image != "zero bytes"


@pytest.mark.parametrize("form", FORMATS)
@given(rows=rows)
@many
def test_each_is_a_pair_or_a_broken_one(tmp_path_factory: pytest.TempPathFactory, form: str, rows: list[Row]) -> None:
    folder = tmp_path_factory.mktemp("rows") / "inside"
    folder.mkdir()
    expected = [row for row in rows if usable(row, form)]
    pairs, broken, sentence = read_all(FORMATS[form](folder, rows))
    assert len(sentence.splitlines()) <= 1
    assert [pair.image for pair in pairs] == [IMAGES[row.image][0] for row in expected]
    for pair, row in zip(pairs, expected, strict=True):
        if row.caption != "no UTF-8":
            assert pair.captions == CAPTIONS[row.caption][1]
        can = IMAGES[row.image][1]
        assert decodes(pair.image) == can or can is None
    if form not in ("tar", "folder"):  # in these, what has no image at all is no pair
        assert len(pairs) + len(broken) == len(rows)


@pytest.mark.parametrize("form", ["parquet", "arrow", "csv", "jsonl", "tar"])
@given(data=st.data())
@many
def test_cut_files(tmp_path_factory: pytest.TempPathFactory, form: str, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("cut")
    path = FORMATS[form](folder, [Row("fine", "fine", place=PLACES[0])] * 8)
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    pairs, broken, sentence = read_all(path)
    assert pairs or broken or str(path) in sentence
    assert len(pairs) + len(broken) <= 8
    assert all(pair.image == picture(1) for pair in pairs)


@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl", "json", "parquet", "arrow", "feather", "tar"])
@given(content=st.binary(max_size=300) | st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass")))
@many
def test_files_of_anything(tmp_path_factory: pytest.TempPathFactory, form: str, content: bytes) -> None:
    path = tmp_path_factory.mktemp("any") / f"set.{form}"
    path.write_bytes(content)
    pairs, _, sentence = read_all(path)
    assert not pairs
    assert f"set.{form}" in sentence


lines = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["filename", "caption", "label"]), inner)
    ),
    max_leaves=8,
)


@given(objects=st.lists(st.fixed_dictionaries({"filename": lines, "caption": lines}) | lines, min_size=1, max_size=4))
@settings(max_examples=100, deadline=None)
def test_lines_of_any_json(tmp_path_factory: pytest.TempPathFactory, objects: list[Any]) -> None:
    path = tmp_path_factory.mktemp("json") / "set.jsonl"
    path.write_text("\n".join(map(json.dumps, objects)))
    pairs, broken, sentence = read_all(path)
    assert not pairs  # there are no images
    assert broken or "set.jsonl" in sentence


@pytest.mark.parametrize("form", ["parquet", "arrow"])
@pytest.mark.parametrize(
    "image",
    [
        pa.array([1, 2]),
        pa.array([None, None]),
        pa.array([{"bytes": 10**12, "path": 3}] * 2),
        pa.array([["a"], ["b"]]),
    ],
)
def test_wrong_types_of_columns(tmp_path: Path, form: str, image: pa.Array[Any]) -> None:
    table = pa.table({"image": image, "caption": ["one", "two"]})
    path = tmp_path / f"set.{form}"
    if form == "parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
    assert "has no image column: its columns are image" in read_all(path)[2]


def test_a_path_of_a_struct_of_wrong_types(tmp_path: Path) -> None:
    image = pa.array([{"bytes": 10**12, "path": "gone.png"}, {"bytes": None, "path": None}])
    pq.write_table(pa.table({"image": image, "caption": ["one", "two"]}), tmp_path / "set.parquet")
    pairs, broken, _ = read_all(tmp_path / "set.parquet")
    assert not pairs
    assert [error.reason for error in broken] == [
        "cannot read image gone.png: No such file or directory",
        "its image is empty",
    ]
