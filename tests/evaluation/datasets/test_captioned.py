"""Retrieval sets, against the readers of torchvision and CLIP benchmark."""

from __future__ import annotations

import json
from pathlib import Path

import benchmark_folders as made
import pytest
import torchvision.datasets as torchvision
from clip_benchmark.datasets.flickr import Flickr

from declip.errors import InputError
from declip.evaluation.datasets import open_dataset
from declip.evaluation.datasets.labelled import LabelledSource


def captions(ours: LabelledSource) -> list[tuple[str, ...]]:
    return [ours.source[i].captions for i in range(len(ours))]


def karpathy(folder: Path, name: str) -> None:
    """dataset_coco.json and its like: three images of each split, mixed, with tokens beside the raw captions."""
    images = []
    for number in range(9):
        split = ("train", "test", "val")[number % 3]
        path = "train2014" if split == "train" else "val2014"
        image = {"filename": f"COCO_{number:012d}.jpg", "split": split, "imgid": number, "sentids": [1, 2]}
        image["sentences"] = [{"raw": f"caption {i} of {number}, it is.", "tokens": ["caption"]} for i in range(5)]
        images.append(image | ({"filepath": path, "cocoid": 90 - number} if name == "coco" else {}))
        place = path if name == "coco" else "images"
        made.write_image(folder / place / f"COCO_{number:012d}.jpg", number)
    (folder / f"dataset_{name}.json").write_text(json.dumps({"dataset": name, "images": images}))


@pytest.mark.parametrize("name", ["coco", "flickr30k", "flickr8k"])
def test_karpathys_splits(name: str, tmp_path: Path):
    karpathy(tmp_path / name, name)
    ours = open_dataset(name, tmp_path)
    assert [Path(ours.source.key(i)).name for i in range(len(ours))] == [f"COCO_{n:012d}.jpg" for n in (1, 4, 7)]
    assert captions(ours)[1] == tuple(f"caption {i} of 4, it is." for i in range(5))
    assert made.rgb(ours.source[1].image).shape == (20, 24, 3)
    assert (ours.metric, ours.folds, len(ours.labels), ours.classes) == ("recall", 1, 0, ())
    assert len(open_dataset(name, tmp_path, "train")) == 3
    with pytest.raises(InputError, match="no split 'dev'"):
        open_dataset(name, tmp_path, "dev")


def test_coco_1k_is_cut_in_five(tmp_path: Path):
    karpathy(tmp_path / "coco", "coco")
    assert open_dataset("coco-1k", tmp_path).folds == 5


def test_coco_as_clip_benchmark_has_it(tmp_path: Path):
    folder = tmp_path / "mscoco_captions"
    names = {30: "COCO_val2014_a.jpg", 7: "COCO_val2014_b.jpg"}
    content = {
        "images": [{"id": number, "file_name": name} for number, name in names.items()],
        "annotations": [{"id": i, "image_id": (30, 7)[i % 2], "caption": f"caption {i}"} for i in range(10)],
    }
    for number, name in names.items():
        made.write_image(folder / "val2014" / name, number)
    (folder / "coco_test_karpathy.json").write_text(json.dumps(content))
    expected = torchvision.CocoCaptions(str(folder / "val2014"), str(folder / "coco_test_karpathy.json"))
    ours = open_dataset("coco", tmp_path)
    assert captions(ours) == [tuple(texts) for _, texts in expected]
    assert [made.rgb(ours.source[i].image).tolist() for i in range(2)] == [made.rgb_of(image) for image, _ in expected]


@pytest.mark.parametrize("name", ["flickr30k", "flickr8k"])
def test_flickr_as_clip_benchmark_has_it(name: str, tmp_path: Path):
    folder = tmp_path / name
    rows = [f"{number}_x.jpg,A man, number {number}, {i} ." for number in (5, 3) for i in range(5)]
    made.write_lines(folder / f"{name}_test_karpathy.txt", ["image,caption", *rows])
    for number in (5, 3):
        made.write_image(folder / f"{number}_x.jpg", number)
    expected = Flickr(str(folder), str(folder / f"{name}_test_karpathy.txt"))
    ours = open_dataset(name, tmp_path)
    assert captions(ours) == [tuple(texts) for _, texts in expected]
    assert [made.rgb(ours.source[i].image).tolist() for i in range(2)] == [made.rgb_of(image) for image, _ in expected]
    with pytest.raises(InputError, match=f"has no {name}_train_karpathy.txt"):
        open_dataset(name, tmp_path, "train")


def test_flickr30ks_own_files(tmp_path: Path):
    folder = tmp_path / "flickr30k"
    rows = [f"{number}.jpg#{i}\tcaption {i} of {number} ." for number in (10, 11, 12) for i in range(5)]
    made.write_lines(folder / "results_20130124.token", rows)
    made.write_lines(folder / "test.txt", ["10", "12"])
    for number in (10, 11, 12):
        made.write_image(folder / "flickr30k-images" / f"{number}.jpg", number)
    expected = torchvision.Flickr30k(str(folder / "flickr30k-images"), str(folder / "results_20130124.token"))
    ours = open_dataset("flickr30k", tmp_path)
    assert captions(ours) == [tuple(expected[i][1]) for i in (0, 2)]


def test_flickr8ks_own_files(tmp_path: Path):
    folder = tmp_path / "Flickr8k"
    names = ["10_a.jpg", "11_b.jpg"]
    made.write_lines(
        folder / "Flickr8k_text/Flickr8k.token.txt", [f"{n}#{i}\t{i} of {n} ." for n in names for i in (0, 1)]
    )
    made.write_lines(folder / "Flickr8k_text/Flickr_8k.testImages.txt", [names[1]])
    made.write_lines(folder / "Flickr8k_text/Flickr_8k.devImages.txt", [names[0]])
    for number, name in enumerate(names):
        made.write_image(folder / "Flicker8k_Dataset" / name, number)
    assert captions(open_dataset("flickr8k", tmp_path)) == [("0 of 11_b.jpg .", "1 of 11_b.jpg .")]
    assert captions(open_dataset("flickr8k", tmp_path, "val")) == [("0 of 10_a.jpg .", "1 of 10_a.jpg .")]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "cannot be read"),
        ("[]", "no JSON object"),
        ('{"images": 3}', "no list of images"),
        ('{"images": [{"split": "test", "filename": 3}]}', "no text 'filename'"),
        ('{"images": [{"split": "test", "filename": "a.jpg", "sentences": [{"raw": " "}]}]}', "no caption of a.jpg"),
        ('{"images": [{"split": "train", "filename": "a.jpg", "sentences": []}]}', "no images of the split test"),
        ('{"images": [{"split": "test", "filename": "a.jpg", "sentences": [{"raw": "b"}]}]}', "a.jpg is in none of"),
    ],
)
def test_damaged_lists_are_one_sentence(content: str, said: str, tmp_path: Path):
    (tmp_path / "flickr30k").mkdir()
    (tmp_path / "flickr30k/dataset_flickr30k.json").write_text(content)
    with pytest.raises(InputError, match=said):
        open_dataset("flickr30k", tmp_path)
