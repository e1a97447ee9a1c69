"""ImageNet and its variants: which images are judged, among which classes."""

from __future__ import annotations

import json
from pathlib import Path

import benchmark_folders as made
import numpy as np
import pytest
import torchvision.datasets as torchvision

from declip.errors import InputError
from declip.evaluation.datasets import find, open_dataset
from declip.evaluation.datasets.names import class_names, wordnet_ids

NAMES = class_names("imagenet1k")
FIRST = wordnet_ids()[0]


def test_imagenet_is_in_the_order_of_the_wordnet_ids(tmp_path: Path):
    made.by_class(tmp_path / "imagenet/val", wordnet_ids()[:5])
    ours = open_dataset("imagenet", tmp_path)
    expected = torchvision.ImageFolder(str(tmp_path / "imagenet/val"))
    assert (ours.split, ours.metric, ours.classes) == ("val", "accuracy", NAMES)
    assert ours.labels.tolist() == expected.targets
    for i in range(len(ours)):
        np.testing.assert_array_equal(made.rgb(ours.source[i].image), np.asarray(expected[i][0]))
    assert open_dataset("imagenet", tmp_path, "test").split == "val"
    with pytest.raises(InputError, match="has no folder train"):
        open_dataset("imagenet", tmp_path, "train")


def test_imagenet_with_a_train_folder_alone_is_found(tmp_path: Path):
    made.by_class(tmp_path / "ILSVRC2012/train", wordnet_ids()[:3])
    assert open_dataset("imagenet", tmp_path, "train").labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_a_folder_that_is_no_class_is_refused(tmp_path: Path):
    made.by_class(tmp_path / "imagenet/val", [FIRST, "n99999999"])
    with pytest.raises(InputError, match="n99999999: the folder is outside the 1000 classes"):
        open_dataset("imagenet", tmp_path)


@pytest.mark.parametrize(("name", "folder"), [("imagenet-a", "imagenet-a"), ("imagenet-r", "imagenet_r")])
def test_a_and_r_are_judged_among_their_200_classes(name: str, folder: str, tmp_path: Path):
    ids = wordnet_ids(name)
    made.by_class(tmp_path / folder, [ids[0], ids[7], ids[199]])
    ours = open_dataset(name, tmp_path)
    of_all = [wordnet_ids().index(one) for one in ids]
    assert ours.labels.tolist() == [0, 0, 7, 7, 199, 199]
    assert ours.classes == tuple(NAMES[number] for number in of_all)


def test_the_subsets_are_clip_benchmarks():
    import re
    from importlib.resources import files

    source = (files("clip_benchmark") / "datasets" / "builder.py").read_text()
    for subset, name in (("imagenet", "all_imagenet_wordnet_ids"), ("imagenet-a", "imagenet_a_wnids")):
        listed = re.search(name + r" = \[([^\]]*)\]", source)
        assert listed is not None
        assert re.findall(r"n\d+", listed[1]) == list(wordnet_ids(subset))
    listed = re.search(r"imagenet_r_wnids = \{([^}]*)\}", source)
    assert listed is not None
    assert sorted(re.findall(r"n\d+", listed[1])) == list(wordnet_ids("imagenet-r"))


def test_v2_has_folders_of_numbers(tmp_path: Path):
    made.by_class(tmp_path / "imagenetv2-matched-frequency-format-val", ["0", "1", "10", "2", "999"], 1)
    ours = open_dataset("imagenetv2", tmp_path)
    assert {int(ours.source.key(i).split("/")[0]): int(label) for i, label in enumerate(ours.labels)} == {
        number: number for number in (0, 1, 2, 10, 999)
    }
    assert ours.classes == NAMES


def test_sketch(tmp_path: Path):
    made.by_class(tmp_path / "sketch", [wordnet_ids()[0], wordnet_ids()[500]])
    assert open_dataset("imagenet-sketch", tmp_path).labels.tolist() == [0, 0, 500, 500]
    assert find("imagenet", tmp_path) is None
    assert find("imagenet-sketch", tmp_path / "sketch") is not None


def objectnet(root: Path) -> None:
    """113 of 120 classes are ImageNet's, as the mappings of the release say; the last stands for two of it.

    pytorch_to_imagenet_2012_id.json is written the way that the release reads it: class number to line number.
    """
    mappings = root / "objectnet-1.0/mappings"
    mappings.mkdir(parents=True)
    lines = np.random.default_rng(0).permutation(1000).tolist()
    made.write_lines(mappings / "imagenet_to_label_2012_v2", [f"inet {number}" for number in np.argsort(lines)])
    (mappings / "pytorch_to_imagenet_2012_id.json").write_text(json.dumps(dict(enumerate(lines))))
    names = {f"folder_{number:03d}": f"Thing {number}" for number in range(120)}
    (mappings / "folder_to_objectnet_label.json").write_text(json.dumps(names))
    imagenet = {f"Thing {number}": f"inet {5 * number}" for number in range(112)}
    imagenet["Thing 115"] = "inet 600; inet 601"
    (mappings / "objectnet_to_imagenet_1k.json").write_text(json.dumps(imagenet))
    made.by_class(root / "objectnet-1.0/images", ["folder_003", "folder_113", "folder_115"])


def test_objectnet_is_judged_on_the_classes_that_imagenet_has(tmp_path: Path):
    objectnet(tmp_path)
    ours = open_dataset("objectnet", tmp_path)
    assert len(ours.classes) == 113
    assert ours.labels.tolist() == [3, 3, 112, 112]
    assert (ours.classes[3], ours.classes[112]) == ("thing 3", "thing 115")


def test_objectnet_is_what_clip_benchmark_reads(tmp_path: Path):
    from clip_benchmark.datasets.objectnet import ObjectNetDataset

    objectnet(tmp_path)
    for path in (tmp_path / "objectnet-1.0/mappings").iterdir():  # it looks for them beside the folder
        (tmp_path / path.name).write_bytes(path.read_bytes())
    expected = ObjectNetDataset(tmp_path, None)
    ours = open_dataset("objectnet", tmp_path)
    assert list(ours.classes) == expected.classes
    assert ours.labels.tolist() == [expected[i][1] for i in range(len(expected))]


def test_objectnet_whose_mappings_do_not_fit(tmp_path: Path):
    objectnet(tmp_path)
    (tmp_path / "objectnet-1.0/mappings/objectnet_to_imagenet_1k.json").write_text('{"Thing 3": "tench"}')
    with pytest.raises(InputError, match="names 1 classes where there are 113"):
        open_dataset("objectnet", tmp_path)
