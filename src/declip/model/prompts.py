"""Prompt templates: sentences with ``{}`` where the class name goes."""

from __future__ import annotations

from collections.abc import Sequence

from declip.errors import InputError


def openai_templates() -> list[str]:
    """The 80 ImageNet templates of CLIP (Radford et al. 2021), which DeCLIP's published numbers use too."""
    from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES

    return [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]


def simple_templates() -> list[str]:
    """The seven of them that OpenAI found to do nearly as well."""
    from open_clip.zero_shot_metadata import SIMPLE_IMAGENET_TEMPLATES

    return [template("{}") for template in SIMPLE_IMAGENET_TEMPLATES]


TEMPLATE_SETS = {"openai": openai_templates, "simple": simple_templates}


def resolve_templates(templates: Sequence[str] | None = None) -> list[str]:
    """Templates as given, with the names ``openai`` and ``simple`` replaced by their sets; by default ``openai``.

    Raises InputError where a template is neither a set's name nor has a ``{}``.
    """
    resolved: list[str] = []
    for template in templates or ["openai"]:
        if template in TEMPLATE_SETS:
            resolved += TEMPLATE_SETS[template]()
        elif "{}" in template:
            resolved.append(template)
        else:
            raise InputError(
                f"Template {template!r} has no {{}} where the class name goes: write for example 'a photo of a {{}}.', "
                f"or name a set: {', '.join(TEMPLATE_SETS)}."
            )
    return resolved


def fill(template: str, class_name: str) -> str:
    """The template with the class name in it; underscores, as folder names have them, become spaces."""
    return template.replace("{}", class_name.replace("_", " "))
