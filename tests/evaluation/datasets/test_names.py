"""Names and templates are the published ones."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.resources import files

import pytest

from declip.errors import InputError
from declip.evaluation.datasets import BENCHMARKS, benchmark
from declip.evaluation.datasets.names import class_names, templates, wordnet_ids

SHIPPED = ("imagenet1k", "pets", "flowers", "caltech101")


def test_imagenet_names_and_templates_are_open_clips():
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES

    assert list(class_names("imagenet1k")) == list(IMAGENET_CLASSNAMES)
    assert list(templates("imagenet1k")) == [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]
    assert len(templates("imagenet1k")) == 80


def test_names_and_templates_are_clip_benchmarks():
    folder = files("clip_benchmark") / "datasets"
    names = json.loads((folder / "en_classnames.json").read_text())
    prompts = json.loads((folder / "en_zeroshot_classification_templates.json").read_text())
    for key in SHIPPED:
        assert list(class_names(key)) == names[key]
    for key in {known.names for known in BENCHMARKS.values() if known.names}:
        assert list(templates(key)) == [template.replace("{c}", "{}") for template in prompts[key]]


def test_names_fit_the_number_of_classes():
    for known in BENCHMARKS.values():
        if known.names in SHIPPED and known.names != "imagenet1k":
            assert len(class_names(known.names)) == known.classes
    assert [len(wordnet_ids(subset)) for subset in ("imagenet", "imagenet-a", "imagenet-r")] == [1000, 200, 200]
    for subset in ("imagenet", "imagenet-a", "imagenet-r"):
        assert list(wordnet_ids(subset)) == sorted(set(wordnet_ids(subset)) & set(wordnet_ids()))


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("CIFAR-10", "cifar10"),
        ("wds/vtab/cifar10", "cifar10"),
        ("imagenet1k", "imagenet"),
        ("Flowers102", "flowers"),
        ("wds/imagenetv2", "imagenet-v2"),
        ("wds/mscoco_captions", "coco"),
        ("fgvc_aircraft", "aircraft"),
    ],
)
def test_other_spellings_are_known(spelling: str, name: str):
    assert benchmark(spelling).name == name


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(InputError, match=r"no dataset 'cifra10': did you mean cifar10\?"):
        benchmark("cifra10")
    with pytest.raises(InputError, match="choose one of pets, cifar10"):
        benchmark("xyzzy")


def test_the_catalogue_is_consistent():
    for known in BENCHMARKS.values():
        splits = [known.test, *([known.train] if known.train else []), *(known.search or ())]
        assert set(splits) <= set(known.splits), known.name
        assert ("linear-probe" in known.tasks) <= (known.train is not None)
        assert (known.metric == "recall") == ("retrieval" in known.tasks) == (known.classes == 0)


def test_listing_needs_nothing_that_takes_time():
    program = (
        "import sys; from declip.evaluation.datasets import listing; listing('.'); "
        "print({'torch', 'numpy', 'pyarrow', 'timm', 'torchvision'} & set(sys.modules))"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "set()"
