"""Patterns that name many files: braces as in a shell, and globs."""

from __future__ import annotations

import glob
import re
from pathlib import Path

from declip.data.remote import is_remote, listed, scheme
from declip.errors import InputError

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_RETRIES = 5  # of a listing; a pattern is all that is known here


def expand(spec: str) -> list[str]:
    """The files that a pattern names: ``{000..099}`` and ``{a,b}`` in their order, ``*``, ``?`` and ``[..]`` sorted.

    Paths or URLs. Zeros in front are kept. What holds no pattern, or names a file as it is, stays as it is.
    Raises InputError where a pattern matches nothing, or stands in an HTTP URL, as HTTP has no folders to list.
    """
    if not is_remote(spec) and Path(spec).exists():
        return [spec]
    paths: list[str] = []
    for path in _unbraced(spec):
        if _has_magic(path):
            found = _matching(path)
            if not found:
                raise InputError(f"No file matches {path!r}.")
            paths += found
        else:
            paths.append(path)
    return paths


def _has_magic(path: str) -> bool:
    # In an HTTP URL a question mark begins the query.
    return glob.has_magic(path.replace("?", "") if scheme(path) in ("http", "https") else path)


def _matching(pattern: str) -> list[str]:
    if is_remote(pattern):
        return listed(pattern, _RETRIES)
    return sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True))


def _unbraced(spec: str) -> list[str]:
    match = _BRACES.search(spec)  # an innermost pair
    if not match:
        return [spec]
    inside = match[1]
    if numbers := _RANGE.fullmatch(inside):
        first, last = numbers.groups()
        width = max(len(first), len(last)) if first.startswith("0") or last.startswith("0") else 0
        step = 1 if int(first) <= int(last) else -1
        choices = [f"{number:0{width}d}" for number in range(int(first), int(last) + step, step)]
    elif "," in inside:
        choices = inside.split(",")
    else:
        raise InputError(f"{{{inside}}} in {spec!r} is no pattern: write {{000..099}} or {{a,b}}.")
    before, after = spec[: match.start()], spec[match.end() :]
    expanded = [path for choice in choices for path in _unbraced(before + choice + after)]
    return list(dict.fromkeys(expanded)) if len(expanded) > len(choices) else expanded
