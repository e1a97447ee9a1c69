"""Classes by name: a class is the mean of its prompts' embeddings (Radford et al. 2021, section 3.1.4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from declip.model.prompts import fill, resolve_templates

_PROMPTS_AT_ONCE = 4096


class TextEncoder(Protocol):
    """What a model must be able to do here: texts to normalised embeddings ``[texts, width]``."""

    def encode_text(self, texts: list[str]) -> Any: ...


def class_embeddings(model: TextEncoder, class_names: Sequence[str], templates: Sequence[str] | None = None) -> Tensor:
    """One normalised float32 vector a class: encode every prompt, normalise, average, normalise: ``[classes, width]``.

    Of a model that compares tokens, prompts are averaged position by position and a class is normalised as a whole, as
    in the public FILIP, to tokens of length 1 in the mean: ``[classes, tokens, width]``. (There all classes have the
    same number of tokens; where padding takes no part, long names would otherwise have shorter ones.)
    Templates are sentences with ``{}`` for the class name, or the names of sets; by default OpenAI's 80.
    Raises InputError where a template has no ``{}``.
    """
    templates = resolve_templates(templates)
    step = max(1, _PROMPTS_AT_ONCE // len(templates))
    means = []
    for start in range(0, len(class_names), step):
        names = class_names[start : start + step]
        prompts = [fill(template, name) for name in names for template in templates]
        embeddings = functional.normalize(torch.as_tensor(model.encode_text(prompts)).float().cpu(), dim=-1)
        means.append(torch.unflatten(embeddings, 0, (len(names), len(templates))).mean(1))
    whole = torch.cat(means)
    if whole.ndim == 2:
        return functional.normalize(whole, dim=-1)
    tokens = (whole != 0).any(dim=-1).sum(dim=1)[:, None, None]
    return functional.normalize(whole.flatten(1), dim=-1).view_as(whole) * tokens.sqrt()
