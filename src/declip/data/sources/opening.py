"""From what the user named to a source."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from declip.data.sources.base import Concatenation, Source
from declip.data.sources.parquet import open_parquet
from declip.data.sources.text_table import TEXT_TABLES, open_text_table
from declip.errors import InputError
from declip.pairs import Data

DEMOS = ("noto", "twemoji", "fluent3d")
KINDS = "a .parquet file, a .csv, .tsv or .jsonl caption table, a folder with one, or " + ", ".join(
    f"demo:{name}" for name in DEMOS
)


def open_sources(specs: Sequence[str], data: Data, *, need_captions: bool = True) -> Source:
    """Open what the user named, several one after the other.

    specs: parquet files, caption tables (columns filename and caption, paths relative to the table; several rows of a
    file name are one pair), folders with such a table, demo:NAME. Columns are found by their names and types, and the
    ones told in ``data`` win. ``need_captions=False`` also opens labelled images without a caption column.

    Raises InputError where there is no such file, it cannot be read, a column is missing, or there are no pairs.
    """
    if not specs:
        raise InputError(f"No data was given: name {KINDS}.")
    sources = [_open(str(spec), data, need_captions) for spec in specs]
    return sources[0] if len(sources) == 1 else Concatenation(sources)


def _open(spec: str, data: Data, need_captions: bool) -> Source:
    kind, _, demo = spec.partition(":")
    if kind == "demo":
        if demo not in DEMOS:
            raise InputError(f"There are no embedded pairs {spec!r}: there are demo:{', demo:'.join(DEMOS)}.")
        with resources.as_file(resources.files("declip") / "data" / "demo" / f"{demo}.parquet") as path:
            return open_parquet(spec, path, data, need_captions)
    path = Path(spec).expanduser()
    if not path.exists():
        raise InputError(f"There is no file or folder {spec!r}: give {KINDS}.")
    if path.is_dir():
        path = _table_in(path)
    suffix = path.suffix.lower()
    if suffix not in (".parquet", *TEXT_TABLES):
        raise InputError(f"{spec} is of no known kind: give {KINDS}.")
    source = (open_text_table if suffix in TEXT_TABLES else open_parquet)(spec, path, data, need_captions)
    if not len(source):
        raise InputError(f"{spec} holds no pairs.")
    return source


def _table_in(folder: Path) -> Path:
    """The caption table of a folder: captions.csv, .tsv or .jsonl, or the only table there is."""
    tables = sorted(path for path in folder.iterdir() if path.suffix.lower() in TEXT_TABLES)
    found = [path for path in tables if path.stem == "captions"] or tables
    if not found:
        raise InputError(
            f"Folder {folder} has no caption table: put a captions.csv with the columns filename and caption in it."
        )
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise InputError(f"Folder {folder} has several caption tables ({names}): name the file instead of the folder.")
    return found[0]
