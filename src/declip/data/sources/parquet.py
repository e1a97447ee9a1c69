"""Parquet files."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from declip.data.sources.columns import IMAGE_NAMES, find_columns
from declip.data.sources.table import TableSource, table_of
from declip.errors import InputError, first_line
from declip.pairs import Data


def open_parquet(spec: str, path: Path, data: Data, need_captions: bool) -> TableSource:
    """Read a parquet file's needed columns; raises InputError where it cannot be read or a column is missing."""
    try:
        with pq.ParquetFile(path) as file:
            types = dict(zip(file.schema_arrow.names, file.schema_arrow.types, strict=True))
            columns = find_columns(spec, types, data, IMAGE_NAMES, need_captions=need_captions)
            rows = file.read(columns=columns.names)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{spec} cannot be read as a parquet file: {first_line(error)}.") from None
    return table_of(spec, path.parent, rows, columns)
