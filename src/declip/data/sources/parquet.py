"""Parquet files."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from declip.data.sources.columns import IMAGE_NAMES, find_columns
from declip.data.sources.table import TableSource
from declip.errors import InputError, first_line
from declip.pairs import Data


def open_parquet(spec: str, path: Path, data: Data, need_captions: bool) -> TableSource:
    try:
        with pq.ParquetFile(path) as file:
            types = dict(zip(file.schema_arrow.names, file.schema_arrow.types, strict=True))
            columns = find_columns(spec, types, data, IMAGE_NAMES, need_captions=need_captions)
            rows = file.read(columns=columns.names)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{spec} cannot be read as a parquet file: {first_line(error)}.") from None
    return TableSource(
        name=spec,
        file=spec,
        folder=path.parent,
        image_column=rows[columns.image],
        caption_columns=[rows[name] for name in columns.captions],
        label_column=rows[columns.label] if columns.label else None,
        key_column=rows[columns.key] if columns.key else None,
    )
