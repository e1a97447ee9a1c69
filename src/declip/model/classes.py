"""Two towers that have never met, in one space before the first pair: by what the image tower's classes are called.

A timm network comes with the classifier that it was trained for, whose rows w_c are directions of its pooled features,
and a text tower makes a vector t_c of each class's name. The projection P = Σ_c (t_c - mean t)(w_c - mean w)ᵀ sends a
picture to the names of the classes that it looks like, weighed by how much it does: ConSE (Norouzi et al. 2014,
equation 2) with scores in place of probabilities, which makes it linear. Captions keep the text tower's angles.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from declip.architecture import IMAGENET
from declip.errors import InputError
from declip.model.class_embeddings import class_embeddings
from declip.model.dual_encoder import DualEncoder
from declip.model.embed import embed_texts
from declip.model.start import Start
from declip.model.text_tower import is_huggingface

TEMPLATE = "a photo of a {}"


def read_classes(classes: str) -> Sequence[str]:
    """Names in the classifier's order: of ImageNet's 1,000 classes, or a text file's lines.

    Raises InputError where there is no such file.
    """
    if classes == IMAGENET:
        from open_clip import IMAGENET_CLASSNAMES

        return list(IMAGENET_CLASSNAMES)
    try:
        return Path(classes).expanduser().read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise InputError(
            f"model.image.classes = {classes!r} is neither {IMAGENET!r} nor a text file with a name a line."
        ) from None


def start_by_classes(model: DualEncoder, start: Start, classes: str) -> None:
    """Let both projections, which start at random, start where pictures lie by the names of their classes.

    classes: as `read_classes` takes it. Neither projection's size changes, in the norm of all its numbers together.
    Raises InputError where a tower comes without what this takes, or names and classifier do not go together.
    """
    classifier, image, text = _parts(model, start)
    names = read_classes(classes)
    if len(names) != len(classifier):
        raise InputError(
            f"model.image.classes = {classes!r} has {len(names):,} names, and the classifier that comes with "
            f"{_where(start)} has {len(classifier):,} classes: give a name for each, in its order."
        )
    with torch.no_grad():
        size = text.norm()
        nn.init.orthogonal_(text)
        text.mul_(size / text.norm())
        was_training = model.training
        named = class_embeddings(_Texts(model.eval()), names, [TEMPLATE])
        model.train(was_training)
        if (named - named[:1]).norm() < 1e-3:
            raise InputError(
                f"model.image.classes = {classes!r}: the text tower takes all these names for the same; leave it out, "
                "or choose a text tower that knows their language."
            )
        aligned = (named - named.mean(0)).T @ (classifier - classifier.mean(0))
        image.copy_(aligned * (image.norm() / aligned.norm()))


def classes_of(model: DualEncoder, start: Start) -> int:
    """How many classes `start_by_classes` wants the names of; 0 where the towers come without what it takes."""
    with contextlib.suppress(InputError):
        return len(_parts(model, start)[0])
    return 0


class _Texts:
    """The text tower as `class_embeddings` asks it."""

    def __init__(self, model: DualEncoder) -> None:
        self.model = model

    @torch.inference_mode()
    def encode_text(self, texts: list[str]) -> Tensor:
        return embed_texts(self.model.clip, self.model.token_ids(texts), self.model.tokenizer.special.pad)


def _where(start: Start) -> str:
    return "model.image.init" if start.image is None else start.image.where


def _parts(model: DualEncoder, start: Start) -> tuple[Tensor, Tensor, Tensor]:
    """The classifier's weights [classes, width], and those of both projections: [embed dim, width]."""
    if start.image is None or start.image.classifier is None:
        raise InputError(
            f"model.image.classes: {_where(start)} comes with no classifier, as timm's weights do: leave it out."
        )
    if start.text is None or not is_huggingface(model.clip):
        raise InputError(
            "model.image.classes is for a text tower that knows words and has no projection yet: name a Hugging Face "
            "text model as model.text.init, or leave it out."
        )
    classifier = start.image.classifier.float()
    image, text = _projection(model.clip.visual.head, "image"), _projection(model.clip.text.proj, "text")
    if image.shape[1] != classifier.shape[1]:
        raise InputError(
            f"model.image.classes: the classifier of {_where(start)} takes {classifier.shape[1]} numbers of a picture, "
            f"the projection {image.shape[1]}: leave model.image.timm_pool or model.image.classes out."
        )
    return classifier, image, text


def _projection(module: nn.Module, part: str) -> Tensor:
    linear = [own for own in module.modules() if isinstance(own, nn.Linear)]
    if len(linear) != 1 or linear[0].bias is not None:
        raise InputError(
            f"model.image.classes is for towers with a linear projection, and that of the {part} tower is none: leave "
            "model.image.classes out."
        )
    return linear[0].weight
