"""evaluate(): a model that sees colours, on parquet files of plain colours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from colours import COLOURS, Colours, picture, write

import declip
from declip import evaluation
from declip.errors import InputError
from declip.evaluation import embedding
from declip.pairs import Data


@pytest.fixture
def both(tmp_path: Path) -> str:
    rows = [
        {"key": name, "image": picture(name), "captions": [f"something {name}", f"a {name} field"], "label": name}
        for name in COLOURS
    ]
    return write(tmp_path / "both.parquet", rows)


def evaluate(model: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    return evaluation.evaluate(model, *args, **kwargs)


def test_both_tasks_by_default(both: str) -> None:
    result = evaluate(Colours(), [both], templates=["a {}"])
    ways = ("text_to_image", "image_to_text")
    perfect = dict.fromkeys([f"{way}_r{k}" for way in ways for k in (1, 5, 10)], 100.0)
    perfect |= {f"{way}_median_rank": 1.0 for way in ways}
    labelled = dict.fromkeys(("top1", "top5", "mean_per_class"), 100.0)
    common = {"model": "colours", "data": both, "items": 4, "skipped": 0, "undecodable": 0}
    assert result == {
        "model": "colours",
        "results": [
            {**common, "task": task, "metrics": metrics, "intervals": {name: [v, v] for name, v in metrics.items()}}
            for task, metrics in (("retrieval", perfect), ("zero-shot", labelled))
        ],
        "comparisons": [],
    }


def test_each_source_by_itself_and_one_task(both: str, tmp_path: Path) -> None:
    wrong = write(
        tmp_path / "wrong.parquet",
        [{"image": picture("red"), "text": "green"}, {"image": picture("green"), "text": "red"}],
    )
    result = evaluate(Colours(), [both, wrong], ["retrieval"])
    assert [(row["data"], row["task"]) for row in result["results"]] == [(both, "retrieval"), (wrong, "retrieval")]
    assert [row["metrics"]["image_to_text_r1"] for row in result["results"]] == [100.0, 0.0]
    assert evaluate(Colours(), both, ["retrieval"])["results"] == result["results"][:1]


def test_equal_captions_are_encoded_once_and_tie(tmp_path: Path) -> None:
    model = Colours()
    path = write(tmp_path / "t.parquet", [{"image": picture(name), "caption": "red"} for name in ("red", "blue")])
    metrics = evaluate(model, path)["results"][0]["metrics"]
    assert model.texts == ["red"]
    assert (metrics["image_to_text_r1"], metrics["text_to_image_r1"]) == (0.0, 50.0)


def test_unreadable_images_count_as_missed(tmp_path: Path) -> None:
    rows = [{"image": picture(name), "caption": name} for name in COLOURS]
    rows[1]["image"] = b"no image"
    rows[2]["caption"] = "  "
    rows[3]["image"] = rows[3]["image"][:45]
    (row,) = evaluate(Colours(), write(tmp_path / "t.parquet", rows))["results"]
    assert (row["items"], row["undecodable"], row["skipped"]) == (3, 2, 1)
    assert row["metrics"]["text_to_image_r10"] == row["metrics"]["image_to_text_r1"] == pytest.approx(100 / 3)
    labelled = [{"image": row["image"], "label": row["caption"].strip() or None} for row in rows]
    (row,) = evaluate(Colours(), write(tmp_path / "l.parquet", labelled))["results"]
    assert (row["items"], row["undecodable"], row["skipped"]) == (3, 2, 1)
    assert row["metrics"] == {name: pytest.approx(100 / 3) for name in ("top1", "top5", "mean_per_class")}
    for row in rows:
        row["image"] = b""
    with pytest.raises(InputError, match=r"all 4 pairs are broken; the first: .*row 0"):
        evaluate(Colours(), write(tmp_path / "t.parquet", rows))


def test_labels_without_captions(tmp_path: Path) -> None:
    rows = [{"image": picture(name), "label": number, "class_name": name} for number, name in enumerate(COLOURS)]
    path = write(tmp_path / "labels.parquet", [*rows, {**rows[0], "label": None, "class_name": None}])
    (row,) = evaluate(Colours(), path, templates=["simple"])["results"]
    assert (row["task"], row["items"], row["metrics"]["top1"]) == ("zero-shot", 4, 100.0)
    with pytest.raises(InputError, match="caption"):
        evaluate(Colours(), path, ["retrieval"])


def test_columns_can_be_told(tmp_path: Path) -> None:
    rows = [{"picture": picture(name), "words": name, "kind": name} for name in COLOURS]
    path = write(tmp_path / "odd.parquet", rows)
    result = evaluate(Colours(), path, None, Data(image="picture", captions=["words"], label="kind"))
    assert [row["task"] for row in result["results"]] == ["retrieval", "zero-shot"]


def test_images_go_in_groups(both: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "_IMAGES_AT_ONCE", 3)
    monkeypatch.setattr(embedding, "_TEXTS_AT_ONCE", 3)
    model, calls = Colours(), []
    result = evaluate(model, both, ["retrieval"], progress=lambda *call: calls.append(call))
    assert model.groups == [3, 1]
    assert result["results"][0]["metrics"]["text_to_image_r1"] == 100.0
    images, captions = f"images of {both}", f"captions of {both}"
    assert calls == [(images, 3, 4), (images, 4, 4), (captions, 3, 8), (captions, 6, 8), (captions, 8, 8)]
    monkeypatch.setattr(embedding, "_BYTES_AT_ONCE", 1)
    evaluate(model, both, ["retrieval"])
    assert model.groups[2:] == [1, 1, 1, 1]


def test_wrong_input(both: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="There is no task 'segmentation': choose from retrieval, zero-shot"):
        evaluate(Colours(), both, ["segmentation"])
    with pytest.raises(InputError, match="nowhere"):
        evaluate(Colours(), "nowhere.parquet")
    with pytest.raises(InputError, match=r"has no \{\}"):
        evaluate(Colours(), both, templates=["a photo"])
    one = write(tmp_path / "one.parquet", [{"image": picture("red"), "label": "red"}] * 3)
    with pytest.raises(InputError, match="nothing to judge"):
        evaluate(Colours(), one)
    with pytest.raises(InputError, match="only the class 'red'"):
        evaluate(Colours(), one, ["zero-shot"])


def test_package_offers_it() -> None:
    assert declip.evaluate is evaluation.evaluate
