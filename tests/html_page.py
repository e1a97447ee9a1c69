"""A report as its tests read it."""

from __future__ import annotations

import re
from html.parser import HTMLParser

VOID = {"meta", "img", "br", "wbr", "link", "hr", "input"}
LEAVES = {"path", "circle"}
NASTY = "<script>alert(\"x\")</script> & 'quoted'"


class Page(HTMLParser):
    """Parses strictly enough: every element is closed in order, and what was met is kept."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.source = text
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in LEAVES
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    def all(self, tag: str, kind: str | None = None) -> list[dict[str, str | None]]:
        return [a for t, a in self.tags if t == tag and (kind is None or kind in (a.get("class") or "").split())]

    def check_that_it_fetches_nothing(self) -> None:
        for _, attributes in self.tags:
            for name in ("src", "href", "xlink:href", "srcset", "action", "data"):
                assert (attributes.get(name) or "data:").startswith(("data:", "#"))
        assert not re.search(r"https?://|url\(|@import|<script|<link|<iframe", self.source)
        assert "default-src 'none'" in self.source
        assert all(attributes.get("alt") for attributes in self.all("img"))
        assert all(attributes.get("aria-label") for attributes in self.all("svg"))
