"""Planted problems are each found with the right counts, and the page shows nothing unescaped."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import pair, write_pairs
from PIL import Image
from rich.console import Console

from declip.curation.inspect import inspect, print_inspection
from declip.curation.words import caption_hash, not_language, script
from declip.pairs import Data

EVIL = "<script>alert('x')</script> & \"more\""


def image(number: int, size: tuple[int, int] = (80, 60)) -> bytes:
    """A picture like no other."""
    coarse = np.random.default_rng(1000 + number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


def row(number: int, **changes: Any) -> dict[str, Any]:
    fine = {"key": f"k{number}", "image": image(number), "captions": [f"picture of thing {number}"], "label": "thing"}
    return {**fine, **changes}


def smaller(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(data)) as opened:
        opened.resize((72, 54)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


PLANTED = [
    *(row(number) for number in range(400)),
    row(400, image=b"not an image"),
    row(401, image=image(401)[:200]),
    row(402, image=image(402, (20, 40))),
    row(403, image=image(403, (300, 40))),
    row(404, captions=["IMG_1234.jpg"]),
    row(405, captions=["https://example.org/a"]),
    row(406, captions=["word " * 100]),
    row(407, captions=["Picture of thing 0."]),  # equal to that of pair 0
    row(408, image=image(1)),
    row(409, image=smaller(image(2))),
    row(410, captions=[EVIL], key=EVIL),
]
TEST = [row(9000, image=image(5)), row(9001, image=smaller(image(6))), row(7, image=image(9002))]
COUNTS = {
    "broken": 2,
    "tiny_images": 1,
    "extreme_ratios": 1,
    "not_language": 4,  # the repeated word is over-long too
    "long_captions": 1,
    "equal_captions": 2,
    "equal_images": 1,
    "near_duplicates": 1,
    "empty_captions": 0,
    "test_images": 1,
    "test_near_duplicates": 1,
    "test_keys": 1,
    "test_captions": 1,
}


@pytest.fixture
def planted(tmp_path: Path) -> tuple[str, str]:
    test = [{**one, "captions": ["unseen caption"]} for one in TEST]
    test[0]["captions"] = ["Picture of  thing 11"]
    paths = write_pairs(tmp_path / "a.parquet", PLANTED), write_pairs(tmp_path / "b.parquet", test)
    return str(paths[0]), str(paths[1])


def test_planted_problems_are_found(planted: tuple[str, str], tmp_path: Path) -> None:
    source, test = planted
    steps: list[tuple[str, int, int]] = []
    out = tmp_path / "out"
    result = inspect([source], Data(), out, test=[test], workers=0, progress=lambda *step: steps.append(step))
    found = {finding["name"]: finding for finding in result["findings"]}
    assert {name: found[name]["count"] for name in COUNTS} == COUNTS
    assert found["near_duplicates"]["examples"] == [f"{source}, row 2 = {source}, row 409"]
    assert found["test_keys"]["examples"] == [f"{source}, row 7 = {test}, row 2"]
    assert all(finding["severity"] == "act" for name, finding in found.items() if name in ("test_images", "test_keys"))
    assert found["empty_captions"]["severity"] == "fine"
    assert result["counts"]["pairs"] == 411
    assert result["counts"]["images"] == 409
    assert steps[-1] == ("reading the test set", 3, 3)
    assert json.loads(json.dumps(result)) == result
    page = (out / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;" in page
    assert [path.name for path in out.iterdir()] == ["report.html"]
    console = Console(record=True, width=120, file=io.StringIO())
    print_inspection(result, console)
    assert "2 pairs (0.5 %) cannot be used" in console.export_text()


def test_two_workers_give_the_same(planted: tuple[str, str], tmp_path: Path) -> None:
    results = [inspect(planted, Data(), tmp_path / str(workers), workers=workers) for workers in (0, 2)]
    assert results[0] == results[1]
    assert (tmp_path / "0" / "report.html").read_bytes() == (tmp_path / "2" / "report.html").read_bytes()


def test_a_sample_and_a_set_without_captions_or_images(tmp_path: Path) -> None:
    some = write_pairs(tmp_path / "a.parquet", [pair(number) for number in range(30)])
    assert inspect([str(some)], Data(), None, workers=0, sample=7)["counts"]["pairs"] == 7
    bare = write_pairs(tmp_path / "b.parquet", [{"image": image(1), "label": "x"}, {"image": b"", "label": "y"}])
    result = inspect([str(bare)], Data(), tmp_path / "out", workers=0)
    assert (result["counts"]["captions"], result["counts"]["images"], result["counts"]["labels"]) == (0, 1, 1)
    broken = write_pairs(tmp_path / "c.parquet", [row(0, image=b"x")])
    assert inspect([str(broken)], Data(), tmp_path / "out", workers=0)["counts"]["images"] == 0


def test_rows_without_keys_have_none_in_common(tmp_path: Path) -> None:
    rows = [{"image": image(number), "captions": [f"thing {number}"]} for number in range(4)]
    one, other = write_pairs(tmp_path / "a.parquet", rows[:2]), write_pairs(tmp_path / "b.parquet", rows[2:])
    result = inspect([str(one)], Data(), None, test=[str(other)], workers=0)
    assert {finding["name"]: finding["count"] for finding in result["findings"]}["test_keys"] == 0


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("IMG_1234.jpg", "a file name"),
        ("DSC00017", "a file name"),
        ("www.example.org/cat", "a web address"),
        ("12 / 34 -", "digits and punctuation only"),
        ("a <b>cat</b>", "HTML"),
        ("cats &amp; dogs", "HTML"),
        ("aaaaaa", "one character repeated"),
        ("buy buy buy", "one word repeated"),
        ("a photo from 1990 of 3 < 4 cats", None),
        ("photo of a cat", None),
        ("😀", None),
        ("猫", None),
        ("bye bye", None),
    ],
)
def test_not_language(text: str, reason: str | None) -> None:
    assert not_language(text) == reason


def test_captions_that_are_equal() -> None:
    assert caption_hash(" A  cat. ") == caption_hash("a cat")
    assert caption_hash("keycap: #") != caption_hash("keycap: *")
    assert caption_hash("!") != caption_hash("?")


def test_scripts() -> None:
    assert [script(text) for text in ("cat", "café", "кот", "一只猫", "😀")] == [
        "latin (ASCII)", "latin", "cyrillic", "cjk", "symbols"
    ]  # fmt: skip
