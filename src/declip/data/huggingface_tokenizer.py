"""The tokenizer of a Hugging Face text tower, as open_clip uses it, in pieces that a loader can mask and cut."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from declip.data.sources.base import LONGEST_CAPTION
from declip.data.tokenizer import LONGEST_KEPT_CAPTION, SpecialTokens, clean
from declip.errors import InputError, first_line


class HuggingFaceTokenizer:
    """Ids of a caption without the special tokens, and those tokens apart. Can be pickled."""

    def __init__(self, name: str, options: dict[str, Any] | None = None, vocabulary: int | None = None) -> None:
        """`name`: a folder or a name on the Hugging Face hub; `options`: open_clip's tokenizer_kwargs.

        vocabulary: of how many ids the text tower knows; where the tokenizer has no mask token, the next one is it.
        Raises InputError where there is no such tokenizer.
        """
        try:
            from open_clip.tokenizer import HFTokenizer

            self._tokenizer = HFTokenizer(name, **(options or {}))
        except (ImportError, OSError, ValueError) as error:
            raise InputError(f"The tokenizer {name!r} cannot be opened: {first_line(error)}.") from None
        self._arguments = (name, options, vocabulary)
        self.special = _special_tokens(self._tokenizer.tokenizer, vocabulary)
        self.unknown: int | None = self._tokenizer.tokenizer.unk_token_id
        self._rust = _rust(self._tokenizer.tokenizer)
        self._whitespace = (options or {}).get("clean", "whitespace") == "whitespace"
        self._cached = functools.lru_cache(2**16)(self._encode)

    def __reduce__(self) -> tuple[Any, ...]:
        return HuggingFaceTokenizer, self._arguments

    def encode(self, text: str) -> list[int]:
        """The ids of a caption, without special tokens. Only the first 8192 characters are read."""
        text = text[:LONGEST_CAPTION]
        return list(self._cached(text) if len(text) <= LONGEST_KEPT_CAPTION else self._encode(text))

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files, so that open_clip finds them beside the model."""
        self._tokenizer.save_pretrained(folder)

    def _encode(self, text: str) -> tuple[int, ...]:
        cleaned = " ".join(clean(text).split()) if self._whitespace else self._tokenizer.clean_fn(text)
        if self._rust is not None:
            return tuple(self._rust.encode(cleaned, add_special_tokens=False).ids)
        return tuple(self._tokenizer.tokenizer(cleaned, add_special_tokens=False, verbose=False)["input_ids"])


_PROBES = ["a photo of a dog", "A  Photo\nof DOGS, 12.5!", "caf\u00e9 \u732b \U0001f604", "a [MASK] </s> <s> b", ""]


def _rust(tokenizer: Any) -> Any | None:
    """The Rust tokenizer inside, for transformers' own call spends most of its time around it.

    None where there is none, or where the Python around it changes the ids.
    """
    rust = getattr(tokenizer, "backend_tokenizer", None)
    if rust is None:
        return None
    asked = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in _PROBES]
    # That call has switched cutting and padding off in it.
    return rust if [rust.encode(text, add_special_tokens=False).ids for text in _PROBES] == asked else None


def _special_tokens(tokenizer: Any, vocabulary: int | None) -> SpecialTokens:
    bare, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    if all(token == tokenizer.unk_token_id for token in bare):
        raise InputError(f"The tokenizer {tokenizer.name_or_path!r} knows no words: are its files in that folder?")
    at = next(at for at in range(len(whole)) if whole[at : at + len(bare)] == bare)
    size = vocabulary or len(tokenizer)
    mask = size if tokenizer.mask_token_id is None else tokenizer.mask_token_id
    return SpecialTokens(
        start=tuple(whole[:at]),
        end=tuple(whole[at + len(bare) :]),
        pad=tokenizer.pad_token_id or 0,
        mask=mask,
        vocabulary=min(size, len(tokenizer)),
        never=frozenset({*tokenizer.all_special_ids, mask}),
    )
