"""Class names and prompt templates of the benchmarks, and the WordNet ids of ImageNet's classes.

Names and templates are CLIP's own and lie in ``names/``, with their source in ``names/NOTICE``. Of the sets that are
not there, CLIP's class names are the ones in the set's own files, with spaces for underscores.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

_TIMM_LISTS = {
    "imagenet": "imagenet_synsets.txt",
    "imagenet-a": "imagenet_a_synsets.txt",
    "imagenet-r": "imagenet_r_synsets.txt",
}


def class_names(key: str) -> tuple[str, ...]:
    """CLIP's names of a set's classes, in the order of its labels; () for a set whose own files name them."""
    return tuple(_shipped("classes").get(key, ()))


def templates(key: str) -> tuple[str, ...]:
    """CLIP's prompt templates for a set, with ``{}`` where the class name goes. KeyError for a set that has none."""
    return tuple(_shipped("templates")[key])


@cache
def wordnet_ids(subset: Literal["imagenet", "imagenet-a", "imagenet-r"] = "imagenet") -> tuple[str, ...]:
    """The WordNet ids of ImageNet's 1,000 classes, or of the 200 of ImageNet-A or -R: sorted, as the labels are.

    From the lists that timm ships, read without importing it, which takes seconds.
    """
    timm = find_spec("timm")
    assert timm is not None, "timm is a dependency"
    assert timm.origin is not None
    return tuple((Path(timm.origin).parent / "data" / "_info" / _TIMM_LISTS[subset]).read_text("utf-8").split())


@cache
def _shipped(kind: str) -> dict[str, list[str]]:
    lists: dict[str, list[str]] = json.loads((files(__package__) / "names" / f"{kind}.json").read_text("utf-8"))
    return lists
