"""What `declip compare --quick` fills in."""

QUICK = {
    "recipes": ["clip", "best-small"],
    "data": ["demo:noto", "demo:twemoji"],
    "judged": ["demo:fluent3d"],
    "fractions": "1,1/4,1/16",
    "seeds": 1,
    "rates": "1",
    "pairs_seen": 13_000,
}
"""Minutes on two cores. Half as many pairs, of which equal compute asks, would be too few to learn from."""

NAMES_AS_THEY_ARE = [
    'terms.contrastive.texts=["caption", "masked"]',
    'terms.nearest_neighbour.texts=["caption"]',
]
"""Changes of `declip` for the embedded pairs: names of two or three words suffer where words are dropped or swapped;
sentences gain (docs/results.md)."""
