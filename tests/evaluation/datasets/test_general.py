"""The layouts that any set may have: CLIP benchmark's shards, Hugging Face datasets, parquet files, image folders."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import benchmark_folders as made
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import picture, require_shared

from declip.errors import InputError
from declip.evaluation.datasets import find, listing, open_dataset
from declip.evaluation.datasets.names import class_names

TEN = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


class Items(list[Any]):
    """A dataset as CLIP benchmark takes them."""

    classes: list[str]
    templates: list[str]


@pytest.fixture
def shards(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """CLIP benchmark's own writer of shards, without its eight loader processes."""
    import torch
    from clip_benchmark import webdataset_builder

    loader = torch.utils.data.DataLoader

    def alone(data: Any, num_workers: int = 0, **options: Any) -> Any:
        return loader(data, **options)

    monkeypatch.setattr(torch.utils.data, "DataLoader", alone)

    def write(folder: Path, split: str, items: Items, *, captioned: bool = False) -> None:
        convert = webdataset_builder.convert_retrieval_dataset if captioned else webdataset_builder.convert_dataset
        convert(items, split, str(folder), image_format="png", max_count=3, verbose=False)

    return write


def labelled(count: int = 8) -> Items:
    items = Items((picture(number), number * 3 % 10) for number in range(count))
    items.classes, items.templates = TEN, ["a photo of a {c}.", "the {c}"]
    return items


def test_shards_as_clip_benchmark_writes_them(shards: Callable[..., None], tmp_path: Path):
    items = labelled()
    shards(tmp_path / "wds_vtab-cifar10", "test", items)
    ours = open_dataset("cifar10", tmp_path)
    assert [(ours.source[i].image, int(ours.labels[i])) for i in range(8)] == list(items)
    assert (ours.classes, ours.templates) == (tuple(TEN), ("a photo of a {}.", "the {}"))
    assert find("cifar10", tmp_path / "wds_vtab-cifar10") is not None
    with pytest.raises(InputError, match="has no split train: it has test"):
        open_dataset("cifar10", tmp_path, "train")
    (tmp_path / "wds_vtab-cifar10/test/1.tar").unlink()
    with pytest.raises(InputError, match=r"1\.tar is missing, one of 3 shards"):
        open_dataset("cifar10", tmp_path)


def test_shards_of_captions(shards: Callable[..., None], tmp_path: Path):
    captions = [[f"caption {i} of {number}" for i in range(5)] for number in range(4)]
    items = Items(zip(map(picture, range(4)), captions, strict=True))
    shards(tmp_path / "wds_flickr8k", "test", items, captioned=True)
    ours = open_dataset("flickr8k", tmp_path)
    assert [list(ours.source[i].captions) for i in range(4)] == captions
    assert [list(ours.source.captions(i)) for i in range(4)] == captions
    assert pickle.loads(pickle.dumps(ours.source))[3].image == picture(3)


def test_imagenets_shards_call_its_val_split_test(shards: Callable[..., None], tmp_path: Path):
    items = Items([(picture(0), 999), (picture(1), 0)])
    items.classes, items.templates = list(class_names("imagenet1k")), ["{c}"]
    shards(tmp_path / "wds_imagenet1k", "test", items)
    ours = open_dataset("imagenet", tmp_path)
    assert (ours.split, ours.labels.tolist()) == ("val", [999, 0])


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("classnames.txt", "\n".join(["same", *TEN[1:9], "same"]), "1 class names stand for several classes .same"),
        ("classnames.txt", "\n".join([*TEN[:4], " ", *TEN[5:]]), "the name of class 4 is empty"),
        ("classnames.txt", "\n".join(TEN[:9]), "names 9 classes where there are 10"),
        ("classnames.txt", "", "names 0 classes where there are 10"),
        ("zeroshot_classification_templates.txt", "a photo", "Template 'a photo' has no"),
        ("test/nshards.txt", "many", "does not say how many shards"),
    ],
)
def test_shards_that_are_damaged(file: str, content: str, said: str, shards: Callable[..., None], tmp_path: Path):
    shards(tmp_path / "wds_vtab-cifar10", "test", labelled())
    (tmp_path / "wds_vtab-cifar10" / file).write_text(content)
    with pytest.raises(InputError, match=said):
        open_dataset("cifar10", tmp_path)


@pytest.mark.parametrize(("label", "said"), [(10, "the label 10 is outside the 10 classes"), (-1, "the label -1 is")])
def test_labels_outside_the_class_list(label: int, said: str, shards: Callable[..., None], tmp_path: Path):
    items = labelled()
    items[5] = (picture(5), label)
    shards(tmp_path / "wds_vtab-cifar10", "test", items)
    with pytest.raises(InputError, match=f"member s0000005: {said}"):
        open_dataset("cifar10", tmp_path)


def test_a_set_of_one_class(shards: Callable[..., None], tmp_path: Path):
    items = labelled()
    items[:] = [(image, 4) for image, _ in items]
    shards(tmp_path / "wds_vtab-cifar10", "test", items)
    with pytest.raises(InputError, match=r"All 8 images of CIFAR-10 in .* are of one class"):
        open_dataset("cifar10", tmp_path)


def test_a_hugging_face_dataset_on_disk(tmp_path: Path):
    import datasets

    def split(first: int) -> Any:
        features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=TEN))
        rows = {"image": [{"bytes": picture(first + i)} for i in range(4)], "label": [9, 0, first, 1]}
        return datasets.Dataset.from_dict(rows, features=features)

    datasets.DatasetDict(train=split(2), test=split(3)).save_to_disk(tmp_path / "cifar10")
    test, train = open_dataset("cifar10", tmp_path), open_dataset("cifar10", tmp_path, "train")
    assert (test.labels.tolist(), train.labels.tolist()) == ([9, 0, 3, 1], [9, 0, 2, 1])
    assert test.source[2].image == picture(5)
    assert (test.classes, len(test.templates)) == (tuple(TEN), 18)


def test_the_hubs_cifar100_has_fine_labels(tmp_path: Path):
    import datasets

    fine, coarse = [f"kind_{number:02d}" for number in range(100)], ["some", "other"]
    features = datasets.Features(
        img=datasets.Image(),
        fine_label=datasets.ClassLabel(names=fine),
        coarse_label=datasets.ClassLabel(names=coarse),
    )
    rows = {"img": [{"bytes": picture(i)} for i in range(3)], "fine_label": [99, 0, 5], "coarse_label": [0, 1, 0]}
    data = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict(test=data).save_to_disk(tmp_path / "disk/cifar100")
    (tmp_path / "hub/cifar100").mkdir(parents=True)
    data.to_parquet(tmp_path / "hub/cifar100/test-00000-of-00001.parquet")
    for folder in ("disk", "hub"):
        ours = open_dataset("cifar100", tmp_path / folder)
        assert (ours.labels.tolist(), ours.classes[99]) == ([99, 0, 5], "kind 99")


def parquet(path: Path, labels: list[Any], noted: dict[str, Any] | None = None, **columns: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"image": [picture(i) for i in range(len(labels))], "label": labels, **columns})
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(noted)} if noted else {}), path)


def test_parquet_files_as_the_hub_has_them(tmp_path: Path):
    """Numbers for labels; their names are noted in the schema."""
    noted = {"info": {"features": {"label": {"names": TEN, "_type": "ClassLabel"}}}}
    for shard in range(2):
        parquet(tmp_path / f"cifar10/data/test-0000{shard}-of-00002.parquet", [shard, 7, 9], noted)
    ours = open_dataset("cifar10", tmp_path)
    assert (ours.labels.tolist(), ours.classes) == ([0, 7, 9, 1, 7, 9], tuple(TEN))


def test_noted_names_get_clips_spelling_and_keep_their_order(tmp_path: Path):
    names = [name.replace(" ", "_").lower() for name in reversed(class_names("pets"))]
    parquet(tmp_path / "pets/test.parquet", [0, 36], {"info": {"features": {"label": {"names": names}}}})
    ours = open_dataset("pets", tmp_path)
    assert [ours.classes[label] for label in ours.labels] == ["Yorkshire Terrier", "Abyssinian"]


def test_parquet_files_of_several_sets_in_one_folder(tmp_path: Path):
    parquet(tmp_path / "pets_test.parquet", list(range(37)))
    parquet(tmp_path / "cifar10_test.parquet", list(range(10)), class_name=TEN)
    assert open_dataset("cifar10", tmp_path).labels.tolist() == list(range(10))
    assert open_dataset("pets", tmp_path).classes == class_names("pets")
    parquet(tmp_path / "cifar10_test.parquet", list(range(10)))
    with pytest.raises(InputError, match="numbers for labels and no class names"):
        open_dataset("cifar10", tmp_path)


def test_the_real_cifar10():
    file = require_shared("data/cifar10_train.parquet")
    ours = open_dataset("cifar10", file.parent, "train")
    numbers = pq.read_table(file, columns=["label"])["label"].to_pylist()
    assert (ours.labels.tolist(), ours.classes) == (numbers, tuple(TEN))


def test_the_real_flickr8k():
    file = require_shared("data/flickr8k_train.parquet")
    ours = open_dataset("flickr8k", file.parent, "train")
    assert (len(ours), len(ours.source[17].captions)) == (6000, 5)


def test_a_folder_a_class_in_a_folder_a_split(tmp_path: Path):
    names = [name.replace(" ", "_").lower() for name in class_names("pets")]
    made.by_class(tmp_path / "pets/test", names[3:6])
    made.by_class(tmp_path / "pets/train", names[:2])
    assert open_dataset("pets", tmp_path).labels.tolist() == [3, 3, 4, 4, 5, 5]
    assert open_dataset("pets", tmp_path, "train").split == "trainval"
    made.by_class(tmp_path / "pets/test", ["unicorn"])
    with pytest.raises(InputError, match="the label 'unicorn' is outside the list of 37 classes"):
        open_dataset("pets", tmp_path)


def test_listing_says_what_is_there_and_what_is_needed(tmp_path: Path):
    made.pets(tmp_path)
    rows = {row["name"]: row for row in listing(tmp_path)}
    assert rows["pets"]["found"] == str(tmp_path / "oxford-iiit-pet")
    assert rows["cars"]["found"] is None
    assert rows["cars"]["needs"].startswith("stanford_cars/")
    assert json.dumps(list(rows.values()))
    assert all(row["found"] is None for row in listing())
    with pytest.raises(InputError, match=r"Stanford Cars is not in .*: it needs stanford_cars/"):
        open_dataset("cars", tmp_path)


def test_an_image_that_does_not_decode_says_where_it_is(tmp_path: Path):
    made.pets(tmp_path)
    ours = open_dataset("pets", tmp_path)
    np.testing.assert_array_equal(ours.labels, np.arange(37))
    (tmp_path / "oxford-iiit-pet/images" / ours.source.key(0)).unlink()
    from declip.data.sources import BrokenPair

    with pytest.raises(BrokenPair, match=r"cannot read image Abyssinian_101\.jpg: No such file"):
        ours.source[0]
