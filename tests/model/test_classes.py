"""Towers that meet by the names of classes: the projections against a naive loop, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CLASSES

import declip
from declip.architecture import IMAGENET
from declip.errors import InputError
from declip.model.classes import classes_of, read_classes, start_by_classes
from declip.model.dual_encoder import DualEncoder
from declip.model.export import read_weights
from declip.model.start import Start, load_towers, read_start
from declip.recipe import load_recipe

FEW = ["data.holdout=0", "schedule.batch_size=4", "schedule.pairs_seen=8", "data.workers=0", "optimizer.lr=1e-12"]


def said(four_classes: list[str], path: str) -> str:
    """What is asked for at a path."""
    return next(one for one in four_classes if one.startswith(f"{path}=")).partition("=")[2].strip("'")


def towers(four_classes: list[str]) -> tuple[DualEncoder, Start]:
    recipe, start = read_start(load_recipe("clip", four_classes))
    torch.manual_seed(1)
    model = DualEncoder(recipe)
    load_towers(start, model.clip)
    return model, start


def test_pictures_lie_by_the_names_of_their_classes(four_classes: list[str]) -> None:
    from transformers import AutoTokenizer, BertModel

    model, start = towers(four_classes)
    assert classes_of(model, start) == len(CLASSES)
    image, text = model.clip.visual.head.proj.weight, model.clip.text.proj.weight
    before = image.norm().item(), text.norm().item()
    start_by_classes(model, start, said(four_classes, "model.image.classes"))
    assert (image.norm().item(), text.norm().item()) == pytest.approx(before)
    assert model.training

    folder = said(four_classes, "model.text.init")
    bert, tokenizer = BertModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    named = []
    for name in CLASSES:
        tokens = tokenizer(f"a photo of a {name}", return_tensors="pt")
        with torch.no_grad():
            pooled = bert(**tokens).last_hidden_state.mean(1)[0]
            vector = text @ pooled
        assert (vector.norm() / pooled.norm()).item() == pytest.approx(before[1] / 32**0.5, rel=1e-4)  # angles stay
        named.append(vector / vector.norm())
    classifier = read_weights(Path(said(four_classes, "model.image.init")))["fc.weight"]
    expected = torch.zeros(48, classifier.shape[1])
    for own, row in zip(named, classifier, strict=True):
        expected += torch.outer(own - sum(named) / len(named), row - classifier.mean(0))
    torch.testing.assert_close(image.detach(), expected * before[0] / expected.norm(), rtol=1e-3, atol=1e-6)


def test_a_run_starts_there(four_classes: list[str], pairs: Path, tmp_path: Path) -> None:
    model, start = towers(four_classes)
    start_by_classes(model, start, said(four_classes, "model.image.classes"))
    recipe = load_recipe("clip", [f"data.train={[str(pairs)]!r}", *four_classes, *FEW])
    declip.train(recipe, tmp_path / "run", quiet=True)
    image, text = model.clip.visual.head.proj.weight, model.clip.text.proj.weight
    trained = read_weights(tmp_path / "run" / "open_clip_model.safetensors")
    aligned = image.detach().T @ text.detach()  # whatever the draw of the text projection, and its size
    found = trained["visual.head.proj.weight"].T @ trained["text.proj.weight"]
    np.testing.assert_allclose(found / found.norm(), aligned / aligned.norm(), rtol=1e-3, atol=1e-5)


def test_names_of_imagenet() -> None:
    names = read_classes(IMAGENET)
    assert (len(names), names[1]) == (1000, "goldfish")


@pytest.mark.parametrize(
    ("left_out", "added", "message"),
    [
        ("", "model.image.classes=imagenet", "has 1,000 names, and the classifier that comes with .* has 4 classes"),
        ("", "model.image.classes=nowhere.txt", "neither 'imagenet' nor a text file"),
        ("", "model.text.hf_proj_type=mlp", "of the text tower is none"),
        ("model.text.init", "", "a text tower that knows words"),
        ("model.image.init", "", "comes with no classifier"),
    ],
)
def test_what_does_not_go_together_is_refused(
    four_classes: list[str], left_out: str, added: str, message: str, pairs: Path, tmp_path: Path
) -> None:
    given = [one for one in four_classes if one.partition("=")[0] != left_out]
    given += [added] if added else []
    with pytest.raises(InputError, match=message):
        declip.train(load_recipe("clip", [f"data.train={[str(pairs)]!r}", *given, *FEW]), tmp_path / "run", quiet=True)


def test_names_that_the_text_tower_does_not_know(four_classes: list[str], tmp_path: Path) -> None:
    model, start = towers(four_classes)
    (tmp_path / "names.txt").write_text("αβγ\nδεζ\nηθι\nκλμ\n")
    with pytest.raises(InputError, match="takes all these names for the same"):
        start_by_classes(model, start, str(tmp_path / "names.txt"))
