"""What all reports are put together from: pictures, words, the list of facts."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from html import escape

DIRECTIONS = {"text_to_image": "Caption → picture", "image_to_text": "Picture → caption"}
RETRIEVAL = re.compile(r"(text_to_image|image_to_text)_r(\d+)")


def data_uri(image: bytes, inline_bytes: int = 24_000, longest: int = 224) -> str | None:
    """The picture as a data: URI; None where it cannot be read.

    Pictures of more than `inline_bytes`, or of an unfamiliar kind, become JPEGs of at most `longest` pixels a side.
    """
    kind = _media_type(image)
    if kind is None or len(image) > inline_bytes:
        from PIL import Image

        try:
            with Image.open(io.BytesIO(image)) as opened:
                opened.thumbnail((longest, longest))
                pixels = opened.convert("RGBA")
        except (OSError, ValueError, Image.DecompressionBombError):
            return None
        white = Image.new("RGBA", pixels.size, "white")
        buffer = io.BytesIO()
        Image.alpha_composite(white, pixels).convert("RGB").save(buffer, "JPEG", quality=85)
        kind, image = "image/jpeg", buffer.getvalue()
    return f"data:{kind};base64,{base64.b64encode(image).decode('ascii')}"


def _media_type(image: bytes) -> str | None:
    if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        return "image/webp"
    kinds = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"GIF8": "image/gif"}
    return next((kind for start, kind in kinds.items() if image.startswith(start)), None)


def words(key: str) -> str:
    """A key as words: masked_language → masked language."""
    return re.sub(r"[_\s]+", " ", key).strip()


def setup(facts: Sequence[tuple[str, str]]) -> str:
    if not facts:
        return ""
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    return f'<section><h2>Setup</h2><dl class="card spaced">{items}</dl></section>'


def cut(text: str, longest: int = 160) -> str:
    """A caption as it stands under a picture: of a long one, its start."""
    return text if len(text) <= longest else text[: longest - 1] + "…"
