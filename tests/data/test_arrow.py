"""Arrow files and datasets on disk."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pytest
from conftest import picture

from declip.data.sources import Source, open_sources
from declip.errors import InputError
from declip.pairs import Data

ROWS: list[dict[str, Any]] = [
    {"image": {"bytes": picture(i), "path": None}, "text": f"picture {i}", "label": i % 4 - 1} for i in range(7)
]
INFO = {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}


def stream(path: Path, table: pa.Table) -> dict[str, str]:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return {"filename": path.name}


def dataset(folder: Path, indices: list[int] | None = None) -> Path:
    """As ``save_to_disk`` writes it, in two files; with indices as older versions leave them after ``select``."""
    folder.mkdir()
    parts = [ROWS[:3], ROWS[3:]]
    files = [stream(folder / f"data-{n}.arrow", pa.Table.from_pylist(part)) for n, part in enumerate(parts)]
    chosen = None
    if indices is not None:
        chosen = [stream(folder / "indices.arrow", pa.table({"indices": pa.array(indices, pa.uint64())}))]
    (folder / "state.json").write_text(json.dumps({"_data_files": files, "_indices_files": chosen}))
    (folder / "dataset_info.json").write_text(json.dumps(INFO))
    return folder


def opened(path: Path, **data: object) -> Source:
    return open_sources([str(path)], Data.model_validate(data))


def said(source: Source) -> list[tuple[bytes, tuple[str, ...], str | None]]:
    return [(pair.image, pair.captions, pair.label) for pair in map(source.__getitem__, range(len(source)))]


EXPECTED = [(picture(i), (f"picture {i}",), (None, "cat", "dog", None)[i % 4]) for i in range(7)]


def test_numbers_without_a_class_are_no_label(tmp_path: Path) -> None:
    """-1 stands for no label, and 2 is past the names."""
    assert said(opened(dataset(tmp_path / "set"))) == EXPECTED


def test_chosen_rows(tmp_path: Path) -> None:
    source = opened(dataset(tmp_path / "set", [5, 0, 5, 6]))
    assert said(source) == [EXPECTED[i] for i in (5, 0, 5, 6)]
    assert source.shards.tolist() == [0, 4]
    assert said(pickle.loads(pickle.dumps(source))) == said(source)
    with pytest.raises(InputError, match="it chooses rows that are not there"):
        opened(dataset(tmp_path / "other", [7]))


@pytest.mark.parametrize("state", ["{}", '{"_data_files": 3}', '{"_data_files": [{}]}', "[]", "{", "[" * 10**5])
def test_wrong_state(tmp_path: Path, state: str) -> None:
    folder = dataset(tmp_path / "set")
    (folder / "state.json").write_text(state)
    with pytest.raises(InputError, match=r"names no files|state\.json cannot be read"):
        opened(folder)


def test_arrow_files(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    stream(tmp_path / "a.arrow", table)
    with pa.ipc.new_file(str(tmp_path / "b.arrow"), table.schema) as writer:
        writer.write_table(table)
    pyarrow.feather.write_feather(table, str(tmp_path / "c.feather"))
    expected = [(image, captions, str(i % 4 - 1)) for i, (image, captions, _) in enumerate(EXPECTED)]
    for name in ("a.arrow", "b.arrow", "c.feather"):
        assert said(opened(tmp_path / name)) == expected
    assert len(opened(tmp_path / "*.arrow")) == 14
    noted = table.replace_schema_metadata({"huggingface": json.dumps({"info": INFO})})
    stream(tmp_path / "a.arrow", noted)
    assert said(opened(tmp_path / "a.arrow")) == EXPECTED
    (tmp_path / "c.feather").unlink()
    assert len(opened(tmp_path)) == 14


def test_cut_files(tmp_path: Path) -> None:
    folder = dataset(tmp_path / "set")
    file = folder / "data-1.arrow"
    whole = file.read_bytes()
    for size in (0, 3, 100, len(whole) // 2, len(whole) - 100):
        file.write_bytes(whole[:size])
        with pytest.raises(InputError, match="cannot be read as a Hugging Face dataset"):
            opened(folder)


def test_mapped_files_are_not_pickled(tmp_path: Path) -> None:
    source = opened(dataset(tmp_path / "set"))
    pickled = pickle.dumps(source)
    assert picture(1) not in pickled
    assert said(pickle.loads(pickled)) == EXPECTED


def test_like_datasets_itself(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    kinds = {
        "image": datasets.Image(),
        "text": datasets.Value("string"),
        "label": datasets.ClassLabel(names=["a", "b"]),
    }
    rows = [{"image": {"bytes": picture(i), "path": None}, "text": f"t {i}", "label": i % 2} for i in range(6)]
    whole = datasets.Dataset.from_list(rows, features=datasets.Features(kinds))
    datasets.DatasetDict(train=whole.shuffle(seed=1), test=whole).save_to_disk(
        str(tmp_path / "set"), num_shards={"train": 2, "test": 1}
    )
    shuffled = [row["text"] for row in whole.shuffle(seed=1).remove_columns("image")]
    source = opened(tmp_path / "set" / "train")
    assert [pair.captions[0] for pair in map(source.__getitem__, range(6))] == shuffled
    assert {(pair.captions[0], pair.label) for pair in map(source.__getitem__, range(6))} == {
        (f"t {i}", "ab"[i % 2]) for i in range(6)
    }
    with pytest.raises(InputError, match=r"several splits: name one, .*set/train or .*set/test"):
        opened(tmp_path / "set")


def test_parquet_files_as_the_hub_has_them(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    (tmp_path / "data").mkdir()
    for number in range(2):
        pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "data" / f"train-0000{number}-of-00002.parquet")
    assert len(opened(tmp_path)) == 14
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "data" / "test-00000-of-00001.parquet")
    with pytest.raises(
        InputError, match=r"several splits: name one, .*data/test-\*\.parquet or .*data/train-\*\.parquet"
    ):
        opened(tmp_path)
    assert len(opened(tmp_path / "data" / "train-*.parquet")) == 14


def test_texts_that_are_no_utf8(tmp_path: Path) -> None:
    bad = pa.array([b"\xff\xfe", b"fine"]).cast(pa.binary()).view(pa.string())
    lists = pa.ListArray.from_arrays(pa.array([0, 2, 2], pa.int32()), bad)
    structs = pa.StructArray.from_arrays([pa.array([picture(0), None]), bad], ["bytes", "path"])
    stream(tmp_path / "a.arrow", pa.table({"image": structs, "captions": lists, "key": bad, "label": bad}))
    source = opened(tmp_path / "a.arrow")
    pair = source[0]
    assert (pair.key, pair.captions, pair.label, pair.image) == ("\ufffd\ufffd", ("fine",), "\ufffd\ufffd", picture(0))
    assert source.captions(1) == ()
    stream(tmp_path / "b.arrow", pa.table({"image": bad, "text": bad.dictionary_encode()}))
    assert [opened(tmp_path / "b.arrow").captions(i) for i in range(2)] == [(), ("fine",)]
