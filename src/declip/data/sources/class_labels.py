"""Class names that Hugging Face notes for a column of numbers: in the schema of a file, or beside a dataset on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

ClassNames = dict[str, tuple[str, ...]]
"""Of each column for which any are noted, in the order of their numbers."""


def names_in_schema(metadata: Mapping[bytes, bytes] | None) -> ClassNames:
    """The class names that the metadata of an Arrow schema notes."""
    try:
        return names_in_features(json.loads((metadata or {})[b"huggingface"])["info"]["features"])
    except (ValueError, KeyError, TypeError):
        return {}


def names_in_features(features: object) -> ClassNames:
    """The class names in the ``features`` of a dataset_info.json."""
    found = {}
    for column, feature in features.items() if isinstance(features, dict) else ():
        names = feature.get("names") if isinstance(feature, dict) else None
        if isinstance(names, list) and names:
            found[str(column)] = tuple(map(str, names))
    return found


def with_names(labels: Any, names: tuple[str, ...]) -> Any:
    """A label column with the names of its numbers; null for -1, which stands for no label, and for any other.

    What is no column of numbers, or has no names, stays as it is.
    """
    if not names or not pa.types.is_integer(labels.type):
        return labels
    chunks: list[Any] = []
    for chunk in labels.chunks:
        values = chunk.fill_null(-1).to_numpy(zero_copy_only=False)
        known = (values >= 0) & (values < len(names))
        indices = pa.array(np.where(known, values, 0), pa.int32(), mask=~known)
        chunks.append(pa.DictionaryArray.from_arrays(indices, pa.array(names)))
    kind: Any = pa.dictionary(pa.int32(), pa.string())
    return pa.chunked_array(chunks, kind)
