"""Models to use: a run folder, an open_clip name, an open_clip folder."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from declip.errors import InputError
from declip.model.class_embeddings import class_embeddings
from declip.model.export import is_open_clip_folder
from declip.model.towers import encode_text, trim

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    Picture = Image | str | os.PathLike[str] | np.ndarray


def load(model: str | os.PathLike[str], device: str = "cpu") -> LoadedModel:
    """Open a model for use: a run folder, `local-dir:FOLDER`, or an open_clip `name:pretrained` tag.

    Raises InputError where there is no such model.
    """
    import open_clip
    from safetensors import SafetensorError

    spec = os.fspath(model)
    folder = Path(spec.removeprefix("local-dir:"))
    try:
        if folder.is_dir():
            if not is_open_clip_folder(folder):
                raise InputError(f"{folder} holds no finished model: train one there first (declip train … --out).")
            clip, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
            tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
        else:
            name, _, tag = spec.partition(":")
            if open_clip.get_model_config(name) is None or not tag:
                raise InputError(f"There is no model {spec!r}: give a run folder or an open_clip name:pretrained.")
            clip, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=tag)
            tokenizer = open_clip.get_tokenizer(name)
    except (RuntimeError, OSError, ValueError, SafetensorError) as error:
        raise InputError(f"The model {spec!r} cannot be opened: {str(error).splitlines()[0]}.") from None
    return LoadedModel(spec, clip.to(device).eval(), preprocess, tokenizer)


class LoadedModel:
    """An open_clip model with its preprocessing and tokenizer, ready to embed and to classify."""

    def __init__(self, name: str, clip: nn.Module, preprocess: Any, tokenizer: Any) -> None:
        self.name, self.clip, self.preprocess, self.tokenizer = name, clip, preprocess, tokenizer

    @property
    def device(self) -> torch.device:
        return next(self.clip.parameters()).device

    @torch.no_grad()
    def encode_image(self, images: Iterable[Picture] | Picture, batch_size: int = 256) -> Tensor:
        """Embeddings of images (PIL, paths, uint8 [height, width, 3]), normalised: float32 [images, dim] on the CPU."""
        embeddings = [
            self._normalised(self.clip.encode_image(torch.stack(part).to(self.device)))  # type: ignore[operator]
            for part in _batches((self.preprocess(_open(image)) for image in _many(images)), batch_size)
        ]
        return torch.cat(embeddings) if embeddings else torch.empty(0, 0)

    @torch.no_grad()
    def encode_text(self, texts: Iterable[str] | str, batch_size: int = 1024) -> Tensor:
        """Embeddings of texts, normalised: float32 [texts, dim] on the CPU."""
        texts = [texts] if isinstance(texts, str) else texts
        embeddings = [self._normalised(self._text(part)) for part in _batches(iter(texts), batch_size)]
        return torch.cat(embeddings) if embeddings else torch.empty(0, 0)

    @torch.no_grad()
    def classify(
        self, images: Iterable[Picture] | Picture, labels: list[str], templates: list[str] | None = None
    ) -> list[dict[str, float]]:
        """For each image the probability of each label, most likely first."""
        embeddings = self.encode_image(images)
        if not len(embeddings):
            return []
        classes = class_embeddings(self, labels, templates)
        scale = self.clip.logit_scale.exp().cpu()  # type: ignore[operator]
        probabilities = (scale * embeddings @ classes.T).softmax(dim=-1)
        rows = (dict(zip(labels, row, strict=True)) for row in probabilities.tolist())
        return [dict(sorted(row.items(), key=lambda item: -item[1])) for row in rows]

    def _text(self, texts: list[str]) -> Tensor:
        tokens = self.tokenizer(texts).to(self.device)
        if hasattr(self.clip, "token_embedding") and getattr(self.clip, "text_pool_type", "") == "argmax":
            return encode_text(self.clip, trim(tokens))[0]
        return self.clip.encode_text(tokens)  # type: ignore[operator, no-any-return]

    @staticmethod
    def _normalised(embeddings: Tensor) -> Tensor:
        return F.normalize(embeddings.float(), dim=-1).cpu()


def _many(images: Any) -> Iterable[Any]:
    single = isinstance(images, (str, os.PathLike)) or hasattr(images, "convert") or getattr(images, "ndim", 0) == 3
    return [images] if single else images


def _open(image: Any) -> Image:
    from PIL import Image

    from declip.data.images import as_rgb, decode_image

    if isinstance(image, (str, os.PathLike)):
        try:
            return Image.fromarray(decode_image(Path(image).read_bytes()))
        except (OSError, ValueError) as error:
            raise InputError(f"The image {os.fspath(image)!r} cannot be read: {error}.") from None
    return as_rgb(image) if hasattr(image, "convert") else Image.fromarray(image)


def _batches(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    with contextlib.suppress(StopIteration):
        while part := list(islice(items, size)):
            yield part
