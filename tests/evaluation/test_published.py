"""The published figures as data say what the page of published figures says, and nothing that it tells not to quote."""

from __future__ import annotations

import json
import re
from pathlib import Path

from declip.evaluation import published
from declip.evaluation.published import published_rows

PAGE = Path(__file__).parents[2] / "docs" / "published.md"
NAMES = {
    "CIFAR10": "cifar10",
    "CIFAR100": "cifar100",
    "Food": "food101",
    "Pets": "pets",
    "Flowers": "flowers",
    "SUN": "sun397",
    "Cars": "cars",
    "DTD": "dtd",
    "Caltech": "caltech101",
    "Aircraft": "aircraft",
    "ImageNet": "imagenet",
}
Figure = tuple[str, str, str, str, float, str]  # model, set, task, metric, value, mark
YFCC15M = "ViT-B/32, YFCC15M"


def tables(heading: str) -> list[list[dict[str, str]]]:
    """A section's tables: of each, its rows by the columns' heads."""
    section = PAGE.read_text(encoding="utf-8").split(f"\n## {heading}", 1)[1].split("\n## ", 1)[0]
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE):
        heads, _, *rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in block.splitlines()]
        found.append([dict(zip(heads, row, strict=True)) for row in rows])
    return found


def figure(cell: str, source: str) -> tuple[float, str] | None:
    """A cell's figure and its mark: its own, or that of the whole row; a row of several marks has none of its own."""
    match = re.match(r"([\d.]+)\s*([†‡]?)", cell)
    if not match:
        return None
    whole = set(re.findall("[†‡]", source))
    return float(match[1]), match[2] or (whole.pop() if len(whole) == 1 else "")


def on_the_page() -> set[Figure]:
    found: set[Figure] = set()

    def add(model: str, data: str, task: str, metric: str, cell: str, source: str) -> None:
        if read := figure(cell, source):
            found.add((model, data, task, metric, *read))

    towers, more = tables("Zero-shot ImageNet, top-1")
    for row in towers:
        for method in ("CLIP", "SLIP", "FILIP", "DeCLIP", "DeFILIP"):
            model = f"{method}, {row['image tower']}, YFCC15M"
            add(model, "imagenet", "zero-shot", "top1", row[method], row["source"])
    for row in more:
        method, _, tower = re.split(r",? \(", row["model"])[0].partition(" ")
        if "largest" in tower:
            model = "DeCLIP, largest variant"
        else:
            pairs = "".join(re.findall(r"^(\w+)(?: (†))?", row["pairs"])[0]) if row["pairs"] else "?"
            model = f"{method}, {tower}, {pairs}"
        add(model, "imagenet", "zero-shot", "top1", row["top-1"], row["source"])
    for row in tables("Zero-shot classification")[0]:
        for head, data in NAMES.items():
            add(f"{row['']}, {YFCC15M}", data, "zero-shot", "top1", row[head], row["source"])
    for row in tables("Zero-shot retrieval")[0]:
        for data in ("Flickr30k", "COCO"):
            for way in ("image→text", "text→image"):
                for k, cell in zip((1, 5, 10), row[f"{data} {way}"].split(" / "), strict=True):
                    metric = f"{way.replace('→', '_to_')}_r{k}"
                    add(f"{row['']}, {YFCC15M}", data.lower(), "retrieval", metric, cell, row["source"])
    for row in tables("Linear probe")[0]:
        # Which model it is that these figures are of is from memory alone.
        model = row[""].replace("DeCLIP, ResNet-50, 88M", "DeCLIP, model not named")
        for head, data in NAMES.items():
            add(model, data, "linear-probe", "top1", row[head], row["source"])
    return found


def in_the_package() -> set[Figure]:
    rows = json.loads(Path(published.__file__).with_suffix(".json").read_text(encoding="utf-8"))["rows"]
    places = {(data, row["task"]) for row in rows for data in row["metrics"]}
    return {
        (row.model, row.data, row.task, metric, value, row.mark)
        for place in places
        for row in published_rows(*place)
        for metric, value in row.metrics.items()
    }


def test_every_figure_stands_on_the_page_with_the_same_mark() -> None:
    assert in_the_package() - on_the_page() == set()


def test_nothing_but_what_is_not_to_be_quoted_and_what_stands_there_twice_is_left_out() -> None:
    left = {found for found in on_the_page() - in_the_package() if found[-1] != "‡"}
    ours = in_the_package()
    assert len(left) == 5  # ImageNet in the table of eleven sets: third hand, and equal to the figures from the source
    assert all((*found[:-1], "") in ours for found in left)
    assert not any(found[-1] == "‡" for found in ours)


def test_rows_of_a_set_say_where_they_were_read() -> None:
    rows = published_rows("flickr30k", "retrieval")
    assert [row.model.split(",")[0] for row in rows] == ["CLIP", "SLIP", "DeCLIP"]
    assert rows[2].metrics["text_to_image_r1"] == 34.3
    assert rows[2].mark == "†"
    assert "ALIP" in rows[2].source
    assert published_rows("imagenet", "retrieval") == []
    assert published_rows("no-such-set", "zero-shot") == []
