"""The text files that archives hold: lists of lines, and JSON objects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from declip.errors import InputError, first_line


def read_lines(file: Path) -> list[tuple[int, str]]:
    """The lines that are not empty, stripped, with their numbers from 1.

    Raises InputError where the file cannot be read or has none.
    """
    try:
        # Not splitlines: a caption may hold what Unicode takes for the end of a line.
        texts = [text.strip() for text in file.read_text("utf-8").split("\n")]
    except (OSError, UnicodeError) as error:
        raise InputError(f"{file} cannot be read: {first_line(error)}; get it anew.") from None
    found = [(number, text) for number, text in enumerate(texts, 1) if text]
    if not found:
        raise InputError(f"{file} is empty: get it anew.")
    return found


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises InputError where the file cannot be read or holds something else."""
    try:
        values = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} cannot be read: {first_line(error)}; get it anew.") from None
    if not isinstance(values, dict):
        raise InputError(f"{file} holds no JSON object: get it anew.")
    return values
