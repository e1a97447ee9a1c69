"""The tokenizer of a Hugging Face text tower, as open_clip uses it, in pieces that a loader can mask and cut."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from declip.data.captions import SpecialTokens
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
        self._cached = functools.lru_cache(2**16)(self._encode)

    def __reduce__(self) -> tuple[Any, ...]:
        return HuggingFaceTokenizer, self._arguments

    def encode(self, text: str) -> list[int]:
        """The ids of a caption, without special tokens."""
        return list(self._cached(text))

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files, so that open_clip finds them beside the model."""
        self._tokenizer.save_pretrained(folder)

    def _encode(self, text: str) -> tuple[int, ...]:
        cleaned = self._tokenizer.clean_fn(text)
        return tuple(self._tokenizer.tokenizer(cleaned, add_special_tokens=False, verbose=False)["input_ids"])


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
