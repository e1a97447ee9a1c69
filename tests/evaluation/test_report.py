from __future__ import annotations

import io
import itertools
import math
import re
from pathlib import Path
from typing import Any

import pytest
from html_page import NASTY, Page
from PIL import Image

from declip.evaluation.report import charts
from declip.evaluation.report.training import Hit, ModelResult, Query, write_report
from declip.evaluation.report.training_sections import duration, headline


def picture(size: int = 8, kind: str = "WEBP") -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((size, size), 90).convert("RGB").save(buffer, kind)
    return buffer.getvalue()


def history(terms: tuple[str, ...] = ("contrastive",), steps: int = 40) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        values = dict.fromkeys(terms, 5.0 / step)
        rows.append(
            {"step": step, "pairs": step * 64, "loss": sum(values.values()), "terms": values, "lr": 1e-3 / step}
            | {"samples_per_second": 900.0 + step % 7}
        )
        if step % 10 == 0:
            rows.append(
                {"step": step, "pairs": step * 64, "held_out": {"text_to_image_r1": step / 4, "score": step / 3}}
            )
    return rows


def model(name: str = "DeCLIP", r1: float = 23.4, back: float = 20.0, **changes: Any) -> ModelResult:
    metrics = {
        f"{way}_r{k}": first + k
        for way, first in (("text_to_image", r1 - 1), ("image_to_text", back - 1))
        for k in (1, 5, 10)
    }
    values = {"name": name, "metrics": metrics, "pairs_seen": 48_000, "seconds": 252.0, "pairs_per_second": 190.5}
    return ModelResult(**{**values, "peak_memory_gb": 1.25, "history": history(), **changes})


def report(folder: Path, models: list[ModelResult], queries: list[Query] | None = None, **texts: Any) -> Page:
    values = {"title": "Title", "intro": "Intro.", "facts": [("Training pairs", "3,812")], **texts}
    write_report(folder / "report.html", models=models, queries=queries or [], **values)
    assert [file.name for file in folder.iterdir()] == ["report.html"]  # no temporary file is left
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def plain(models: list[ModelResult]) -> str:
    return Page(f"<p>{headline(models)}</p>").text.replace("\xa0", " ")


def two_models() -> list[ModelResult]:
    declip = model(history=history(("contrastive", "simsiam", "masked_language", "nearest_neighbour")))
    return [model("CLIP", 15.1, 14.0), declip]


def hits(*right: bool) -> list[Hit]:
    return [Hit(picture(), f"picture {number}", good) for number, good in enumerate(right)]


def test_a_page_fetches_nothing(tmp_path: Path) -> None:
    query = Query("a red heart", {"CLIP": hits(True, False), "DeCLIP": hits(True, True)})
    page = report(tmp_path, two_models(), [query], commands=[("Search", "declip search")])
    page.check_that_it_fetches_nothing()


def test_every_text_is_escaped(tmp_path: Path) -> None:
    odd = model(NASTY, metrics={NASTY: 1.0, "text_to_image_r1": 2.0}, history=history((NASTY,)))
    query = Query(NASTY, {NASTY: [Hit(picture(), NASTY, True)]})
    page = report(
        tmp_path,
        [odd, model("CLIP")],
        [query],
        title=NASTY,
        intro=NASTY,
        facts=[(NASTY, NASTY)],
        commands=[(NASTY, NASTY)],
    )
    assert not page.all("script")
    assert page.text.count(NASTY) >= 8
    assert page.all("img")[0]["alt"] == f"{NASTY} (right)"


def test_right_and_wrong_pictures_are_marked_and_counted(tmp_path: Path) -> None:
    queries = [
        Query("one", {"CLIP": hits(True, False, False, False, False), "DeCLIP": hits(True, True, True, False, True)}),
        Query("two", {"DeCLIP": hits(False, False)}),
    ]
    page = report(tmp_path, two_models(), queries)
    assert len(page.all("li", "right")) == 5
    assert len(page.all("li", "wrong")) == 7
    assert "CLIP 1 of 5, DeCLIP 4 of 7" in page.text
    assert "4 of 5 right" in page.text
    assert page.all("li", "wrong")[0]["title"] == "picture 1"


def test_one_model_without_queries(tmp_path: Path) -> None:
    page = report(tmp_path, [model()])
    assert "DeCLIP puts the right picture first for 23.4% of captions, after 48,000 pairs." in page.text.replace(
        "\xa0", " "
    )
    assert not page.all("img")
    assert not page.all("td", "best")
    assert "4 min 12 s" in page.text
    assert "1.25 GB" in page.text


def test_a_bare_model_has_a_page(tmp_path: Path) -> None:
    bare = ModelResult("mine", {}, 640, 3.21, 0.0, 0.0, [])
    page = report(tmp_path, [bare], facts=[])
    assert "mine saw 640 pairs in 3.2 s." in page.text
    assert not page.all("svg")


def test_each_term_has_a_chart_and_each_model_a_line_where_it_has_the_term(tmp_path: Path) -> None:
    page = report(tmp_path, two_models())
    said = {str(a["aria-label"]).partition(" over")[0]: str(a["aria-label"]) for a in page.all("svg")}
    titles = [
        "contrastive",
        "simsiam",
        "masked language",
        "nearest neighbour",
        "held-out score",
        "speed",
        "learning rate",
    ]
    assert list(said) == [f"Line chart of {title}" for title in titles]
    assert ": CLIP ends at" in said["Line chart of contrastive"]
    assert "; DeCLIP ends at" in said["Line chart of contrastive"]
    assert ": DeCLIP ends at" in said["Line chart of simsiam"]
    assert " CLIP ends at" not in said["Line chart of simsiam"]


def test_rows_without_terms_show_the_whole_loss(tmp_path: Path) -> None:
    rows = [
        {"step": 1, "pairs": 64, "loss": 3.0},
        {"step": 2, "pairs": 128, "loss": math.nan},
        {"step": 3, "pairs": None},
    ]
    page = report(tmp_path, [model(history=rows)])
    assert [a["aria-label"] for a in page.all("svg")] == ["Line chart of loss over pairs seen: DeCLIP ends at 3.00."]
    assert "nan" not in (tmp_path / "report.html").read_text(encoding="utf-8").lower()


def test_a_huge_history_is_thinned(tmp_path: Path) -> None:
    page = report(tmp_path, [model(history=history(steps=20_000))])
    lines = [a["d"] or "" for a in page.all("path", "line") + page.all("path", "raw")]
    assert max(line.count("L") + 1 for line in lines) == charts.MAX_POINTS
    assert (tmp_path / "report.html").stat().st_size < 150_000


def test_the_best_figure_is_bold_and_the_difference_is_given(tmp_path: Path) -> None:
    page = report(tmp_path, two_models())
    assert len(page.all("td", "best")) == 6
    assert "DeCLIP − CLIP +8.3" in re.sub(r"(?<=\d)(?=\+)| (?=\+)", " ", page.text).replace("CLIP+", "CLIP +")


def test_other_metrics_are_shown_too(tmp_path: Path) -> None:
    metrics = {"text_to_image_r1": 9.0, "held_out_concepts_text_to_image_r1": 4.5, "cifar10_top1": 31.25}
    page = report(tmp_path, [model(metrics={**metrics, "text_to_image_median_rank": 77.0}), model("CLIP")])
    for words in ("Held out concepts", "4.5", "Other metrics", "cifar10 top1", "31.2"):
        assert words in page.text
    assert "77" not in page.text  # a rank is not in percent


@pytest.mark.parametrize(
    ("models", "sentence"),
    [
        (
            [model("CLIP", 15.1), model(r1=23.4)],
            "DeCLIP puts the right picture first for 23.4% of captions, CLIP 15.1%: 8.3 points more, "
            "after the same 48,000 pairs.",
        ),
        (
            [model("CLIP", 15.1), model(r1=12.0)],
            "DeCLIP is not ahead: it puts the right picture first for 12.0% of captions and CLIP 15.1%, "
            "3.1 points more, after the same 48,000 pairs.",
        ),
        (
            [model("CLIP", 15.1), model(r1=15.6, pairs_seen=24_000)],
            "DeCLIP and CLIP are about level: DeCLIP puts the right picture first for 15.6% of captions, CLIP 15.1%, "
            "after 24,000 pairs against 48,000.",
        ),
        (
            [model("CLIP", 15.1, back=21.0), model(r1=23.4)],
            "DeCLIP puts the right picture first for 23.4% of captions, CLIP 15.1%: 8.3 points more, after the same "
            "48,000 pairs; from picture to caption it is behind, 20.0% to 21.0%.",
        ),
        (
            [model("SLIP", 15.0, metrics={"top1": 40.0}), model("CLIP", metrics={"top1": 35.0})],
            "SLIP reaches 40.0% in top1, CLIP 35.0%: 5.0 points more, after the same 48,000 pairs.",
        ),
    ],
)
def test_the_headline_is_honest(models: list[ModelResult], sentence: str) -> None:
    assert plain(models) == sentence


def test_large_unfamiliar_and_broken_pictures(tmp_path: Path) -> None:
    images = [picture(600, "PNG"), picture(16, "BMP"), b"no picture", picture(16, "PNG")]
    query = Query("q", {"DeCLIP": [Hit(image, "caption", True) for image in images]})
    page = report(tmp_path, [model()], [query])
    kinds = [str(a["src"]).partition(";")[0] for a in page.all("img")]
    assert kinds == ["data:image/jpeg", "data:image/jpeg", "data:image/png"]
    assert page.all("span", "gone")[0]["aria-label"] == "caption (right)"


def test_a_report_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("old")
    with pytest.raises(ValueError, match="at least one model"):
        write_report(tmp_path / "report.html", "t", "i", [], [], [])
    with pytest.raises(UnicodeEncodeError):
        write_report(tmp_path / "report.html", "\ud800", "i", [model()], [], [])
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text() == "old"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 100, [0, 25, 50, 75, 100]),
        (1.2, 4.9, [1, 2, 3, 4, 5]),
        (-0.9, -0.1, [-1, -0.8, -0.6, -0.4, -0.2, 0]),
        (3, 3, [1, 2, 3, 4, 5]),
    ],
)
def test_ticks_are_round_and_span_the_values(low: float, high: float, expected: list[float]) -> None:
    assert charts.ticks(low, high) == expected


def test_numbers_as_texts() -> None:
    assert [charts.compact(n) for n in (0, 800, 12_000, 1_500_000)] == ["0", "800", "12k", "1.5M"]
    assert [charts.scientific(n) for n in (0, 0.02, 5e-4, 1.25e-5)] == ["0", "0.02", "5·10⁻⁴", "1.25·10⁻⁵"]
    assert charts.tick_labels([-0.5, 0.0, 0.5]) == ["−0.5", "0.0", "0.5"]
    assert [duration(s) for s in (3.21, 42, 252, 3780)] == ["3.2 s", "42 s", "4 min 12 s", "1 h 03 min"]


def test_smoothing_keeps_level_and_length() -> None:
    points = [(float(x), 2.0 + (-1) ** x) for x in range(600)]
    smoothed = charts.smooth(points)
    assert [x for x, _ in smoothed] == [x for x, _ in points]
    assert all(abs(y - 2.0) < 0.2 for _, y in smoothed[20:-20])


def test_labels_are_moved_apart() -> None:
    placed = charts.spread([50.0, 51.0, 52.0, 99.0], 10.0, 0.0, 100.0)
    assert all(later - earlier >= 9.999 for earlier, later in itertools.pairwise(placed))
    assert max(placed) <= 100
