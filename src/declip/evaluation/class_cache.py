"""Embeddings of classes, kept on disk: eighty prompts for each of a thousand classes take minutes on a CPU."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from declip.data.storage import cache_folder
from declip.evaluation.embedding import Encoder
from declip.files import save_weights
from declip.model.class_embeddings import class_embeddings
from declip.model.prompts import fill

_WORTH = 500
"""Prompts from which on a file is kept; fewer take about as long as it does to find them."""
_PROBES = 4


def cached_class_embeddings(
    model: Encoder, names: Sequence[str], templates: Sequence[str], folder: Path | None = None
) -> Tensor:
    """`class_embeddings`, read from `folder` (by default in the cache) where they have been computed before.

    A file is found by a hash of the text tower's weights, of what it makes of a few prompts (so that two towers that
    compute differently with the same weights are two), and of all prompts. Only models of ours have files.
    """
    clip = getattr(model, "clip", None)
    if not isinstance(clip, nn.Module) or len(names) * len(templates) < _WORTH:
        return class_embeddings(model, names, templates)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = (folder or cache_folder() / "classes") / f"{_key(model, clip, names, templates)}.safetensors"
    with contextlib.suppress(OSError, SafetensorError, KeyError):  # not there, or damaged: it is computed again
        return load_file(path)["classes"]
    embeddings = class_embeddings(model, names, templates)
    with contextlib.suppress(OSError):  # a full or read-only cache costs time, not the answer
        path.parent.mkdir(parents=True, exist_ok=True)
        save_weights(path, {"classes": embeddings})
    return embeddings


def _key(model: Encoder, clip: nn.Module, names: Sequence[str], templates: Sequence[str]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in clip.state_dict().items():
        if not name.startswith("visual."):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    probes = torch.as_tensor(model.encode_text([fill(templates[0], name) for name in names[:_PROBES]]))
    digest.update(probes.float().numpy().tobytes())
    for text in (*names, "", *templates):
        digest.update(b"%d:" % len(text.encode()) + text.encode())
    return digest.hexdigest()
