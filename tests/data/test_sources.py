"""Sources: every format gives the same pairs, and what is wrong is said in a sentence."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path

import pyarrow as pa
import pytest
from conftest import keys, numbered, parquet

from declip.data.sources import BrokenPair, Pair, open_sources
from declip.errors import InputError
from declip.pairs import Data

FOUND = Data()


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """A folder of three images, as yet without a table."""
    folder = tmp_path / "pets"
    (folder / "more").mkdir(parents=True)
    for name in ("cat.jpg", "dog.jpg", "more/owl.jpg"):
        (folder / name).write_bytes(f"bytes of {name}".encode())
    return folder


# Parquet


def test_parquet_columns_are_found(tmp_path: Path) -> None:
    file = parquet(
        tmp_path / "a.parquet",
        key=["one", "two"],
        image=[b"\xff\xd81", b"\xff\xd82"],
        captions=[["A cat.", " Two cats "], ["A dog."]],
        label=["cat", None],
    )
    source = open_sources([file], FOUND)
    assert len(source) == 2
    assert source.name == file
    assert source[0] == Pair("one", b"\xff\xd81", ("A cat.", "Two cats"), "cat", f"{file}, row 0")
    assert source[1].label is None
    assert source.captions(1) == ("A dog.",)


@pytest.mark.parametrize("image", ["image", "jpg", "png", "img", "bytes"])
@pytest.mark.parametrize("caption", ["captions", "caption", "text", "name", "title"])
def test_parquet_other_names(tmp_path: Path, image: str, caption: str) -> None:
    source = open_sources([parquet(tmp_path / "a.parquet", **{image: [b"x"], caption: ["hello"]})], FOUND)
    assert (source[0].image, source[0].captions) == (b"x", ("hello",))


@pytest.mark.parametrize("key", ["key", "id", "__key__", "filename"])
def test_parquet_key_names(tmp_path: Path, key: str) -> None:
    file = parquet(tmp_path / "a.parquet", **{key: ["mine"], "image": [b"x"], "text": ["hello"]})
    assert open_sources([file], FOUND)[0].key == "mine"


def test_parquet_key_defaults_to_row_number(tmp_path: Path) -> None:
    file = parquet(tmp_path / "a.parquet", image=[b"x", b"y", b"z"], text=["a", "b", "c"])
    assert keys(open_sources([file], FOUND)) == ["0", "1", "2"]


def test_parquet_columns_of_the_wrong_type_are_passed_over(tmp_path: Path) -> None:
    file = parquet(tmp_path / "a.parquet", image=[7], jpg=[b"x"], caption=[1.5], text=["hello"])
    assert open_sources([file], FOUND)[0].captions == ("hello",)
    assert open_sources([file], FOUND)[0].image == b"x"


def test_told_columns_win(tmp_path: Path) -> None:
    file = parquet(
        tmp_path / "a.parquet",
        image=[b"wrong"],
        photo=[b"right"],
        caption=["wrong"],
        short=["short"],
        long=[["long", "longer"]],
        label=["wrong"],
        kind=[3],
        key=["wrong"],
        number=[12],
    )
    told = Data(image="photo", captions=["short", "long"], label="kind", key="number")
    pair = open_sources([file], told)[0]
    assert (pair.image, pair.captions, pair.label, pair.key) == (b"right", ("short", "long", "longer"), "3", "12")


@pytest.mark.parametrize("role", ["image", "captions", "label", "key"])
def test_told_column_must_exist(tmp_path: Path, role: str) -> None:
    file = parquet(tmp_path / "a.parquet", image=[b"x"], caption=["hello"])
    with pytest.raises(
        InputError, match=rf"no column 'nope' \(data\.{role}\).*image \(binary\), caption \(string\)\.$"
    ):
        open_sources([file], Data.model_validate({role: "nope"}))


def test_told_column_must_fit(tmp_path: Path) -> None:
    file = parquet(tmp_path / "a.parquet", image=[b"x"], caption=["hello"], size=[7])
    with pytest.raises(InputError, match=r"'size' .* data\.captions: it holds int64"):
        open_sources([file], Data(captions=["size"]))


def test_missing_columns_are_answered_with_those_there_are(tmp_path: Path) -> None:
    file = parquet(tmp_path / "a.parquet", photo=[b"x"], caption=["hello"])
    with pytest.raises(InputError, match=r"no image column.*photo \(binary\), caption \(string\).*data\.image="):
        open_sources([file], FOUND)
    with pytest.raises(InputError, match=r"no caption column.*image \(binary\), words \(string\).*data\.captions="):
        open_sources([parquet(tmp_path / "b.parquet", image=[b"x"], words=["hello"])], FOUND)


def test_hugging_face_image_struct(tmp_path: Path) -> None:
    (tmp_path / "b.png").write_bytes(b"from disk")
    images = [{"bytes": b"inside", "path": "a.png"}, {"bytes": None, "path": "b.png"}, {"bytes": None, "path": None}]
    file = parquet(tmp_path / "a.parquet", image=images, text=["one", "two", "three"])
    source = open_sources([file], FOUND)
    assert [source[0].image, source[1].image] == [b"inside", b"from disk"]
    with pytest.raises(BrokenPair, match=r"row 2 .*image is empty"):
        source[2]


def test_class_name_beside_a_number_is_the_label(tmp_path: Path) -> None:
    file = parquet(tmp_path / "a.parquet", image=[b"x"], caption=["hello"], label=[2], class_name=["bird"])
    assert open_sources([file], FOUND)[0].label == "bird"
    assert open_sources([file], Data(label="label"))[0].label == "2"


def test_number_alone_is_the_label(tmp_path: Path) -> None:
    assert open_sources([parquet(tmp_path / "a.parquet", image=[b"x"], text=["t"], label=[2])], FOUND)[0].label == "2"


def test_labelled_images_without_captions(tmp_path: Path) -> None:
    file = parquet(tmp_path / "a.parquet", image=[b"x"], class_name=["bird"])
    with pytest.raises(InputError, match="no caption column"):
        open_sources([file], FOUND)
    pair = open_sources([file], FOUND, need_captions=False)[0]
    assert (pair.label, pair.captions) == ("bird", ())


def test_arrow_variants_of_text_and_bytes(tmp_path: Path) -> None:
    file = parquet(
        tmp_path / "a.parquet",
        image=pa.array([b"x"], pa.large_binary()),
        captions=pa.array([["a", "b"]], pa.large_list(pa.large_string())),
        label=pa.array(["cat"]).dictionary_encode(),
    )
    pair = open_sources([file], FOUND)[0]
    assert (pair.image, pair.captions, pair.label) == (b"x", ("a", "b"), "cat")


def test_no_parquet_at_all(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    with pytest.raises(InputError, match=r"a\.parquet cannot be read as a parquet file: [^\n]*\.$"):
        open_sources([str(tmp_path / "a.parquet")], FOUND)


# Captions and broken pairs


def test_empty_captions_are_dropped_and_all_empty_is_broken(tmp_path: Path) -> None:
    file = parquet(
        tmp_path / "a.parquet",
        image=[b"x"] * 5,
        captions=[["", " kept ", "\t\n", None], ["", "  "], [], None, [None]],
    )
    source = open_sources([file], FOUND)
    assert source[0].captions == ("kept",)
    for i in range(1, 5):
        assert source.captions(i) == ()
        with pytest.raises(BrokenPair) as broken:
            source[i]
        assert (broken.value.key, broken.value.where) == (str(i), f"{file}, row {i}")
        assert "caption" in broken.value.reason


@pytest.mark.parametrize("image", [None, b""])
def test_empty_image_is_broken(tmp_path: Path, image: bytes | None) -> None:
    source = open_sources([parquet(tmp_path / "a.parquet", image=[b"x", image], text=["a", "b"])], FOUND)
    assert source.captions(1) == ("b",)
    with pytest.raises(BrokenPair, match="image is empty"):
        source[1]


def test_broken_pair_survives_pickling() -> None:
    assert issubclass(BrokenPair, ValueError)
    broken = BrokenPair("k", "a.parquet, row 3", "no good")
    again = pickle.loads(pickle.dumps(broken))
    assert isinstance(again, BrokenPair)
    assert (again.key, again.where, again.reason) == ("k", "a.parquet, row 3", "no good")
    assert str(again) == "a.parquet, row 3 (key k): no good"


# Tables beside images


CSV = 'filename,caption,label\ncat.jpg,"A cat, asleep",cat\ndog.jpg,A dog,dog\ncat.jpg,"Says ""meow""",cat\n'
TSV = 'filename\tcaption\tlabel\ncat.jpg\tA cat, asleep\tcat\ndog.jpg\tA dog\tdog\ncat.jpg\t"Says ""meow"""\tcat\n'
JSONL = "\n".join(
    [
        '{"filename": "cat.jpg", "caption": ["A cat, asleep", "Says \\"meow\\""], "label": "cat"}',
        "",
        '{"filename": "dog.jpg", "caption": "A dog", "label": "dog"}',
    ]
)


@pytest.mark.parametrize("as_folder", [True, False])
@pytest.mark.parametrize(
    ("table", "text"), [("captions.csv", CSV), ("captions.tsv", TSV), ("captions.jsonl", JSONL), ("any.csv", CSV)]
)
def test_tables_give_one_pair_per_file_name(pets: Path, table: str, text: str, as_folder: bool) -> None:
    (pets / table).write_text(text)
    spec = str(pets if as_folder else pets / table)
    source = open_sources([spec], FOUND)
    assert (len(source), source.name) == (2, spec)
    where = f"{pets / table}, line {1 if table.endswith('jsonl') else 2}"
    assert source[0] == Pair("cat.jpg", b"bytes of cat.jpg", ("A cat, asleep", 'Says "meow"'), "cat", where)
    assert source[1].captions == source.captions(1) == ("A dog",)
    assert source[1].label == "dog"


def test_table_paths_are_relative_to_the_table(pets: Path) -> None:
    (pets / "more" / "t.csv").write_text("filename,caption\nowl.jpg,An owl\n../cat.jpg,A cat\n")
    source = open_sources([str(pets / "more" / "t.csv")], FOUND)
    assert [pair.image for pair in (source[0], source[1])] == [b"bytes of more/owl.jpg", b"bytes of cat.jpg"]


def test_table_with_byte_order_mark_spaces_and_windows_lines(pets: Path) -> None:
    (pets / "captions.csv").write_bytes("\ufefffilename, caption\r\n\r\ncat.jpg, Über\r\n".encode())
    assert open_sources([str(pets)], FOUND)[0].captions == ("Über",)


def test_table_lines_count_quoted_line_breaks(pets: Path) -> None:
    (pets / "captions.csv").write_text('filename,caption\ncat.jpg,"two\nlines"\ndog.jpg,A dog\n')
    source = open_sources([str(pets)], FOUND)
    assert source[0].captions == ("two\nlines",)
    assert source[1].where.endswith("line 4")


def test_table_told_columns(pets: Path) -> None:
    (pets / "captions.csv").write_text("photo,words,more,n\ncat.jpg,A cat,Meow,7\n")
    with pytest.raises(InputError, match=r"no column of image file names: its columns are photo, words, more, n;"):
        open_sources([str(pets)], FOUND)
    pair = open_sources([str(pets)], Data(image="photo", captions=["words", "more"], label="n", key="n"))[0]
    assert (pair.captions, pair.label, pair.key) == (("A cat", "Meow"), "7", "7")
    with pytest.raises(InputError, match=r"no column 'text' \(data\.captions\): its columns are photo, words, more, n"):
        open_sources([str(pets)], Data(image="photo", captions=["text"]))


def test_captions_table_is_preferred_and_several_are_refused(pets: Path) -> None:
    (pets / "captions.csv").write_text("filename,caption\ncat.jpg,right\n")
    (pets / "other.csv").write_text("filename,caption\ncat.jpg,wrong\n")
    assert open_sources([str(pets)], FOUND).captions(0) == ("right",)
    (pets / "captions.csv").rename(pets / "else.csv")
    with pytest.raises(InputError, match=r"several caption tables \(else\.csv, other\.csv\)"):
        open_sources([str(pets)], FOUND)


def test_folder_without_a_table(pets: Path) -> None:
    with pytest.raises(InputError, match="holds no pairs: put a captions"):
        open_sources([str(pets)], FOUND)


@pytest.mark.parametrize("filename", ["gone.jpg", "more", "nul\\u0000.jpg"])
def test_missing_image_file_is_a_broken_pair(pets: Path, filename: str) -> None:
    (pets / "captions.jsonl").write_text(
        f'{{"filename": "cat.jpg", "caption": "A cat"}}\n{{"filename": "{filename}", "caption": "Gone"}}\n'
    )
    source = open_sources([str(pets)], FOUND)
    assert source.captions(1) == ("Gone",)
    assert source[0].image
    with pytest.raises(BrokenPair, match=r"line 2 .*cannot read image"):
        source[1]


def test_table_with_empty_captions(pets: Path) -> None:
    rows = [{"filename": "cat.jpg", "caption": None}, {"filename": "dog.jpg"}, {"filename": "cat.jpg", "caption": " "}]
    (pets / "captions.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    source = open_sources([str(pets)], FOUND)
    assert [source.captions(0), source.captions(1)] == [(), ()]
    with pytest.raises(BrokenPair, match="no caption"):
        source[0]


@pytest.mark.parametrize(
    ("table", "text", "sentence"),
    [
        ("captions.csv", "filename,caption\ncat.jpg,A cat, asleep\n", "line 2 has 3 fields where the header has 2"),
        ("captions.csv", "filename,caption\ncat.jpg\n", "line 2 has 1 fields"),
        ("captions.csv", "filename,caption\n ,A cat\n", "line 2: there is no file name in column filename"),
        ("captions.tsv", 'filename\tcaption\ncat.jpg\t"A cat" asleep\n', "line 2 cannot be read: .*written twice"),
        ("captions.csv", 'filename,caption\ncat.jpg,"A cat\ndog.jpg,A dog\n', "line 2 cannot be read"),
        ("captions.csv", "filename,words\ncat.jpg,A cat\n", "no caption column: its columns are filename, words;"),
        ("captions.jsonl", '{"filename": "cat.jpg", "caption": "A cat"}\n{"filename"\n', "line 2 is not valid JSON"),
        ("captions.jsonl", '["cat.jpg", "A cat"]\n', "line 1 is no JSON object"),
        ("captions.jsonl", '{"filename": 7, "caption": "A cat"}\n', "line 1: there is no file name"),
        ("captions.jsonl", '{"filename": "cat.jpg", "caption": 7}\n', "line 1, column caption: .* not 7"),
        ("captions.jsonl", '{"filename": "cat.jpg", "caption": "\\ud800"}\n', "cannot be read as UTF-8"),
    ],
)
def test_malformed_tables(pets: Path, table: str, text: str, sentence: str) -> None:
    (pets / table).write_text(text)
    with pytest.raises(InputError, match=rf"captions\.\w+.*{sentence}"):
        open_sources([str(pets)], FOUND)


def test_table_that_is_no_text(pets: Path) -> None:
    (pets / "captions.csv").write_bytes(b"filename,caption\ncat.jpg,\xff\xfe\n")
    with pytest.raises(InputError, match="cannot be read as UTF-8 text"):
        open_sources([str(pets)], FOUND)


# What can be opened


@pytest.mark.parametrize(("name", "count"), [("noto", 1906), ("twemoji", 1906), ("fluent3d", 1852)])
def test_demo_pairs(name: str, count: int) -> None:
    source = open_sources([f"demo:{name}"], FOUND)
    assert (len(source), source.name) == (count, f"demo:{name}")
    pair = source[0]
    assert (pair.key, pair.label, pair.where) == (f"{name}-1f600", "smileys & emotion", f"demo:{name}, row 0")
    assert pair.image[:4] == b"RIFF"
    assert pair.captions[0] == "grinning face"
    assert pair.captions[1].startswith("grinning face: cheerful, cheery, ")
    assert all(len(source.captions(i)) == 2 for i in range(len(source)))


def test_unknown_demo() -> None:
    with pytest.raises(InputError, match=r"'demo:nope': there are demo:noto, demo:twemoji, demo:fluent3d\.$"):
        open_sources(["demo:nope"], FOUND)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no file or folder '.*gone\.parquet'"):
        open_sources([str(tmp_path / "gone.parquet")], FOUND)


def test_unknown_kind(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"")
    with pytest.raises(InputError, match=r"a\.zip is of no known kind: give a \.parquet or \.arrow file"):
        open_sources([str(tmp_path / "a.zip")], FOUND)


def test_nothing_named() -> None:
    with pytest.raises(InputError, match="No data was given"):
        open_sources([], FOUND)


def test_zero_pairs(tmp_path: Path) -> None:
    empty = parquet(tmp_path / "a.parquet", image=pa.array([], pa.binary()), caption=pa.array([], pa.string()))
    (tmp_path / "b.csv").write_text("filename,caption\n")
    (tmp_path / "c.csv").write_text("")
    for file in (empty, str(tmp_path / "b.csv"), str(tmp_path / "c.csv")):
        with pytest.raises(InputError, match=f"{re.escape(file)} holds no pairs"):
            open_sources([file], FOUND)


# Sequences of pairs


def test_concatenation(tmp_path: Path, pets: Path) -> None:
    (pets / "captions.csv").write_text(CSV)
    specs = [numbered(tmp_path / "a.parquet", 3), str(pets), numbered(tmp_path / "b.parquet", 2, first=3)]
    source = open_sources(specs, FOUND)
    assert len(source) == 7
    assert source.name == " + ".join(specs)
    assert [source[i].key for i in range(7)] == ["k0", "k1", "k2", "cat.jpg", "dog.jpg", "k3", "k4"] == keys(source)
    assert source.captions(5) == ("text 3",)
    assert source[6].where == f"{specs[2]}, row 1"
    assert source[-1] == source[6]
    for outside in (7, -8):
        with pytest.raises(IndexError):
            source[outside]
