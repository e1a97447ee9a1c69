"""Models to use: a run folder, an open_clip name or folder, a Hugging Face folder, a released DeCLIP file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from declip.errors import InputError, first_line
from declip.model.class_embeddings import class_embeddings
from declip.model.embed import TokenWise, embed_images, embed_texts
from declip.model.export import FinishedModel, is_open_clip_folder, load_strictly, read_open_clip_folder
from declip.model.heads import TextPooler, TokenMappings
from declip.model.huggingface import is_huggingface_folder, read_huggingface
from declip.model.image_tower import encode_image
from declip.model.preparation import Preparation
from declip.model.products import by_onednn
from declip.model.released import read_released
from declip.model.token_similarity import similarity
from declip.model.towers import CONTEXT_LENGTH, NORMS, Towers, build_from_config

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from declip.data.decode import Pixels

    Picture = Image | str | os.PathLike[str] | np.ndarray


def load(
    model: str | os.PathLike[str], device: str = "cpu", image_heads: int | None = None, text_heads: int | None = None
) -> LoadedModel:
    """Open a model for use.

    model: a run folder, `local-dir:FOLDER` (open_clip's or a Hugging Face CLIPModel's or SiglipModel's), an open_clip
        `name:pretrained` tag, or a released DeCLIP, SLIP, FILIP, DeFILIP or CLIP file (`.pth.tar`).
    image_heads, text_heads: attention heads of a released file's towers, where not width / 64.
    Raises InputError where there is no such model.
    """
    spec = os.fspath(model)
    finished = read_model(spec, image_heads, text_heads)
    try:
        return _open(spec, finished, device)
    except (RuntimeError, OSError, ValueError, TypeError, AssertionError) as error:
        raise InputError(f"The model {spec!r} cannot be opened: {first_line(error)}.") from None


def read_model(spec: str, image_heads: int | None = None, text_heads: int | None = None) -> FinishedModel:
    """Description and tensors of a model, whatever its format; see `load`."""
    path = Path(spec.removeprefix("local-dir:"))
    if (image_heads or text_heads) and not path.is_file():
        raise InputError(f"{spec} is no released file: it says itself how many heads its towers have.")
    if path.is_dir():
        if is_open_clip_folder(path):
            return read_open_clip_folder(path)
        if is_huggingface_folder(path):
            return FinishedModel(*read_huggingface(path))
        raise InputError(f"{path} holds no finished model: train one there first (declip train … --out).")
    if path.is_file():
        return read_released(path, image_heads, text_heads)
    return _read_named(spec)


def _read_named(spec: str) -> FinishedModel:
    """An open_clip name:pretrained, which may download."""
    import open_clip
    from open_clip.transformer import QuickGELU

    name, _, tag = spec.partition(":")
    config = open_clip.get_model_config(name)
    if config is None or not tag:
        raise InputError(
            f"There is no model {spec!r}: give a run folder, a released file or an open_clip name:pretrained."
        )
    try:
        clip = open_clip.create_model(name, pretrained=tag)
    except (RuntimeError, OSError, ValueError) as error:
        raise InputError(f"The model {spec!r} cannot be opened: {first_line(error)}.") from None
    if any(isinstance(part, QuickGELU) for part in clip.modules()):  # some weights ask for it, their name does not
        config["quick_gelu"] = True
    preprocessing = {key: value for key, value in clip.visual.preprocess_cfg.items() if key != "size"}
    return FinishedModel({"model_cfg": config, "preprocess_cfg": preprocessing}, clip.state_dict(), {}, name, clip)


def _open(name: str, finished: FinishedModel, device: str) -> LoadedModel:
    from open_clip.transform import PreprocessCfg, image_transform_v2

    options = finished.options
    image_only = options["towers"] == "image"
    clip = finished.module or build(name, finished)
    known = {field.name for field in fields(PreprocessCfg)}
    preprocessing = {k: v for k, v in finished.config.get("preprocess_cfg", {}).items() if k in known}
    preprocessing["size"] = clip.visual.image_size
    preprocess = image_transform_v2(PreprocessCfg(**preprocessing), is_train=False)
    if "resize" in options:
        preprocess.transforms[0].size = options["resize"]
    tokenizer = None if image_only else open_tokenizer(finished)
    token_wise = None
    if options["similarity"] == "token_wise":
        mappings = _token_mappings(finished.head("token_wise.mappings")).to(device).eval()
        token_wise = TokenWise(mappings, options["mask_padding"], finished.heads.get("token_wise.logit_scale"))
    pooler = _text_pooler(finished.head("text_conditioned.pooler"))
    return LoadedModel(
        name,
        clip.to(device).eval(),
        preprocess,
        tokenizer,
        token_wise,
        None if pooler is None else pooler.to(device).eval(),
    )


def build(name: str, finished: FinishedModel) -> Towers:
    """The towers with their weights; raises InputError that names a tensor that does not fit."""
    config, image_only = dict(finished.config["model_cfg"]), finished.options["towers"] == "image"
    # The weights are at hand: neither library has to fetch its own.
    config["vision_cfg"] = {**config["vision_cfg"], "timm_model_pretrained": False}
    if "hf_model_name" in config.get("text_cfg", {}):
        config["text_cfg"] = {**config["text_cfg"], "hf_model_pretrained": False}
    clip = build_from_config(config)
    load_strictly(clip.visual if image_only else clip, _towers(finished, image_only), f"The model {name!r}")
    return clip


def _towers(finished: FinishedModel, image_only: bool) -> dict[str, Tensor]:
    if not image_only:
        return finished.weights
    return {key.removeprefix("visual."): tensor for key, tensor in finished.weights.items()}


def _token_mappings(state: dict[str, Tensor]) -> TokenMappings:
    if state.keys() != set(TokenMappings(1, 1, 1).state_dict()):
        raise ValueError("it compares tokens, but its token mappings are not there")
    (dim, image_width), text_width = state["image_mapping.weight"].shape, state["text_mapping.weight"].shape[1]
    mappings = TokenMappings(image_width, text_width, dim)
    mappings.load_state_dict(state)
    return mappings


def _text_pooler(state: dict[str, Tensor]) -> TextPooler | None:
    if not state:
        return None
    dim, width = state["mapping.weight"].shape
    pooler = TextPooler(width, dim)
    pooler.load_state_dict(state)
    return pooler


def open_tokenizer(finished: FinishedModel) -> Any:
    """open_clip's tokenizer of a model with a text tower: texts to int64 [texts, context length]."""
    import open_clip
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    if finished.tokenizer:
        return open_clip.get_tokenizer(finished.tokenizer)
    text_cfg = finished.config["model_cfg"]["text_cfg"]
    length = text_cfg.get("context_length", CONTEXT_LENGTH)
    if name := text_cfg.get("hf_tokenizer_name"):
        return HFTokenizer(name, context_length=length, **(text_cfg.get("tokenizer_kwargs") or {}))
    return SimpleTokenizer(context_length=length)


class LoadedModel:
    """An open_clip model with its preprocessing and tokenizer, ready to embed and to classify.

    Most models compare embeddings. One that compares tokens (FILIP) has `token_wise`, and what it embeds has a
    dimension more; `similarity` knows both. One that was trained with terms.text_conditioned has `text_pooler`, with
    which `evaluation.rerank` puts the first hits of a search in order.
    """

    def __init__(
        self,
        name: str,
        clip: nn.Module,
        preprocess: Any,
        tokenizer: Any,
        token_wise: TokenWise | None = None,
        text_pooler: TextPooler | None = None,
    ) -> None:
        self.name, self.clip, self.preprocess, self.tokenizer = name, clip, preprocess, tokenizer
        self.token_wise, self.text_pooler = token_wise, text_pooler
        self.image_dtype = torch.float32

    def embed_images_in_bfloat16(self) -> LoadedModel:
        """Keep the image tower in bfloat16, but for its norms: nearly twice as fast where the processor knows it.

        Embeddings then differ by about a hundredth of their length.
        """
        self.image_dtype = torch.bfloat16
        for module in self.clip.visual.modules():  # type: ignore[union-attr]
            if not isinstance(module, NORMS):
                for parameter in module.parameters(recurse=False):
                    parameter.data = parameter.data.to(self.image_dtype)
        return self

    @cached_property
    def prepare(self) -> Preparation:
        """Image files to uint8 [height, width, 3], for `encode_prepared`."""
        return Preparation(self.preprocess)

    @property
    def logit_scale(self) -> float:
        """What similarities are multiplied with to be logits."""
        own = self.token_wise.logit_scale if self.token_wise else None
        return float((self.clip.logit_scale if own is None else own).detach().exp())  # type: ignore[operator]

    @property
    def device(self) -> torch.device:
        return next(self.clip.parameters()).device

    @torch.no_grad()
    def encode_image(self, images: Iterable[Picture] | Picture, batch_size: int = 256) -> Tensor:
        """Embeddings of images (PIL, paths, uint8 [height, width, 3]), normalised, on the CPU.

        float32 [images, dim], or [images, tokens, dim] of a model that compares tokens.
        """
        prepared = (self.preprocess(_open_image(image)) for image in _many(images))
        return self._embedded(torch.stack(part).to(self.device) for part in _batches(prepared, batch_size))

    @torch.inference_mode()
    def encode_prepared(self, images: Sequence[Pixels], batch_size: int = 64) -> Tensor:
        """As `encode_image`, of what `prepare` has made of image files, say in other processes."""
        parts = (images[start : start + batch_size] for start in range(0, len(images), batch_size))
        return self._embedded(self.prepare.batch(part, self.device) for part in parts)

    @torch.inference_mode()
    def patches(self, images: Sequence[Pixels]) -> Tensor:
        """Of what `prepare` has made of image files the tokens that `text_pooler` looks at: [images, tokens, width]."""
        pixels = self.prepare.batch(images, self.device)
        tokens = encode_image(self.clip, pixels.to(self.image_dtype), normed_tokens=True).tokens
        if tokens is None:
            raise ValueError("this image tower gives no tokens")
        return tokens.float().cpu()

    def _embedded(self, batches: Iterable[Tensor]) -> Tensor:
        """Embeddings of pixels, a batch after the other."""
        fast, embeddings = by_onednn(self.device), []
        for pixels in batches:
            with fast:
                embeddings.append(embed_images(self.clip, pixels.to(self.image_dtype), self.token_wise).cpu())
        return torch.cat(embeddings) if embeddings else torch.empty(0, 0)

    @torch.no_grad()
    def encode_text(self, texts: Iterable[str] | str, batch_size: int = 1024) -> Tensor:
        """Embeddings of texts, normalised, on the CPU: float32 [texts, dim], or [texts, context length, dim].

        Raises InputError where the model has no text tower.
        """
        if self.tokenizer is None:
            raise InputError(f"{self.name} holds an image tower alone: it cannot embed texts.")
        texts = [texts] if isinstance(texts, str) else texts
        pad = getattr(getattr(self.tokenizer, "tokenizer", None), "pad_token_id", None) or 0
        fast, embeddings = by_onednn(self.device), []
        for part in _batches(iter(texts), batch_size):
            tokens = self.tokenizer(part).to(self.device)
            with fast:
                embeddings.append(embed_texts(self.clip, tokens, pad, self.token_wise).cpu())
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
        probabilities = (self.logit_scale * similarity(embeddings, classes)).softmax(dim=-1)
        rows = (dict(zip(labels, row, strict=True)) for row in probabilities.tolist())
        return [dict(sorted(row.items(), key=lambda item: -item[1])) for row in rows]


def _many(images: Any) -> Iterable[Any]:
    single = isinstance(images, (str, os.PathLike)) or hasattr(images, "convert") or getattr(images, "ndim", 0) == 3
    return [images] if single else images


def _open_image(image: Any) -> Image:
    from PIL import Image

    from declip.data.decode import as_rgb, decode_image

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
