"""The benchmarks that a model can be judged on: what each is, its published protocol, and where to get it.

Metrics and sizes of the linear-probe sets are those of CLIP (Radford et al. 2021, table 9), of the others those of
their papers. Nothing here looks at the disk or imports anything that takes time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Literal

from declip.errors import InputError

Task = Literal["zero-shot", "linear-probe", "retrieval"]
Metric = Literal["accuracy", "mean_per_class", "recall"]

_CLASSIFIED: tuple[Task, ...] = ("zero-shot", "linear-probe")
_ZERO_SHOT: tuple[Task, ...] = ("zero-shot",)
_RETRIEVAL: tuple[Task, ...] = ("retrieval",)


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A known set.

    splits: the published number of images in each; test: the split that is judged; train: the one that a linear probe
    is fitted on, if it has one; search: the splits to fit and judge on while its regularisation is searched, where the
    set has a validation split of its own; classes: their number; names: whose class names and templates it has, as
    ``names.py`` takes them; needs: the layout of its files; hub: its folder as CLIP benchmark publishes it; folds: the
    test split is cut in so many parts, in order, each is judged by itself, and the mean counts.
    """

    name: str
    title: str
    tasks: tuple[Task, ...]
    metric: Metric
    splits: dict[str, int]
    needs: str
    source: str
    names: str = ""
    classes: int = 0
    test: str = "test"
    train: str | None = None
    search: tuple[str, str] | None = None
    hub: str = ""
    aliases: tuple[str, ...] = ()
    folds: int = 1


_PROBED = (
    Benchmark(
        name="pets",
        title="Oxford-IIIT Pets",
        tasks=_CLASSIFIED,
        metric="mean_per_class",
        splits={"trainval": 3680, "test": 3669},
        train="trainval",
        classes=37,
        names="pets",
        needs="oxford-iiit-pet/ with images/ and annotations/{trainval,test}.txt",
        source="https://www.robots.ox.ac.uk/~vgg/data/pets/",
        hub="wds_vtab-pets",
        aliases=("oxford-iiit-pet", "oxford-pets", "vtab-pets"),
    ),
    Benchmark(
        name="cifar10",
        title="CIFAR-10",
        tasks=_CLASSIFIED,
        metric="accuracy",
        splits={"train": 50000, "test": 10000},
        train="train",
        classes=10,
        names="cifar10",
        needs="cifar-10-batches-py/ with batches.meta, data_batch_1 to 5 and test_batch",
        source="https://www.cs.toronto.edu/~kriz/cifar.html",
        hub="wds_vtab-cifar10",
        aliases=("cifar-10", "vtab-cifar10"),
    ),
    Benchmark(
        name="cifar100",
        title="CIFAR-100",
        tasks=_CLASSIFIED,
        metric="accuracy",
        splits={"train": 50000, "test": 10000},
        train="train",
        classes=100,
        names="cifar100",
        needs="cifar-100-python/ with meta, train and test",
        source="https://www.cs.toronto.edu/~kriz/cifar.html",
        hub="wds_vtab-cifar100",
        aliases=("cifar-100", "vtab-cifar100"),
    ),
    Benchmark(
        name="sun397",
        title="SUN397",
        tasks=_CLASSIFIED,
        metric="accuracy",
        splits={"train": 19850, "test": 19850, "all": 108754},
        train="train",
        classes=397,
        names="sun397",
        needs="SUN397/ with ClassName.txt and a/, b/, …; Training_01.txt and Testing_01.txt of Partitions.zip in it",
        source="https://vision.princeton.edu/projects/2010/SUN/",
        hub="wds_sun397",
        aliases=("sun-397",),
    ),
    Benchmark(
        name="food101",
        title="Food-101",
        tasks=_CLASSIFIED,
        metric="accuracy",
        splits={"train": 75750, "test": 25250},
        train="train",
        classes=101,
        names="food101",
        needs="food-101/ with images/ and meta/{classes,train,test}.txt",
        source="https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/",
        hub="wds_food101",
        aliases=("food-101",),
    ),
    Benchmark(
        name="flowers",
        title="Oxford Flowers-102",
        tasks=_CLASSIFIED,
        metric="mean_per_class",
        splits={"train": 1020, "val": 1020, "trainval": 2040, "test": 6149},
        train="trainval",
        search=("train", "val"),
        classes=102,
        names="flowers",
        needs="flowers-102/ with jpg/, imagelabels.mat and setid.mat",
        source="https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
        hub="wds_vtab-flowers",
        aliases=("flowers102", "flowers-102", "oxford-flowers", "oxford-flowers-102", "vtab-flowers"),
    ),
    Benchmark(
        name="cars",
        title="Stanford Cars",
        tasks=_CLASSIFIED,
        metric="accuracy",
        splits={"train": 8144, "test": 8041},
        train="train",
        classes=196,
        names="cars",
        needs="stanford_cars/ with cars_train/, cars_test/, devkit/ and cars_test_annos_withlabels.mat",
        source="the authors' page is gone; a copy: https://www.kaggle.com/datasets/rickyyyyyyy/torchvision-stanford-cars",
        hub="wds_cars",
        aliases=("stanford-cars",),
    ),
    Benchmark(
        name="caltech101",
        title="Caltech-101",
        tasks=_CLASSIFIED,
        metric="mean_per_class",
        splits={"train": 3060, "test": 6085, "all": 9145},
        train="train",
        classes=102,
        names="caltech101",
        needs="caltech101/101_ObjectCategories/, BACKGROUND_Google included; 30 images of each class, drawn with a "
        "fixed seed, are train and the others test",
        source="https://data.caltech.edu/records/mzrjq-6wc02",
        hub="wds_vtab-caltech101",
        aliases=("caltech-101", "vtab-caltech101"),
    ),
    Benchmark(
        name="aircraft",
        title="FGVC Aircraft",
        tasks=_CLASSIFIED,
        metric="mean_per_class",
        splits={"train": 3334, "val": 3333, "trainval": 6667, "test": 3333},
        train="trainval",
        search=("train", "val"),
        classes=100,
        names="fgvc_aircraft",
        needs="fgvc-aircraft-2013b/data/ with images/, variants.txt and images_variant_{train,val,trainval,test}.txt",
        source="https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/",
        hub="wds_fgvc_aircraft",
        aliases=("fgvc-aircraft",),
    ),
    Benchmark(
        name="dtd",
        title="Describable Textures",
        tasks=_CLASSIFIED,
        metric="accuracy",
        splits={"train": 1880, "val": 1880, "trainval": 3760, "test": 1880},
        train="trainval",
        search=("train", "val"),
        classes=47,
        names="dtd",
        needs="dtd/ with images/ and labels/{train1,val1,test1}.txt",
        source="https://www.robots.ox.ac.uk/~vgg/data/dtd/",
        hub="wds_vtab-dtd",
        aliases=("describable-textures", "vtab-dtd"),
    ),
    Benchmark(
        name="imagenet",
        title="ImageNet",
        tasks=_CLASSIFIED,
        metric="accuracy",
        splits={"train": 1281167, "val": 50000},
        test="val",
        train="train",
        classes=1000,
        names="imagenet1k",
        needs="imagenet/ with train/ and val/, a folder n01440764, … for each class in both",
        source="https://image-net.org/challenges/LSVRC/2012/2012-downloads.php (registration)",
        hub="wds_imagenet1k",
        aliases=("imagenet1k", "imagenet-1k", "ilsvrc2012"),
    ),
)

_SHIFTED = (
    Benchmark(
        name="imagenet-v2",
        title="ImageNet-V2 (matched frequency)",
        tasks=_ZERO_SHOT,
        metric="accuracy",
        splits={"test": 10000},
        classes=1000,
        names="imagenet1k",
        needs="imagenetv2-matched-frequency-format-val/ with the folders 0 to 999",
        source="https://huggingface.co/datasets/vaishaal/ImageNetV2",
        hub="wds_imagenetv2",
        aliases=("imagenetv2",),
    ),
    Benchmark(
        name="imagenet-a",
        title="ImageNet-A",
        tasks=_ZERO_SHOT,
        metric="accuracy",
        splits={"test": 7500},
        classes=200,
        names="imagenet1k",
        needs="imagenet-a/ with a folder n01498041, … for each of its 200 classes",
        source="https://people.eecs.berkeley.edu/~hendrycks/imagenet-a.tar",
        hub="wds_imagenet-a",
    ),
    Benchmark(
        name="imagenet-r",
        title="ImageNet-R",
        tasks=_ZERO_SHOT,
        metric="accuracy",
        splits={"test": 30000},
        classes=200,
        names="imagenet1k",
        needs="imagenet-r/ with a folder n01443537, … for each of its 200 classes",
        source="https://people.eecs.berkeley.edu/~hendrycks/imagenet-r.tar",
        hub="wds_imagenet-r",
    ),
    Benchmark(
        name="imagenet-sketch",
        title="ImageNet-Sketch",
        tasks=_ZERO_SHOT,
        metric="accuracy",
        splits={"test": 50889},
        classes=1000,
        names="imagenet1k",
        needs="sketch/ with a folder n01440764, … for each class",
        source="https://github.com/HaohanWang/ImageNet-Sketch",
        hub="wds_imagenet_sketch",
    ),
    Benchmark(
        name="objectnet",
        title="ObjectNet",
        tasks=_ZERO_SHOT,
        metric="accuracy",
        splits={"test": 18574},
        classes=113,
        names="imagenet1k",
        needs="objectnet-1.0/ with images/ and mappings/; its 113 classes that ImageNet has are judged",
        source="https://objectnet.dev/download.html",
        hub="wds_objectnet",
    ),
)

_CAPTIONED = (
    Benchmark(
        name="flickr30k",
        title="Flickr30k",
        tasks=_RETRIEVAL,
        metric="recall",
        splits={"train": 29000, "val": 1014, "test": 1000},
        train="train",
        needs="flickr30k/ with the images or a folder of them, and Karpathy's dataset_flickr30k.json, CLIP benchmark's "
        "flickr30k_test_karpathy.txt, or results_20130124.token with the list test.txt",
        source="https://shannon.cs.illinois.edu/DenotationGraph/ (form), the splits from "
        "https://cs.stanford.edu/people/karpathy/deepimagesent/",
        hub="wds_flickr30k",
        aliases=("flickr-30k",),
    ),
    Benchmark(
        name="flickr8k",
        title="Flickr8k",
        tasks=_RETRIEVAL,
        metric="recall",
        splits={"train": 6000, "val": 1000, "test": 1000},
        train="train",
        needs="flickr8k/ with the images or a folder of them, and Karpathy's dataset_flickr8k.json, CLIP benchmark's "
        "flickr8k_test_karpathy.txt, or Flickr8k.token.txt with Flickr_8k.testImages.txt",
        source="https://www.kaggle.com/datasets/adityajn105/flickr8k, the splits from "
        "https://cs.stanford.edu/people/karpathy/deepimagesent/",
        hub="wds_flickr8k",
        aliases=("flickr-8k",),
    ),
    Benchmark(
        name="coco",
        title="COCO captions (Karpathy, 5,000)",
        tasks=_RETRIEVAL,
        metric="recall",
        splits={"train": 82783, "restval": 30504, "val": 5000, "test": 5000},
        train="train",
        needs="coco/ with train2014/, val2014/ and Karpathy's dataset_coco.json or CLIP benchmark's "
        "coco_test_karpathy.json",
        source="https://cocodataset.org/#download, the splits from "
        "https://cs.stanford.edu/people/karpathy/deepimagesent/",
        hub="wds_mscoco_captions",
        aliases=("coco-5k", "mscoco", "mscoco-captions"),
    ),
)
# Of VSE++ (Faghri et al. 2018) and others before: five folds of 1,000 images.
_FOLDED = replace(
    _CAPTIONED[-1],
    name="coco-1k",
    title="COCO captions (Karpathy, five folds of 1,000)",
    splits={"test": 5000},
    train=None,
    aliases=("coco", *_CAPTIONED[-1].aliases),
    folds=5,
)

BENCHMARKS: dict[str, Benchmark] = {known.name: known for known in (*_PROBED, *_SHIFTED, *_CAPTIONED, _FOLDED)}


def _plain(name: str) -> str:
    return name.lower().replace("_", "-").replace("/", "-").removeprefix("wds-")


_SPELLINGS = {
    _plain(spelling): known.name
    for known in reversed(BENCHMARKS.values())  # of a spelling that two have, the first one has it
    for spelling in (known.hub, *known.aliases, known.name)
}


def is_benchmark(name: str) -> bool:
    """Whether it is a benchmark's name, in any spelling that ``benchmark`` takes."""
    return _plain(name) in _SPELLINGS


def benchmark(name: str) -> Benchmark:
    """The benchmark of a name, or of another spelling of it: ``CIFAR-10``, CLIP benchmark's ``wds/vtab/cifar10``.

    Raises InputError for any other name, with the nearest one.
    """
    if is_benchmark(name):
        return BENCHMARKS[_SPELLINGS[_plain(name)]]
    near = get_close_matches(_plain(name), _SPELLINGS, 1, 0.5)
    hint = f"did you mean {_SPELLINGS[near[0]]}?" if near else "choose one of " + ", ".join(BENCHMARKS) + "."
    raise InputError(f"There is no dataset {name!r}: {hint}")
