from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from html_page import NASTY, Page
from PIL import Image

from declip.evaluation.details import (
    Calibration,
    ClassScore,
    Confusion,
    Details,
    Example,
    Found,
    Overlap,
    Published,
    Robustness,
)
from declip.evaluation.judged import Comparison, Judged
from declip.evaluation.report.answer import headline
from declip.evaluation.report.evaluation import write_evaluation_report
from declip.evaluation.report.judgements import Models

A, B = "CLIP", "DeCLIP"


def picture(size: int = 8, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (200, 30, 90)).save(buffer, kind)
    return buffer.getvalue()


def judged(model: str = B, value: float = 60.0, data: str = "cifar10", **changes: Any) -> Judged:
    values: dict[str, Any] = {"task": "zero-shot", "items": 1000, "skipped": 0, "undecodable": 0}
    values |= {"metrics": {"top1": value}, "intervals": {"top1": (value - 3, value + 3)}}
    return Judged(model=model, data=data, **{**values, **changes})


def retrieval(model: str = B, value: float = 30.0, data: str = "flickr30k", **changes: Any) -> Judged:
    metrics = {f"{way}_r{k}": value + k for way in ("text_to_image", "image_to_text") for k in (1, 5)}
    metrics["text_to_image_median_rank"] = 400 / value
    return judged(model, 0.0, data, **{"task": "retrieval", "metrics": metrics, "intervals": {}, **changes})


def against(difference: float, p: float = 0.0, data: str = "cifar10", **changes: Any) -> Comparison:
    values: dict[str, Any] = {"models": (B, A), "data": data, "task": "zero-shot", "metric": "top1"}
    values |= {"difference": difference, "interval": (difference - 1, difference + 1), "p": p}
    return Comparison(**{**values, **changes})


def details(model: str = B, data: str = "cifar10", task: str = "zero-shot", **found: Any) -> Details:
    return Details(model, data, task, **found)


def source(
    folder: Path,
    results: Sequence[Judged],
    found: Sequence[Details] = (),
    comparisons: Sequence[Comparison] = (),
    overlaps: Sequence[Overlap] = (),
    published: Sequence[Published] = (),
    facts: Sequence[tuple[str, str]] = (),
) -> str:
    write_evaluation_report(folder / "report.html", results, found, comparisons, overlaps, published, facts)
    assert [file.name for file in folder.iterdir()] == ["report.html"]  # no temporary file is left
    return (folder / "report.html").read_text(encoding="utf-8")


def report(folder: Path, results: Sequence[Judged], *others: Any, **more: Any) -> Page:
    return Page(source(folder, results, *others, **more))


def plain(results: Sequence[Judged], comparisons: Sequence[Comparison] = ()) -> str:
    models = Models(tuple(dict.fromkeys(each.model for each in results)))
    return Page(f"<p>{headline(models, results, comparisons)}</p>").text.replace("\xa0", " ")


def everything(name: str = "cat", model: str = B) -> list[Details]:
    example = Example(picture(), name, name + "?", 0.97)
    return [
        details(
            model,
            classes=[ClassScore(name, 10, 70.0)],
            confusions=[Confusion(name, name + "?", 3, 10)],
            worst=[example],
            best=[Example(picture(), name, name, 0.99)],
            calibration=Calibration(((0.9, 0.7, 1.0),), 20.0, 2.0, 1.5),
            robustness=[Robustness("motion_blur", "top1", tuple((s, 60.0 - s) for s in range(6)))],
        ),
        details(
            model,
            "flickr30k",
            "retrieval",
            retrieved=[
                Found(name, (picture(), picture()), (False, True), 2),
                Found(picture(), (name, "other"), (True, False), 1),
            ],
            health={"alignment": 1.25, "modality_gap": 0.8, "unheard_of": 12.5},
        ),
    ]


def test_the_page_fetches_nothing_and_links_to_each_of_its_sections(tmp_path: Path) -> None:
    page = report(
        tmp_path,
        [judged(A, 55.0), judged(), retrieval(broken=["a.jpg: truncated"], undecodable=1)],
        everything(),
        [against(5.0)],
        [Overlap(B, "cifar10", 1000, 2, 1)],
        [Published("CLIP, ViT-B/32", "cifar10", "zero-shot", {"top1": 63.7}, "†", "a paper")],
        [("Device", "cpu")],
    )
    page.check_that_it_fetches_nothing()
    anchors = [str(attributes["id"]) for attributes in page.all("section") if attributes.get("id")]
    assert [str(attributes["href"]) for attributes in page.all("a")][-9:] == [f"#{anchor}" for anchor in anchors]
    assert anchors[0] == "results"
    assert "Setup" in page.text


def test_what_has_no_content_vanishes(tmp_path: Path) -> None:
    page = report(tmp_path, [judged()])
    assert [a["id"] for a in page.all("section")] == ["results"]
    assert not page.all("svg")
    assert not page.all("img")
    assert not page.all("td", "best")
    assert "Setup" not in page.text


def test_every_text_is_escaped(tmp_path: Path) -> None:
    page = report(
        tmp_path,
        [judged(NASTY, data=NASTY, task=NASTY, metrics={NASTY: 5.0}, broken=[NASTY], settings={NASTY: NASTY})],
        [
            *everything(NASTY, NASTY),
            details(NASTY, NASTY, NASTY, health={NASTY: 1.0}, robustness=[Robustness(NASTY, NASTY, ((0, 1.0),))]),
        ],
        [against(1.0, models=(NASTY, A), data=NASTY, task=NASTY, metric=NASTY)],
        [
            Overlap(NASTY, NASTY, 5, 1, 0, (NASTY,)),
            Overlap(NASTY, NASTY, 5, 0, 0, checked=False, reason=NASTY),
        ],
        [Published(NASTY, NASTY, NASTY, {NASTY: 1.0}, NASTY, NASTY)],
        [(NASTY, NASTY)],
    )
    assert not page.all("script")
    assert page.text.count("<script>") > 30
    assert f"{NASTY}, taken for {NASTY}?" in [a["alt"] for a in page.all("img")]


def test_the_same_input_gives_the_same_page(tmp_path: Path) -> None:
    given = ([judged(A, 55.0), judged()], everything(), [against(5.0)], [Overlap(B, "cifar10", 10, 0, 0)])
    assert source(tmp_path, *given) == source(tmp_path, *given)


def test_a_page_needs_a_result_and_survives_half_a_character(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one result"):
        write_evaluation_report(tmp_path / "report.html", [], [], [], [], [], [])
    assert "cifar?" in source(tmp_path, [judged(data="cifar\ud800")])


@pytest.mark.parametrize(
    ("results", "comparisons", "sentence"),
    [
        ([judged()], [], "DeCLIP names 60.0% of pictures right (zero-shot) on cifar10."),
        (
            [judged(), judged(value=40.0, data="dtd"), retrieval()],
            [],
            "DeCLIP names 50.0% of pictures right (zero-shot) on average over 2 sets, and puts the right picture first "
            "for 31.0% of captions on flickr30k.",
        ),
        (
            [judged(A, 55.0), judged()],
            [against(5.0, 0.0004)],
            "DeCLIP is ahead of CLIP: it names 60.0% of pictures right (zero-shot) on cifar10, CLIP 55.0%, a "
            "difference of 5.0 points (p < 0.001).",
        ),
        (
            [judged(A, 59.0), judged()],
            [against(1.0, 0.31)],
            "DeCLIP and CLIP cannot be told apart: DeCLIP names 60.0% of pictures right (zero-shot) on cifar10, CLIP "
            "59.0% (p = 0.31).",
        ),
        (  # the same model twice is no contest, and a comparison that says otherwise is none in favour
            [judged(A, 59.0), judged(), judged(value=59.5, settings={"templates": "simple"})],
            [against(-1.0)],
            "DeCLIP names 60.0% of pictures right (zero-shot) on cifar10, CLIP 59.0%, but where both were asked the "
            "same, CLIP is ahead (p < 0.001).",
        ),
        (
            [judged(A, 59.0), judged()],
            [],
            "DeCLIP names 60.0% of pictures right (zero-shot) on cifar10, CLIP 59.0%: whether that is more than chance "
            "was not tested.",
        ),
        (
            [
                judged(model, value, data)
                for data, *values in (("cifar10", 55, 60), ("dtd", 50, 45), ("cars", 9, 9.1), ("pets", 20, 21))
                for model, value in zip((A, B), values, strict=True)
            ],
            [against(5.0), against(-5.0, data="dtd"), against(0.1, 0.9, "cars")],
            "Of 4 sets, DeCLIP is significantly ahead on 1 (cifar10) and has the best figure, untested, on 1 (pets); "
            "CLIP is significantly ahead on 1 (dtd); 1 (cars) is too close to call.",
        ),
    ],
)
def test_the_headline_says_no_more_than_the_figures(
    results: list[Judged], comparisons: list[Comparison], sentence: str
) -> None:
    assert plain(results, comparisons) == sentence


def test_comparisons_of_several_numbers_of_shots_are_no_test_of_one(tmp_path: Path) -> None:
    results = [judged(m, v + s, settings={"shots": s}, task="few-shot") for s in (1, 4) for m, v in ((A, 50), (B, 55))]
    twice = [against(5.0, task="few-shot"), against(5.0, task="few-shot")]
    assert "not tested" in plain(results, twice)
    page = report(tmp_path, results)
    assert "Line chart of cifar10 over shots: CLIP ends at 54.0%; DeCLIP ends at 59.0%." in [
        a["aria-label"] for a in page.all("svg")
    ]
    assert len(page.all("td", "best")) == 2  # of each number of shots
    assert "top-1, by shots" in page.text


def test_tables_have_intervals_counts_and_published_rows(tmp_path: Path) -> None:
    published = [
        Published("CLIP, ViT-B/32", "cifar10", "zero-shot", {"top1": 63.7}, "†", "first paper"),
        Published("CLIP, ViT-B/16", "cifar10", "zero-shot", {"top1": 71.5}, "", "second paper"),
        Published("elsewhere", "dtd", "zero-shot", {"top1": 1.5}, "‡", "third paper"),
        Published("another task", "cifar10", "retrieval", {"top1": 2.5}, "", "fourth paper"),
    ]
    results = [judged(A, 55.0, undecodable=2, skipped=3), judged(undecodable=2, skipped=3)]
    page = report(tmp_path, results, published=published)
    for words in ("52.0–58.0", "57.0–63.0", "2 of them undecodable and counted as wrong, 3 pairs skipped"):
        assert words in page.text
    assert len(page.all("tr", "published")) == 2
    assert "CLIP, ViT-B/32 † 1" in page.text
    assert "† third party" in page.text
    assert "1\xa0first paper. 2\xa0second paper." in "".join(page.words)
    assert "‡" not in page.text
    assert len(page.all("td", "best")) == 1


def test_of_ranks_the_lowest_is_best(tmp_path: Path) -> None:
    text = source(tmp_path, [retrieval(A, 20.0), retrieval(B, 40.0)])
    assert "<strong>10.0</strong>" in text
    assert "<strong>20.0</strong>" not in text
    assert "Caption → picture" in text


def test_many_sets_stand_side_by_side(tmp_path: Path) -> None:
    sets = ("cifar10", "dtd", "cars", "pets")
    results = [judged(m, v + n, s) for m, v in ((A, 50.0), (B, 55.0)) for n, s in enumerate(sets)]
    published = [Published("CLIP, ViT-B/32", s, "zero-shot", {"top1": 30.0}, "†", "paper") for s in sets]
    published.append(Published("CLIP, once", "dtd", "zero-shot", {"top1": 31.0}, "", "paper"))
    page = report(tmp_path, results, published=published)
    assert "51.5" in page.text  # means
    assert "56.5" in page.text
    assert len(page.all("tr", "published")) == 2  # one in the overview, one beneath its set
    assert page.text.count("30.0†") == 4


def test_comparisons_are_said_in_words(tmp_path: Path) -> None:
    comparisons = [
        against(5.0),
        against(-5.0, data="dtd"),
        against(0.5, 0.4, "cars"),
        against(0.0, 1.0, "pets"),
        against(-3.0, data="coco", metric="text_to_image_median_rank"),
    ]
    page = report(tmp_path, [judged(A), judged()], comparisons=comparisons)
    text = page.text.replace("\xa0", " ")
    for words in (
        "DeCLIP is 5.0 points ahead +5.0 (+4.0 to +6.0), p < 0.001",
        "CLIP is 5.0 points ahead −5.0",
        "DeCLIP is 0.5 points ahead, which may be chance +0.5 (−0.5 to +1.5), p = 0.4",
        "No difference",
        "DeCLIP is 3.0 ranks ahead −3.0",
    ):
        assert words in text
    bars = page.all("div", "whisker")
    assert ["level" in str(bar["class"]) for bar in bars] == [False, False, True, True, False]
    dots = [float(str(b["style"]).removeprefix("left:").removesuffix("%")) for b in page.all("b") if b.get("style")]
    assert dots[0] > 50 > dots[1]
    assert dots[3] == 50
    assert dots[4] > 50  # a lower rank is better, and to the right


def test_of_many_classes_both_ends_are_shown(tmp_path: Path) -> None:
    scores = [ClassScore(f"class {n}", 10, float(n)) for n in range(31)]
    page = report(tmp_path, [judged()], [details(classes=scores)])
    assert len(page.all("div", "class")) == 24
    assert "The 12 best of 31 classes" in page.text
    assert "class 15" not in page.text
    page = report(tmp_path, [judged()], [details(classes=scores[:30])])
    assert len(page.all("div", "class")) == 30
    assert page.text.index("class 29") < page.text.index("class 0")


def test_examples_say_what_they_are_and_what_they_were_taken_for(tmp_path: Path) -> None:
    page = report(tmp_path, [judged()], everything())
    assert "cattaken for cat?97\xa0% sure" in "".join(page.words)
    assert "3 of 10" in page.text
    assert [a["alt"] for a in page.all("img")][:2] == ["cat, taken for cat?", "cat, named right"]


def test_galleries_mark_the_right_ones_of_each_model(tmp_path: Path) -> None:
    page = report(tmp_path, [retrieval(A), retrieval()], [*everything(model=A), *everything(model=B)])
    assert len(page.all("article", "query")) == 2  # one caption, one picture, both models in each
    assert len(page.all("li", "right")) == len(page.all("li", "wrong")) == 2
    assert len(page.all("li", "right-text")) == len(page.all("li", "wrong-text")) == 2
    assert "rank 2" in page.text
    assert "“cat”" in page.text


def test_pictures_are_small_and_broken_ones_leave_a_box(tmp_path: Path) -> None:
    large = io.BytesIO()
    Image.effect_noise((900, 900), 90).save(large, "PNG")
    worst = [Example(image, "a", "b", 0.5) for image in (large.getvalue(), b"no picture", picture())]
    page = report(tmp_path, [judged()], [details(worst=worst)])
    assert [str(a["src"]).partition(";")[0] for a in page.all("img")] == ["data:image/jpeg", "data:image/png"]
    assert page.all("span", "gone")[0]["aria-label"] == "a, taken for b"
    assert (tmp_path / "report.html").stat().st_size < 60_000


def test_calibration_robustness_and_embeddings(tmp_path: Path) -> None:
    page = report(tmp_path, [judged()], everything())
    said = [str(a["aria-label"]) for a in page.all("svg")]
    assert said[0] == "Reliability diagram: DeCLIP has an error of 20.0%."
    assert said[1] == "Line chart of motion blur over severity: DeCLIP ends at 55.0%."
    assert "20 points too sure, on the whole" in page.text
    assert "Modality gap" in page.text
    assert "Lower is better." in page.text
    assert "Unheard of" in page.text


def test_leaks_warn_and_broken_images_are_listed(tmp_path: Path) -> None:
    overlaps = [
        Overlap(B, "cifar10", 1000, 2, 1, ("train.parquet#5",)),
        Overlap(A, "cifar10", 1000, 0, 0),
        Overlap(A, "dtd", 10, 0, 0, checked=False, reason="there are too many training pairs"),
    ]
    places = [f"{n}.jpg: truncated" for n in range(7)]
    results = [judged(A, broken=places, undecodable=7), judged(broken=places, undecodable=7)]
    page = report(tmp_path, results, overlaps=overlaps)
    text = page.text.replace("\xa0", " ")
    assert "3 of the 1,000 images of cifar10 (0.3 %) also are among the training images of DeCLIP" in text
    assert "2 exactly and 1 nearly" in text
    assert "None of the 1,000 images of cifar10 is among the training images of CLIP." in text
    assert "CLIP, dtd: not checked: there are too many training pairs." in text
    assert len(page.all("li", "leak")) == len(page.all("p", "warning")) == 1
    assert text.count("4.jpg") == 1
    assert "5.jpg" not in text
    assert "and 2 more" in text
    assert not report(tmp_path, results, overlaps=overlaps[1:]).all("p", "warning")
