"""From what the user named to a source."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path

from declip.data.patterns import expand
from declip.data.sources.arrow import ARROW_FILES, is_dataset, open_arrow, open_dataset
from declip.data.sources.base import Source, joined
from declip.data.sources.folder import open_folder
from declip.data.sources.parquet import open_parquet
from declip.data.sources.rows import TEXT_TABLES
from declip.data.sources.tar import open_tar
from declip.data.sources.text_table import open_text_table
from declip.data.storage import Storage, is_remote, join
from declip.errors import InputError
from declip.pairs import Data

DEMOS = ("noto", "twemoji", "fluent3d")
KINDS = (
    "a .parquet or .arrow file, tar shards, a .csv, .tsv or .jsonl caption table, a folder with one of these, an image "
    "folder, a Hugging Face dataset on disk, or " + ", ".join(f"demo:{name}" for name in DEMOS)
)

UNFINISHED = "unfinished.json"
"""In a folder that `declip data pack` has not filled yet."""

_SUFFIXES = (".tar", ".parquet", *TEXT_TABLES, *ARROW_FILES)
_SPLIT = re.compile(r"\w+-\d+-of-\d+(-\w+)?\.parquet")  # as the hub names them


def open_sources(specs: Sequence[str], data: Data, *, need_captions: bool = True) -> Source:
    """Open what the user named, several one after the other.

    specs: parquet and Arrow files, tar shards, caption tables (columns filename and caption, paths relative to the
    table; several rows of a file name are one pair), folders with one of these, image folders, Hugging Face datasets on
    disk, demo:NAME, and patterns of files. All but image folders and datasets may be URLs, as s3://, gs://, https://
    and hf://. Columns are found by their names and types, and the ones told in ``data`` win.
    ``need_captions=False`` also opens labelled images without a caption column.

    Raises InputError where there is no such file, it cannot be read, a column is missing, or there are no pairs.
    """
    if not specs:
        raise InputError(f"No data was given: name {KINDS}.")
    sources = [_open(str(spec), data, need_captions) for spec in specs]
    return joined(sources)


def _open(spec: str, data: Data, need_captions: bool) -> Source:
    kind, _, demo = spec.partition(":")
    if kind == "demo":
        if demo not in DEMOS:
            raise InputError(f"There are no embedded pairs {spec!r}: there are demo:{', demo:'.join(DEMOS)}.")
        with resources.as_file(resources.files("declip") / "data" / "demo" / f"{demo}.parquet") as file:
            return open_parquet(spec, [str(file)], data, Storage.of(data), need_captions=need_captions)
    paths = [path if is_remote(path) else os.path.expanduser(path) for path in expand(spec)]
    for path in paths:
        if not is_remote(path) and not os.path.exists(path):
            raise InputError(f"There is no file or folder {path!r}: give {KINDS}.")
    if len(paths) == 1 and (os.path.isdir(paths[0]) or (is_remote(spec) and _suffix(spec) not in _SUFFIXES)):
        source = _open_folder(spec, paths[0], data, need_captions)
    else:
        source = _open_files(spec, paths, data, need_captions)
    if not len(source):
        raise InputError(f"{spec} holds no pairs.")
    return source


def _suffix(path: str) -> str:
    """Of a file's name; a query behind it is none of it."""
    return os.path.splitext(path.split("?")[0] if is_remote(path) else path)[1].lower()


def _open_files(spec: str, paths: Sequence[str], data: Data, need_captions: bool) -> Source:
    suffixes = {_suffix(path) for path in paths}
    if len(suffixes) > 1:
        raise InputError(
            f"{spec} names files of several kinds ({', '.join(sorted(suffixes))}): name one kind at a time."
        )
    suffix = suffixes.pop()
    if suffix == ".tar":
        return open_tar(spec, paths, data, need_captions)
    if suffix == ".parquet":
        return open_parquet(spec, paths, data, Storage.of(data), need_captions=need_captions)
    if suffix not in _SUFFIXES:
        raise InputError(f"{spec} is of no known kind: give {KINDS}.")
    opened: Callable[[str, str, Data, bool], Source] = open_arrow if suffix in ARROW_FILES else open_text_table
    return joined([opened(spec if len(paths) == 1 else path, path, data, need_captions) for path in paths], spec)


def _open_folder(spec: str, folder: str, data: Data, need_captions: bool) -> Source:
    """A dataset of Hugging Face; else the caption table, tar shards, parquet or Arrow files in it, or the parquet files
    in its data folder, as the hub has them; else an image folder."""
    if not is_remote(folder) and is_dataset(Path(folder)):
        return open_dataset(spec, Path(folder), data, need_captions)
    storage = Storage.of(data)
    there = _shown(storage.files_in(folder))
    if join(folder, UNFINISHED) in there:
        raise InputError(f"The pack in {spec} is not finished: run the same `declip data pack` again.")
    if table := _table_in(folder, there):
        return open_text_table(spec, table, data, need_captions)
    for suffixes in ((".tar",), (".parquet",), ARROW_FILES):
        if files := [path for path in there if _suffix(path) in suffixes]:
            return _open_files(spec, files, data, need_captions)
    inside = join(folder, "data")
    if files := [path for path in _shown(storage.files_in(inside)) if _suffix(path) == ".parquet"]:
        names = [path.rsplit("/", 1)[-1] for path in files]
        splits = sorted({name.split("-")[0] for name in names if _SPLIT.fullmatch(name)})
        if len(splits) > 1:  # together, the test pairs would be trained on
            choice = " or ".join(join(inside, f"{split}-*.parquet") for split in splits)
            raise InputError(f"{spec} holds several splits: name one, {choice}.")
        return _open_files(spec, files, data, need_captions)
    if is_remote(folder):
        raise InputError(f"{spec} holds no tar shards, parquet or Arrow files and no caption table: name the files.")
    return open_folder(spec, Path(folder), data, need_captions)


def _shown(files: Sequence[str]) -> list[str]:
    """Without hidden files, which are what another program has not finished."""
    return [path for path in files if not path.rsplit("/", 1)[-1].startswith(".")]


def _table_in(folder: str, files: Sequence[str]) -> str | None:
    """The caption table of a folder: captions.csv, .tsv or .jsonl, or the only table there is."""
    # A .json may be anything.
    tables = [path for path in files if _suffix(path) in TEXT_TABLES and _suffix(path) != ".json"]
    found = [path for path in tables if path.rsplit("/", 1)[-1].startswith("captions.")] or tables
    if len(found) > 1:
        names = ", ".join(path.rsplit("/", 1)[-1] for path in found)
        raise InputError(f"Folder {folder} has several caption tables ({names}): name the file instead of the folder.")
    return found[0] if found else None
