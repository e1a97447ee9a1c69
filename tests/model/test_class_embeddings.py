"""Class embeddings and prompts, with a model that counts letters."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from declip.errors import InputError
from declip.model import class_embeddings as module
from declip.model.class_embeddings import class_embeddings
from declip.model.prompts import openai_templates, resolve_templates


class Letters:
    """Embeds a text by how often each letter occurs in it."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def encode_text(self, texts: list[str]) -> torch.Tensor:
        self.seen += texts
        counts = [[text.lower().count(chr(97 + letter)) for letter in range(26)] for text in texts]
        return F.normalize(torch.tensor(counts, dtype=torch.float32), dim=-1)


def test_class_embedding_is_the_normalised_mean_of_normalised_prompts() -> None:
    templates = ["a photo of a {}.", "{}", "the {} in a {} shop"]
    names = ["cat", "zebra", "dog"]
    model = Letters()
    found = class_embeddings(model, names, templates)
    for name, row in zip(names, found, strict=True):
        prompts = [template.replace("{}", name) for template in templates]
        expected = F.normalize(Letters().encode_text(prompts).mean(0), dim=-1)
        torch.testing.assert_close(row, expected)
    assert model.seen[:3] == ["a photo of a cat.", "cat", "the cat in a cat shop"]


def test_many_classes_are_encoded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"class {chr(97 + number)}" for number in range(20)]
    whole = class_embeddings(Letters(), names, ["a {}", "{}"])
    monkeypatch.setattr(module, "_PROMPTS_AT_ONCE", 7)
    torch.testing.assert_close(class_embeddings(Letters(), names, ["a {}", "{}"]), whole)


def test_underscores_become_spaces() -> None:
    model = Letters()
    class_embeddings(model, ["traffic_light"], ["a {}."])
    assert model.seen == ["a traffic light."]


def test_templates() -> None:
    assert len(openai_templates()) == 80
    assert openai_templates()[0] == "a bad photo of a {}."
    assert all("{}" in template for template in openai_templates())
    assert resolve_templates() == openai_templates()
    assert resolve_templates(["simple", "my {}"])[-2:] == ["a photo of the small {}.", "my {}"]
    with pytest.raises(InputError, match=r"'a photo' has no \{\}"):
        resolve_templates(["a photo"])


def test_long_names_of_token_models_are_not_at_a_disadvantage() -> None:
    """Tokens of padding are zeros; what is left has length 1 in the mean, however many there are."""

    class Words:
        def encode_text(self, texts: list[str]) -> torch.Tensor:
            tokens = torch.nn.functional.normalize(torch.randn(len(texts), 9, 4), dim=-1)
            lengths = torch.tensor([len(text.split()) for text in texts])
            return tokens * (torch.arange(9) < lengths[:, None])[..., None]

    torch.manual_seed(0)
    found = class_embeddings(Words(), ["cat", "very long name of a thing"], ["{}"])
    assert found.shape == (2, 9, 4)
    lengths = found.norm(dim=-1)
    torch.testing.assert_close(lengths[0, :1], torch.ones(1))
    torch.testing.assert_close(lengths[1, :6], torch.ones(6))
    assert (lengths[1, 6:] == 0).all()
