"""Layouts that any set may have: CLIP benchmark's shards, Hugging Face datasets, parquet files and image folders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from declip.data.sources import Pair, Source, joined, open_sources
from declip.data.sources.base import Wrapped, clean_captions
from declip.data.sources.class_labels import names_in_features, names_in_schema
from declip.data.sources.columns import LABEL_NAMES
from declip.data.sources.folder import open_folder
from declip.errors import InputError, first_line
from declip.evaluation.datasets.labelled import Read, key_of, numbered, spoken
from declip.evaluation.datasets.layouts import Found, parquet_files
from declip.model.prompts import resolve_templates
from declip.pairs import Data

_NO_CAPTIONS = Data(templates=[])


@dataclass(frozen=True, slots=True, eq=False)
class LinesSource(Wrapped):
    """A source whose captions hold several each, a line a caption, as CLIP benchmark's retrieval shards have them."""

    source: Source

    @property
    def shards(self) -> NDArray[np.int64]:
        return self.source.shards

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int, /) -> Pair:
        pair = self.source[i]
        return replace(pair, captions=_lines(pair.captions))

    def captions(self, i: int, /) -> tuple[str, ...]:
        return _lines(self.source.captions(i))

    def _index(self, i: int) -> int:
        return i


def read_general(found: Found, parts: Sequence[str], captioned: bool, classes: tuple[str, ...]) -> Read:
    """A split of a benchmark in one of the layouts of any set.

    parts: what the split is called there, or the two that make it up; classes: the names of the benchmark's classes
    where they are known.
    """
    reads = [_part(found, part, captioned, classes) for part in parts]
    if len(reads) == 1:
        return reads[0]
    if len({read.classes for read in reads}) > 1:
        raise InputError(f"{found.folder}: its splits {' and '.join(parts)} name unlike classes: judge them by path.")
    source = joined([read.source for read in reads], str(found.folder))
    labels = None if captioned else np.concatenate([read.labels for read in reads if read.labels is not None])
    return Read(source, labels, reads[0].classes, reads[0].templates)


def _part(found: Found, part: str, captioned: bool, classes: tuple[str, ...]) -> Read:
    folder = found.folder / part
    match found.layout:
        case "webdataset":
            return _shards(found.folder, part, captioned)
        case "parquet":
            files = [str(file) for file in parquet_files(found, part)]
            source = open_sources(files, Data(), need_captions=captioned)
            folder = Path(files[0])
        case "huggingface":
            source = open_sources([str(folder)], Data(), need_captions=captioned)
        case _:
            source = open_folder(str(folder), folder, _NO_CAPTIONS, False)
    return _table(str(folder), source, captioned, _as_prompts_say(_noted_classes(str(folder)), classes))


def _shards(folder: Path, split: str, captioned: bool) -> Read:
    """CLIP benchmark's webdataset folder: ``test/0.tar`` and on, as many as ``test/nshards.txt`` says.

    Its classnames.txt and zeroshot_classification_templates.txt, a line each, are the names and prompts.
    """
    count = _count(folder / split / "nshards.txt")
    shards = [folder / split / f"{number}.tar" for number in range(count)]
    if missing := [shard for shard in shards if not shard.is_file()]:
        raise InputError(f"{missing[0]} is missing, one of {count} shards: download the split {split} anew.")
    source = open_sources([str(shard) for shard in shards], Data(), need_captions=captioned)
    if captioned:
        return Read(LinesSource(source))
    classes = _text_lines(folder / "classnames.txt")
    prompts = [line.replace("{c}", "{}") for line in _text_lines(folder / "zeroshot_classification_templates.txt")]
    return Read(source, numbered(source, classes), classes, tuple(resolve_templates(prompts)) if prompts else ())


def _table(where: str, source: Source, captioned: bool, classes: tuple[str, ...]) -> Read:
    """Pairs whose labels are names, or numbers of the given classes."""
    if captioned:
        return Read(source)
    there = {label for i in range(len(source)) if (label := source.label(i)) is not None}
    if not there:
        raise InputError(f"{where} has no labels: name the label column.")
    if not classes:
        if all(_is_number(label) for label in there):
            raise InputError(
                f"{where} has numbers for labels and no class names: add a column class_name with the name of each."
            )
        classes = tuple(sorted(there))
    return Read(source, numbered(source, classes), spoken(classes))


def _is_number(label: str) -> bool:
    return label.removeprefix("-").isdigit()


def _noted_classes(path: str) -> tuple[str, ...]:
    """The class names that Hugging Face notes in a parquet file's schema or beside a dataset; () where there are none.

    They are in the order of the numbers that stand for them.
    """
    info = Path(path) / "dataset_info.json"
    try:
        if info.is_file():
            noted = names_in_features(json.loads(info.read_text("utf-8")).get("features"))
        else:
            noted = names_in_schema(pq.read_schema(path).metadata) if path.endswith(".parquet") else {}
    except (OSError, ValueError, AttributeError):
        return ()
    return next((noted[name] for name in LABEL_NAMES if name in noted), ())


def _as_prompts_say(noted: tuple[str, ...], known: tuple[str, ...]) -> tuple[str, ...]:
    """Class names as the files have them, but for those of a benchmark that differ from its own in spelling alone."""
    own = {key_of(name): name for name in known}
    return tuple(own.get(key_of(name), name) for name in noted) or known


def _count(file: Path) -> int:
    try:
        return int(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} does not say how many shards there are: {first_line(error)}.") from None


def _text_lines(file: Path) -> tuple[str, ...]:
    """The lines of a file, stripped; () where there is no file or nothing in it. Empty lines between others stay."""
    try:
        text = file.read_text("utf-8").rstrip()
    except FileNotFoundError:
        return ()
    except (OSError, UnicodeError) as error:
        raise InputError(f"{file} cannot be read: {first_line(error)}; download it anew.") from None
    return tuple(line.strip() for line in text.split("\n")) if text else ()


def _lines(captions: tuple[str, ...]) -> tuple[str, ...]:
    return clean_captions(line for caption in captions for line in caption.split("\n"))
