"""Patterns, image folders, Hugging Face datasets on disk, DeCLIP's lists."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from conftest import pair, picture, write_pairs
from hypothesis import given
from hypothesis import strategies as st

from declip.data.patterns import expand
from declip.data.sources import BrokenPair, Subset, open_sources
from declip.data.sources.splits import Without
from declip.errors import InputError
from declip.pairs import Data


@given(st.lists(st.lists(st.text("abxyz01-_/", max_size=4), min_size=2, max_size=3), min_size=1, max_size=3))
def test_braces_are_products(choices: list[list[str]]) -> None:
    spec = "s3:" + ":".join("{" + ",".join(words) + "}" for words in choices)
    assert set(expand(spec)) == {"s3:" + ":".join(words) for words in product(*choices)}


def test_ranges_and_globs(tmp_path: Path) -> None:
    assert expand("a{08..11}.tar") == ["a08.tar", "a09.tar", "a10.tar", "a11.tar"]
    assert expand("a{3..1}") == ["a3", "a2", "a1"]
    assert expand("{a,b{1,2}}") == ["a", "b1", "b2"]
    for name in ("b.tar", "a.tar", "c{1}.tar"):
        (tmp_path / name).touch()
    assert expand(f"{tmp_path}/[ab].tar") == [f"{tmp_path}/a.tar", f"{tmp_path}/b.tar"]
    assert expand(f"{tmp_path}/c{{1}}.tar") == [f"{tmp_path}/c{{1}}.tar"]  # a file of that very name
    with pytest.raises(InputError, match=r"^No file matches '.*/x\*'\.$"):
        expand(f"{tmp_path}/x*")
    with pytest.raises(InputError, match=r"\{1\} in 'x\{1\}' is no pattern"):
        expand("x{1}")


def test_several_parquet_files(tmp_path: Path) -> None:
    for part in range(3):
        write_pairs(tmp_path / f"part-{part}.parquet", [pair(10 * part + i) for i in range(4)])
    for spec in (f"{tmp_path}/part-{{0..2}}.parquet", f"{tmp_path}/*.parquet", str(tmp_path)):
        source = open_sources([spec], Data())
        assert [source.key(i) for i in (0, 4, 11)] == ["k0", "k10", "k23"]
        assert source.where(5).endswith("part-1.parquet, row 1")
    (tmp_path / "part-3.csv").write_text("filename,caption\n")
    with pytest.raises(InputError, match=r"several kinds \(\.csv, \.parquet\)"):
        open_sources([f"{tmp_path}/part*"], Data())


def test_image_folder(tmp_path: Path) -> None:
    for name in ("red_panda/1.png", "cat/deep/2.PNG", "cat/0.png", "cat/.hidden.png", "cat/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(picture(1))
    source = open_sources([str(tmp_path)], Data(templates=["a {}", "one {}"]))
    found = [(p.key, p.captions, p.label) for p in map(source.__getitem__, range(len(source)))]
    assert found == [
        ("cat/0.png", ("a cat", "one cat"), "cat"),
        ("cat/deep/2.PNG", ("a cat", "one cat"), "cat"),
        ("red_panda/1.png", ("a red panda", "one red panda"), "red_panda"),
    ]
    assert source[0].image == picture(1)
    with pytest.raises(InputError, match=r"'a cat' has no \{\}"):
        open_sources([str(tmp_path)], Data(templates=["a cat"]))


def save_to_disk(folder: Path, rows: list[dict[str, object]], features: dict[str, object]) -> Path:
    """As `datasets.Dataset.save_to_disk` writes it, in two files."""
    folder.mkdir(parents=True)
    files = []
    for number, part in enumerate((rows[:3], rows[3:])):
        table = pa.Table.from_pylist(part)
        files.append({"filename": f"data-{number:05d}-of-00002.arrow"})
        with pa.ipc.new_stream(str(folder / files[-1]["filename"]), table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    (folder / "state.json").write_text(json.dumps({"_data_files": files, "_indices_files": None}))
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
    return folder


def test_hugging_face_dataset(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"image": {"bytes": picture(i), "path": None}, "text": f"picture {i}", "label": i % 2} for i in range(7)
    ]
    features: dict[str, object] = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    folder = save_to_disk(tmp_path / "set" / "train", rows, features)
    source = open_sources([str(folder)], Data())
    assert len(source) == 7
    assert [(p.image, p.captions, p.label) for p in map(source.__getitem__, range(7))] == [
        (picture(i), (f"picture {i}",), ("cat", "dog")[i % 2]) for i in range(7)
    ]
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(InputError, match=r"holds several splits: name one, .*set/train or .*set/test"):
        open_sources([str(tmp_path / "set")], Data())
    (folder / "data-00001-of-00002.arrow").write_bytes(b"no arrow")
    with pytest.raises(InputError, match="cannot be read as a Hugging Face dataset"):
        open_sources([str(folder)], Data())


def test_yfcc15m_list(tmp_path: Path) -> None:
    """JSON lines named .json, with urls, captions as text or list, images in a folder of their own."""
    lines = [
        {"filename": "a/1.jpg", "caption": "one", "url": "http://x/1"},
        {"filename": "2.jpg", "caption": ["two", "zwei"], "url": "http://x/2"},
        {"filename": "3.jpg", "caption": "", "url": "http://x/3"},
    ]
    path = tmp_path / "yfcc15m_clean_open_data.json"
    path.write_text("\n".join(map(json.dumps, lines)))
    images = tmp_path / "images"
    (images / "a").mkdir(parents=True)
    (images / "a" / "1.jpg").write_bytes(picture(1))
    source = open_sources([str(path)], Data(image_root=str(images)))
    assert [source.captions(i) for i in range(3)] == [("one",), ("two", "zwei"), ()]
    assert source[0].image == picture(1)
    with pytest.raises(BrokenPair, match=r"json, line 2 .*cannot read image 2\.jpg"):
        source[1]


def test_labels_are_known_without_their_images(tmp_path: Path) -> None:
    import io
    import tarfile

    for number, kind in enumerate(("cat", "cat", "dog")):
        (tmp_path / "images" / kind).mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / kind / f"{number}.png").write_bytes(picture(number))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(2):
            for name, content in ((f"{number}.png", picture(number)), (f"{number}.cls", b"%d" % number)):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    write_pairs(tmp_path / "a.parquet", [pair(number) for number in range(3)])
    names = ("images", "a.tar", "a.parquet")
    source = open_sources([str(tmp_path / name) for name in names], Data(), need_captions=False)
    labels = [source.label(i) for i in range(len(source))]
    assert labels == [source[i].label for i in range(len(source))]
    assert labels == ["cat", "cat", "dog", "0", "1", *(pair(number)["label"] for number in range(3))]
    assert Subset(source, np.array([2, 4])).label(1) == "1"
    assert Without(source, np.array([0, 1])).label(0) == "dog"
