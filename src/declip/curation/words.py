"""What can be told about a caption by looking at it."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

from declip.data.apart import text_hash

_FILE = re.compile(
    r"\S*\.(jpe?g|png|gif|webp|bmp|tiff?|heic)|(img|dsc[nf]?|pict?|image|photo|scan|p)[-_ ]?\d{2,}\S*", re.I
)
_URL = re.compile(r"(https?://|www\.)\S+", re.I)
_HTML = re.compile(r"</?[a-z][^<>]*>|&(?:[a-z]+|#\d+);", re.I)
_FINAL = " \t\n.,;:!?。！？…"  # and no other signs: "keycap: #" is not "keycap: *"
_LOOKED_AT = 200  # characters that the script is told from


def caption_hash(text: str) -> int:
    """Equal for captions that differ in case, white space and final punctuation only: below 2⁶³."""
    return text_hash(text.rstrip(_FINAL) or text)


def not_language(text: str) -> str | None:
    """What a caption is where it is no language: a file name, an address, …; None where nothing is wrong with it."""
    if _URL.fullmatch(text):
        return "a web address"
    if _FILE.fullmatch(text):
        return "a file name"
    if _HTML.search(text):
        return "HTML"
    # Emoji and other symbols (categories S*) say something; digits and punctuation alone do not.
    if all(unicodedata.category(character)[0] in "NPZC" for character in text):
        return "digits and punctuation only"
    words = text.lower().split()
    if len(text) > 2 and len(set(text.lower())) == 1 and not unicodedata.category(text[0]).startswith("S"):
        return "one character repeated"
    if len(words) > 2 and len(set(words)) == 1:
        return "one word repeated"
    return None


def script(text: str) -> str:
    """The script that most letters of a caption are in: ``latin (ASCII)``, ``latin``, ``cjk``, ``cyrillic``, …"""
    if text.isascii():
        return "latin (ASCII)"
    names = Counter(
        unicodedata.name(character, "unknown").split()[0].lower()
        for character in text[:_LOOKED_AT]
        if character.isalpha()
    )
    return names.most_common(1)[0][0] if names else "symbols"
