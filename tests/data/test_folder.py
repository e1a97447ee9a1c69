"""Image folders: classes, and pictures with text files beside them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from conftest import picture

from declip.data.sources import BrokenPair, open_sources
from declip.errors import InputError
from declip.pairs import Data


def put(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(len(name)))
    return folder


def test_texts_beside_pictures(tmp_path: Path) -> None:
    put(tmp_path, "b.png", "a.jpg", "c.webp", ".hidden.png")
    (tmp_path / "a.txt").write_bytes("one\r\n\n zwölf \n".encode())
    (tmp_path / "b.txt").write_bytes(b"bad \xff\ngood\0one")
    (tmp_path / "notes.txt").write_text("no picture has this name")
    source = open_sources([str(tmp_path)], Data())
    assert [(source.key(i), source.captions(i)) for i in range(len(source))] == [
        ("a.jpg", ("one", "zwölf")),
        ("b.png", ("good one",)),
        ("c.webp", ()),
    ]
    assert (source[0].image, source[0].label) == (picture(5), None)
    with pytest.raises(BrokenPair, match="no caption"):
        source[2]


def test_texts_and_classes_together(tmp_path: Path) -> None:
    put(tmp_path, "a.jpg", "cats/1.jpg", "cats/2.jpg")
    (tmp_path / "a.txt").write_text("A caption")
    source = open_sources([str(tmp_path)], Data())
    assert [(source[i].captions, source[i].label) for i in range(3)] == [
        (("A caption",), None),
        (("a photo of a cats.",), "cats"),
        (("a photo of a cats.",), "cats"),
    ]


def test_pictures_of_one_folder_are_no_class(tmp_path: Path) -> None:
    put(tmp_path, "images/1.jpg", "images/2.jpg")
    with pytest.raises(InputError, match="holds no pairs: put a captions"):
        open_sources([str(tmp_path)], Data())


def test_labels_without_captions(tmp_path: Path) -> None:
    source = open_sources([str(put(tmp_path, "a/1.jpg", "b/1.jpg"))], Data(templates=[]), need_captions=False)
    assert [(source[i].captions, source[i].label) for i in range(2)] == [((), "a"), ((), "b")]
    with pytest.raises(InputError, match=r"need captions: say data\.templates"):
        open_sources([str(tmp_path)], Data(templates=[]))


def test_a_name_that_is_no_utf8(tmp_path: Path) -> None:
    put(tmp_path, "a/1.jpg", "b/1.jpg")
    with open(os.fsencode(tmp_path) + b"/b/\xff.jpg", "wb") as file:
        file.write(b"x")
    with pytest.raises(InputError, match=r"has a name that is no UTF-8, .*udcff\.jpg.*: rename it"):
        open_sources([str(tmp_path)], Data())
