"""Classification sets as their archives unpack, against torchvision's readers of the same folders."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import benchmark_folders as made
import numpy as np
import pytest
import scipy.io
import torchvision.datasets as torchvision

from declip.errors import InputError
from declip.evaluation.datasets import find, open_dataset
from declip.evaluation.datasets.matlab import read_matlab

MADE: dict[str, Callable[[Path], None]] = {
    "pets": made.pets,
    "cifar10": lambda root: made.cifar(root, 10),
    "cifar100": lambda root: made.cifar(root, 100),
    "food101": made.food101,
    "flowers": made.flowers,
    "cars": made.cars,
    "aircraft": made.aircraft,
    "dtd": made.dtd,
}
# The name of the set, our split, and torchvision's reader of it.
READERS: list[tuple[str, str, Callable[[str], Any]]] = [
    *(("pets", s, lambda root, s=s: torchvision.OxfordIIITPet(root, s)) for s in ("trainval", "test")),
    *(("cifar10", s, lambda root, s=s: torchvision.CIFAR10(root, s == "train")) for s in ("train", "test")),
    *(("cifar100", s, lambda root, s=s: torchvision.CIFAR100(root, s == "train")) for s in ("train", "test")),
    *(("food101", s, lambda root, s=s: torchvision.Food101(root, s)) for s in ("train", "test")),
    *(("flowers", s, lambda root, s=s: torchvision.Flowers102(root, s)) for s in ("train", "val", "test")),
    *(("cars", s, lambda root, s=s: torchvision.StanfordCars(root, s)) for s in ("train", "test")),
    *(("aircraft", s, lambda root, s=s: torchvision.FGVCAircraft(root, s)) for s in ("train", "trainval", "test")),
    *(("dtd", s, lambda root, s=s: torchvision.DTD(root, s)) for s in ("train", "val", "test")),
]


@pytest.mark.parametrize(("name", "split", "reader"), READERS, ids=[f"{name}-{split}" for name, split, _ in READERS])
def test_items_are_torchvisions(
    name: str, split: str, reader: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # The sets made here are not the real ones, whose checksums torchvision looks at.
    for module in (torchvision.cifar, torchvision.flowers102):
        monkeypatch.setattr(module, "check_integrity", lambda path, md5=None: Path(path).exists())
    MADE[name](tmp_path)
    expected = reader(str(tmp_path))
    ours = open_dataset(name, tmp_path, split)
    assert len(ours) == len(expected) > 2
    for i in range(len(expected)):
        image, label = expected[i]
        pair = ours.source[i]
        assert ours.labels[i] == label
        np.testing.assert_array_equal(made.rgb(pair.image), np.asarray(image.convert("RGB")))
    if name not in ("pets", "flowers"):  # whose names are CLIP's
        assert list(ours.classes) == [kind.replace("_", " ") for kind in expected.classes]


def test_sun397_reads_the_first_partition(tmp_path: Path):
    made.sun397(tmp_path)
    test, everything = open_dataset("sun397", tmp_path), open_dataset("sun397", tmp_path, "all")
    assert (test.split, len(test), len(everything)) == ("test", 6, 12)
    assert test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert test.classes[:2] == ("scene 000", "scene 001 indoor")
    assert test.source[0].key == "a/scene_000/sun_k0.jpg"
    labels = {Path(path): label for path, label in zip(*_all_of_torchvision(tmp_path), strict=True)}
    ours = {
        tmp_path / "SUN397" / everything.source.key(i): int(label) for i, label in enumerate(everything.labels.tolist())
    }
    assert ours == labels


def _all_of_torchvision(root: Path) -> tuple[list[Path], list[int]]:
    expected = torchvision.SUN397(str(root))
    return expected._image_files, expected._labels


def test_sun397_without_its_lists_has_no_test_split(tmp_path: Path):
    made.sun397(tmp_path)
    (tmp_path / "SUN397/Testing_01.txt").unlink()
    with pytest.raises(InputError, match="no test split: unpack Partitions"):
        open_dataset("sun397", tmp_path)


def test_caltech101_is_split_by_a_seed(tmp_path: Path):
    made.caltech101(tmp_path)
    train, test = open_dataset("caltech101", tmp_path, "train"), open_dataset("caltech101", tmp_path, "test")
    assert np.bincount(train.labels, minlength=102).tolist() == [30] * 3 + [1] * 99
    assert np.bincount(test.labels).tolist() == [2, 2, 2]
    keys = [source.key(i) for source in (train.source, test.source) for i in range(len(source))]
    assert len(set(keys)) == len(keys) == 96 + 99
    again = open_dataset("caltech101", tmp_path, "test")
    assert [again.source.key(i) for i in range(6)] == keys[-6:]
    assert train.classes[:3] == ("background", "off-center face", "centered face")


def test_caltech101_without_its_background_folder_is_refused(tmp_path: Path):
    made.caltech101(tmp_path, background=False)
    with pytest.raises(InputError, match="holds 101 folders where Caltech-101 has 102"):
        open_dataset("caltech101", tmp_path)


def test_splits_that_are_joined(tmp_path: Path):
    made.dtd(tmp_path)
    made.flowers(tmp_path)
    assert len(open_dataset("dtd", tmp_path, "trainval")) == 2 * 47
    assert open_dataset("flowers", tmp_path, "trainval").labels.tolist() == [0, 76, 7, 76, 101, 8]


def test_a_folder_may_be_named_itself(tmp_path: Path):
    made.pets(tmp_path)
    (tmp_path / "sets").mkdir()
    (tmp_path / "oxford-iiit-pet").rename(tmp_path / "sets" / "pets")
    for root in (tmp_path / "sets", tmp_path / "sets" / "pets"):
        found = find("pets", root)
        assert found is not None
        assert found.folder == tmp_path / "sets" / "pets"
    assert find("pets", tmp_path) is None
    assert open_dataset("pets", tmp_path / "sets", "train").split == "trainval"


def test_a_pickle_that_would_run_a_program_is_refused(tmp_path: Path):
    made.cifar(tmp_path, 10)

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "cifar-10-batches-py/test_batch").write_bytes(pickle.dumps({"data": Evil(), "labels": []}))
    with pytest.raises(InputError, match=r"test_batch cannot be read as a file of CIFAR: it asks for pathlib"):
        open_dataset("cifar10", tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x02}q\x00.",
        b"no pickle",
        pickle.dumps([1]),
        pickle.dumps({"data": np.zeros((2, 7), np.uint8)}),
        pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [1]}),
        pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": ["x"]}),
    ],
)
def test_a_damaged_cifar_is_one_sentence(content: bytes, tmp_path: Path):
    made.cifar(tmp_path, 10)
    (tmp_path / "cifar-10-batches-py/test_batch").write_bytes(content)
    with pytest.raises(InputError, match="anew"):
        open_dataset("cifar10", tmp_path)


def test_cifar_as_python_2_wrote_it(tmp_path: Path):
    """Opcodes of the real archive: keys and rows are Python 2's strings, and numpy is asked for by its old name."""
    made.cifar(tmp_path, 10)
    rows = np.stack([made.pixels(i).transpose(2, 0, 1).reshape(-1) for i in range(2)])
    string = b"T" + len(rows.tobytes()).to_bytes(4, "little") + rows.tobytes()
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01bt\x85R(K\x01K\x02M\x00\x0c\x86"
        b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        + string
        + b"tb"
    ).replace(b"K\x00\x85U\x01bt\x85R", b"K\x00\x85U\x01btR")
    content = b"\x80\x02}(U\x04data" + array + b"U\x06labels](K\x04K\x07eu."
    (tmp_path / "cifar-10-batches-py/test_batch").write_bytes(content)
    ours = open_dataset("cifar10", tmp_path)
    assert ours.labels.tolist() == [4, 7]
    np.testing.assert_array_equal(made.rgb(ours.source[1].image), made.pixels(1))


@pytest.mark.parametrize("compressed", [False, True])
def test_matlab_files_are_read_as_scipy_reads_them(compressed: bool, tmp_path: Path):
    kind = [("number", object), ("text", object), ("nothing", object)]
    values = {
        "small": np.array([[1, 2, 3]], np.uint8),
        "large": np.arange(1000.0).reshape(1, -1),
        "signed": np.array([[-5, 70000]], np.int32),
        "text": "ähnlich",
        "names": np.array([["one", "two"]], object),
        "rows": np.array([[(1, "x.jpg", np.zeros((0, 0))), (2, "longer name.jpg", np.zeros((0, 0)))]], kind),
    }
    scipy.io.savemat(tmp_path / "a.mat", values, do_compression=compressed)
    read = read_matlab(tmp_path / "a.mat")
    for name in ("small", "large", "signed"):
        assert read[name].tolist() == values[name].reshape(-1).tolist()
    assert (read["text"], read["names"]) == ("ähnlich", ["one", "two"])
    assert [(int(row["number"][0]), row["text"]) for row in read["rows"]] == [(1, "x.jpg"), (2, "longer name.jpg")]


def test_a_damaged_matlab_file_is_one_sentence(tmp_path: Path):
    scipy.io.savemat(tmp_path / "a.mat", {"names": np.array([["one", "two"]], object), "n": np.arange(9)})
    whole = (tmp_path / "a.mat").read_bytes()
    random = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(whole)
        for at in random.integers(0, len(whole), 3):
            damaged[at] = random.integers(256)
        (tmp_path / "b.mat").write_bytes(damaged[: random.integers(1, len(whole) + 1)])
        try:
            read_matlab(tmp_path / "b.mat")
        except InputError as error:
            assert "cannot be read as a MATLAB file" in str(error)  # noqa: PT017
