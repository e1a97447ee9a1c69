"""From what the user named to a source."""

from __future__ import annotations

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
from declip.errors import InputError, first_line
from declip.pairs import Data

DEMOS = ("noto", "twemoji", "fluent3d")
KINDS = (
    "a .parquet or .arrow file, tar shards, a .csv, .tsv or .jsonl caption table, a folder with one of these, an image "
    "folder, a Hugging Face dataset on disk, or " + ", ".join(f"demo:{name}" for name in DEMOS)
)

_SPLIT = re.compile(r"\w+-\d+-of-\d+(-\w+)?\.parquet")  # as the hub names them
OPENED: dict[str, Callable[[str, Path, Data, bool], Source]] = {
    ".parquet": open_parquet,
    **dict.fromkeys(TEXT_TABLES, open_text_table),
    **dict.fromkeys(ARROW_FILES, open_arrow),
}


def open_sources(specs: Sequence[str], data: Data, *, need_captions: bool = True) -> Source:
    """Open what the user named, several one after the other.

    specs: parquet and Arrow files, tar shards, caption tables (columns filename and caption, paths relative to the
    table; several rows of a file name are one pair), folders with one of these, image folders, Hugging Face datasets on
    disk, demo:NAME, and patterns of files. Columns are found by their names and types, and the ones told in ``data``
    win.
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
        with resources.as_file(resources.files("declip") / "data" / "demo" / f"{demo}.parquet") as path:
            return open_parquet(spec, path, data, need_captions)
    paths = [Path(path).expanduser() for path in expand(spec)]
    for path in paths:
        if not path.exists():
            raise InputError(f"There is no file or folder {str(path)!r}: give {KINDS}.")
    if len(paths) == 1 and paths[0].is_dir():
        source = _open_folder(spec, paths[0], data, need_captions)
    else:
        source = _open_files(spec, paths, data, need_captions)
    if not len(source):
        raise InputError(f"{spec} holds no pairs.")
    return source


def _open_files(spec: str, paths: Sequence[Path], data: Data, need_captions: bool) -> Source:
    suffixes = {path.suffix.lower() for path in paths}
    if len(suffixes) > 1:
        raise InputError(
            f"{spec} names files of several kinds ({', '.join(sorted(suffixes))}): name one kind at a time."
        )
    suffix = suffixes.pop()
    if suffix == ".tar":
        return open_tar(spec, paths, data)
    if suffix not in OPENED:
        raise InputError(f"{spec} is of no known kind: give {KINDS}.")
    opened = OPENED[suffix]
    parts: list[Source] = [opened(spec if len(paths) == 1 else str(path), path, data, need_captions) for path in paths]
    return joined(parts, spec)


def _open_folder(spec: str, folder: Path, data: Data, need_captions: bool) -> Source:
    """A dataset of Hugging Face; else the caption table, tar shards, parquet or Arrow files in it, or the parquet files
    in its data folder, as the hub has them; else an image folder."""
    if is_dataset(folder):
        return open_dataset(spec, folder, data, need_captions)
    if table := _table_in(folder):
        return open_text_table(spec, table, data, need_captions)
    for suffixes in ((".tar",), (".parquet",), ARROW_FILES):
        if files := _files_in(folder, suffixes):
            return _open_files(spec, files, data, need_captions)
    if files := _files_in(folder / "data", (".parquet",)):
        splits = sorted({path.name.split("-")[0] for path in files if _SPLIT.fullmatch(path.name)})
        if len(splits) > 1:  # together, the test pairs would be trained on
            names = " or ".join(f"{folder / 'data' / split}-*.parquet" for split in splits)
            raise InputError(f"{spec} holds several splits: name one, {names}.")
        return _open_files(spec, files, data, need_captions)
    return open_folder(spec, folder, data, need_captions)


def _files_in(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """The files of a kind in a folder, sorted; hidden ones are what another program has not finished."""
    try:
        found = list(folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise InputError(f"Folder {folder} cannot be read: {first_line(error)}.") from None
    return sorted(path for path in found if path.suffix.lower() in suffixes and not path.name.startswith("."))


def _table_in(folder: Path) -> Path | None:
    """The caption table of a folder: captions.csv, .tsv or .jsonl, or the only table there is."""
    # A .json may be anything.
    tables = _files_in(folder, [suffix for suffix in TEXT_TABLES if suffix != ".json"])
    found = [path for path in tables if path.stem == "captions"] or tables
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise InputError(f"Folder {folder} has several caption tables ({names}): name the file instead of the folder.")
    return found[0] if found else None
