"""A recipe in words: every field with its type and meaning, as data or as a commented TOML file."""

from __future__ import annotations

import json
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from declip.recipe import Recipe
from declip.terms import Section

EXTRA = "a further field of open_clip's"
_BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
_NAMES: dict[Any, tuple[str, str]] = {  # one of it, several of it
    str: ("string", "strings"),
    int: ("whole number", "whole numbers"),
    float: ("number", "numbers"),
    bool: ("true or false", "truth values"),
}


def explain(section: Section, prefix: str = "") -> list[dict[str, Any]]:
    """Every field of a recipe as ``{"path", "value", "type", "description"}``; the value of what is not set is None."""
    rows: list[dict[str, Any]] = []
    for name, info in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            rows += explain(value, f"{prefix}{name}.")
        else:
            rows.append(
                {
                    "path": prefix + name,
                    "value": value,
                    "type": type_in_words(info),
                    "description": info.description or "",
                }
            )
    for name, value in (section.model_extra or {}).items():
        rows.append({"path": prefix + name, "value": value, "type": "anything", "description": EXTRA})
    return rows


def commented_toml(recipe: Recipe) -> str:
    """The whole recipe as TOML, a comment at every field. Loading it gives the same recipe again.

    Fields without a value and terms that take no part are there too, commented out, for a reader to switch on.
    """
    head = ["# A recipe with every field. Change what you like, then: declip train THIS_FILE --out runs/mine", ""]
    return "\n".join([*head, *_section_lines(recipe, "")]) + "\n"


def _section_lines(section: Section, prefix: str, off: bool = False) -> list[str]:
    """Plain fields first, sub-sections after them, as TOML demands; ``off`` comments all of it out."""
    lines: list[str] = []
    later: list[str] = []
    for name, info in type(section).model_fields.items():
        value, inner = getattr(section, name), _section_class(info.annotation)
        if inner is not None:
            hidden = off or value is None
            title = f"[{prefix}{name}]"
            later += ["", _line(title, info.description or "", hidden)]
            later += _section_lines(inner() if value is None else value, f"{prefix}{name}.", hidden)
        else:
            known = value is not None
            assignment = f"{name} = {toml_value(value)}" if known else f"{name} ="
            about = f"{info.description or name} ({type_in_words(info)}{'' if known else '; not set'})"
            lines.append(_line(assignment, about, off or not known))
    for name, value in (section.model_extra or {}).items():
        lines.append(_line(f"{_key(name)} = {toml_value(value)}", EXTRA, off))
    return lines + later


def _line(code: str, comment: str, off: bool) -> str:
    code = f"# {code}" if off else code
    return f"{code:<32}  # {comment}" if comment else code


def toml_value(value: Any) -> str:
    """A Python value as TOML on one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    if isinstance(value, dict):
        items = [f"{_key(key)} = {toml_value(item)}" for key, item in value.items() if item is not None]
        return "{ " + ", ".join(items) + " }" if items else "{}"
    return repr(value)


def _key(key: str) -> str:
    bare = key.replace("-", "").replace("_", "")
    return key if bare.isascii() and bare.isalnum() else toml_value(key)


def type_in_words(info: FieldInfo) -> str:
    """A field's type and bounds for people: ``number, > 0``."""
    return ", ".join([_words(info.annotation), *_bounds(info.metadata)])


def _bounds(metadata: Any) -> list[str]:
    found = [(sign, getattr(item, name)) for item in metadata for name, sign in _BOUNDS.items() if hasattr(item, name)]
    return [f"{sign} {limit}" for sign, limit in found]


def _words(annotation: Any, plural: bool = False) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if annotation in _NAMES:
        return _NAMES[annotation][plural]
    if origin is Annotated:
        return _words(inner[0], plural)
    if origin is Literal:
        choice = " | ".join(toml_value(item) for item in inner)
        return f"({choice})" if plural else choice
    if origin in (Union, UnionType):
        return " or ".join(_words(item, plural) for item in inner if item is not NoneType)
    if origin is list:
        return f"list of {_words(inner[0], plural=True)}"
    if origin is tuple:
        return f"{len(inner)} {_words(inner[0], plural=True)}"
    if origin is dict:
        return "table"
    return str(annotation)


def _section_class(annotation: Any) -> type[Section] | None:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None
