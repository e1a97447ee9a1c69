"""What is left is without copies, and what is gone is named with the reason."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_pairs
from PIL import Image

from declip.curation import dedup as module
from declip.curation.dedup import dedup
from declip.curation.pack import pack
from declip.data.sources import open_sources
from declip.errors import InputError
from declip.pairs import Data


def image(number: int, scale: int = 4, kind: str = "PNG") -> bytes:
    """A picture like no other, ``16 * scale`` pixels a side."""
    coarse = np.random.default_rng(2000 + number).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    large = Image.fromarray(coarse).resize((128, 128), Image.Resampling.BICUBIC).resize((16 * scale, 16 * scale))
    buffer = io.BytesIO()
    large.save(buffer, kind)
    return buffer.getvalue()


def row(key: str, data: bytes, *captions: str) -> dict[str, Any]:
    return {"key": key, "image": data, "captions": list(captions) or [f"this is {key}"], "label": key[0]}


ROWS = [
    row("a", image(1), "first"),
    row("b", image(2)),
    row("c", image(1), "first", "second"),  # equals a
    row("d", image(2, scale=8)),  # b, larger
    row("e", b"broken"),
    row("f", image(3)),  # in the test set
    row("g", image(4, scale=6, kind="JPEG")),  # nearly in the test set
    row("h", image(5)),  # its key is in the test set
    row("i", image(6)),
]
TEST = [row("x", image(3)), row("y", image(4)), row("h", image(7))]


@pytest.fixture
def named(tmp_path: Path) -> tuple[list[str], list[str]]:
    return [str(write_pairs(tmp_path / "a.parquet", ROWS))], [str(write_pairs(tmp_path / "b.parquet", TEST))]


def left(out: Path) -> dict[str, tuple[str, ...]]:
    source = open_sources([str(out)], Data())
    return {source[i].key: source[i].captions for i in range(len(source))}


def gone(out: Path) -> dict[str, tuple[str, str | None]]:
    rows = map(json.loads, (out / "log" / "removed.jsonl").read_text().splitlines())
    return {row["key"]: (row["reason"], row["equals"] and row["equals"].rpartition("/")[2]) for row in rows}


def test_copies_and_leaks_are_left_out(named: tuple[list[str], list[str]], tmp_path: Path) -> None:
    source, test = named
    out = tmp_path / "new" / "out"
    result = dedup(source, out, Data(), test=test, workers=0)
    assert left(out) == {
        "a": ("first", "second"), "d": ("this is d",), "h": ("this is h",), "i": ("this is i",)
    }  # fmt: skip
    assert gone(out) == {
        "b": ("near-duplicate", "a.parquet, row 3"),
        "c": ("equal image", "a.parquet, row 0"),
        "e": ("broken: no known image format", None),
        "f": ("image in the test set", "b.parquet, row 0"),
        "g": ("near the test set", "b.parquet, row 1"),
    }
    assert (result["pairs"], result["kept"], sum(result["removed"].values()), result["files"]) == (9, 4, 5, 1)
    assert json.loads(json.dumps(result)) == result
    source_left = open_sources([str(out)], Data())
    assert [source_left[i].label for i in range(4)] == ["a", "d", "h", "i"]
    assert source_left[1].image == ROWS[3]["image"]


def test_options(named: tuple[list[str], list[str]], tmp_path: Path) -> None:
    source, test = named
    dedup(source, tmp_path / "1", Data(), near=False, merge_captions=False, workers=0)
    assert "".join(left(tmp_path / "1")) == "abdfghi"
    assert left(tmp_path / "1")["a"] == ("first",)
    dedup(source, tmp_path / "2", Data(), test=test, equal_keys=True, workers=0)
    assert gone(tmp_path / "2")["h"] == ("key in the test set", "b.parquet, row 2")


def test_nothing_is_left_to_drop_the_second_time(named: tuple[list[str], list[str]], tmp_path: Path) -> None:
    dedup(named[0], tmp_path / "1", Data(), workers=0)
    again = dedup([str(tmp_path / "1")], tmp_path / "2", Data(), workers=0)
    assert again["removed"] == {}
    assert left(tmp_path / "1") == left(tmp_path / "2")


def test_files_of_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FILE_BYTES", 3 * len(image(0)))
    monkeypatch.setattr(module, "ROWS", 2)
    source = write_pairs(tmp_path / "a.parquet", [row(f"k{number}", image(number)) for number in range(20)])
    result = dedup([str(source)], tmp_path / "out", Data(), workers=0)
    names = sorted(path.name for path in (tmp_path / "out").glob("*.parquet"))
    assert names == [f"part-{number:05d}.parquet" for number in range(result["files"])]
    assert len(names) > 3
    assert list(left(tmp_path / "out")) == [f"k{number}" for number in range(20)]


def test_refusals(named: tuple[list[str], list[str]], tmp_path: Path) -> None:
    source, _ = named
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").touch()
    with pytest.raises(InputError, match="already holds files"):
        dedup(source, full, Data(), workers=0)
    with pytest.raises(InputError, match="every pair is broken or in the test set"):
        dedup(source, tmp_path / "out", Data(), test=source, workers=0)
    assert not (tmp_path / "out").exists()


def stripes(way: str) -> bytes:
    """Grey on average wherever it is looked at from afar."""
    rows, columns = np.indices((256, 256)) // 4
    pattern = {"down": columns, "across": rows, "both": rows + columns}[way] % 2 * 255
    buffer = io.BytesIO()
    Image.fromarray(pattern.astype(np.uint8)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def test_pictures_that_are_equal_from_afar_only(tmp_path: Path) -> None:
    rows = [row(way, stripes(way)) for way in ("down", "across", "both")] + [row("again", stripes("down"))]
    named = str(write_pairs(tmp_path / "stripes.parquet", rows))
    result = dedup([named], tmp_path / "out", Data(), near=False, workers=0)
    assert result["removed"] == {"equal image": 1}
    assert left(tmp_path / "out").keys() == {"down", "across", "both"}


def test_labels_alone_and_of_any_kind(tmp_path: Path) -> None:
    rows = [{"image": image(number), "label": label} for number, label in enumerate("abc")]
    named = str(write_pairs(tmp_path / "labelled.parquet", rows))
    dedup([named], tmp_path / "out", Data(), workers=0)
    source = open_sources([str(tmp_path / "out")], Data(), need_captions=False)
    assert [(pair.label, pair.captions) for pair in map(source.__getitem__, range(3))] == [(x, ()) for x in "abc"]


def test_keys_of_shards_and_numbers(tmp_path: Path) -> None:
    """Keys are a shard's member names or a column, also one that counts; row numbers are none."""
    rows = [{"id": number, "image": image(number), "caption": f"number {number}"} for number in range(6)]
    other = [{"id": number, "image": image(20 + number), "caption": "other"} for number in (3, 5)]
    named, test = (str(write_pairs(tmp_path / f"{n}.parquet", r)) for n, r in (("a", rows), ("b", other)))
    for number, spec in enumerate((named, str(tmp_path / "packed"))):
        result = dedup([spec], tmp_path / f"out{number}", Data(), test=[test], equal_keys=True, workers=0)
        assert result["removed"] == {"key in the test set": 2}
        pack([named], tmp_path / "packed", Data(), workers=0)
    for table in (rows, other):
        for one in table:
            del one["id"]
    named, test = (str(write_pairs(tmp_path / f"{n}.parquet", r)) for n, r in (("c", rows), ("d", other)))
    assert dedup([named], tmp_path / "numbered", Data(), test=[test], equal_keys=True, workers=0)["removed"] == {}


def test_nothing_half_written(
    tmp_path: Path, named: tuple[list[str], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "_write_removed", full)
        with pytest.raises(OSError, match="No space left"):
            dedup(named[0], tmp_path / "out", Data(), workers=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.parquet", "b.parquet"]
    dedup(named[0], tmp_path / "out", Data(), workers=0)
