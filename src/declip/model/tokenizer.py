"""The tokenizer that belongs to a text tower."""

from __future__ import annotations

from typing import Any

from declip.data.huggingface_tokenizer import HuggingFaceTokenizer
from declip.data.tokenizer import CaptionTokenizer, Tokenizer


def build_tokenizer(text_cfg: dict[str, Any], vocabulary: int) -> CaptionTokenizer:
    """For an open_clip text_cfg: CLIP's own byte pairs, or the Hugging Face tokenizer that it names.

    vocabulary: of how many ids the text tower knows.
    """
    name = text_cfg.get("hf_tokenizer_name")
    if not name:
        return Tokenizer()
    return HuggingFaceTokenizer(name, text_cfg.get("tokenizer_kwargs"), vocabulary)
