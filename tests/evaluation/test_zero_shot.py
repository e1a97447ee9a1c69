"""Zero-shot classification with a model that is a table of vectors."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from declip.errors import InputError
from declip.evaluation import zero_shot
from declip.evaluation.prompts import openai_templates, resolve_templates
from declip.evaluation.zero_shot import class_embeddings, zero_shot_metrics


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
    monkeypatch.setattr(zero_shot, "_PROMPTS_AT_ONCE", 7)
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


def test_metrics_like_naive() -> None:
    generator = torch.Generator().manual_seed(0)
    classes = F.normalize(torch.randn(12, 8, generator=generator), dim=-1)
    labels = torch.randint(12, (200,), generator=generator)
    images = F.normalize(classes[labels] + 0.5 * torch.randn(200, 8, generator=generator), dim=-1)
    best = (images @ classes.T).topk(5).indices
    metrics = zero_shot_metrics(images, classes, labels)
    assert metrics["top1"] == pytest.approx(100 * (best[:, 0] == labels).double().mean().item())
    assert metrics["top5"] == pytest.approx(100 * (best == labels[:, None]).any(1).double().mean().item())
    assert 10 < metrics["top1"] < metrics["top5"] < 100


def test_few_classes_and_ties() -> None:
    images = torch.eye(2)
    assert zero_shot_metrics(images, images, torch.tensor([0, 0])) == {"top1": 50.0, "top5": 100.0}
    same = torch.ones(8, 1)
    assert zero_shot_metrics(same, same, torch.arange(8)) == {"top1": 0.0, "top5": 0.0}
    assert zero_shot_metrics(same * torch.nan, same, torch.arange(8)) == {"top1": 0.0, "top5": 0.0}


@pytest.mark.parametrize("labels", [[0], [0, 2], [-1, 0]])
def test_wrong_labels(labels: list[int]) -> None:
    with pytest.raises(ValueError, match="label"):
        zero_shot_metrics(torch.eye(2), torch.eye(2), torch.tensor(labels))
