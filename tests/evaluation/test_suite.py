"""Probes, comparisons, known sets, folds and what is kept between runs; on plain colours and a tiny CLIP."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import benchmark_folders
import numpy as np
import open_clip
import pytest
import torch
from colours import COLOURS, Colours, picture, write

from declip import evaluation
from declip.data.sources import open_sources
from declip.errors import InputError
from declip.evaluation import class_cache, embedding
from declip.evaluation.certainty import add_intervals, compare, same_queries
from declip.evaluation.details import Details
from declip.evaluation.embedding import embed_source
from declip.evaluation.judged import Judged
from declip.evaluation.retrieval import retrieval_metrics
from declip.evaluation.sets import TestSet, class_numbers
from declip.evaluation.suite import Asked, evaluate_models
from declip.evaluation.tasks import embed_captions, retrieval
from declip.model.class_embeddings import class_embeddings
from declip.pairs import Data


class Blind(Colours):
    """Sees no green: what is green looks black, and black like anything."""

    name = "blind"

    def encode_image(self, images: Any, batch_size: int = 256) -> np.ndarray:
        return super().encode_image([image * np.array([1, 0, 1], np.uint8) for image in images])


def shades(path: Path, count: int, labels: bool = True) -> str:
    rng = np.random.default_rng(count)
    names = list(COLOURS)
    rows = []
    for number in range(count):
        name = names[number % len(names)]
        kind = {"label": name} if labels else {"caption": f"{name} number {rng.integers(9)}"}
        rows.append({"key": f"k{number}", "image": picture(name), **kind})
    return write(path, rows)


def test_two_models_on_the_same_items(tmp_path: Path) -> None:
    path = shades(tmp_path / "t.parquet", 40)
    result = evaluation.evaluate(Colours(), path, templates=["{}"], against=[Blind()])
    seeing, blind = result["results"]
    assert (seeing["model"], blind["model"]) == ("colours", "blind")
    (comparison,) = result["comparisons"]
    assert (comparison["models"], comparison["metric"]) == (["colours", "blind"], "top1")
    assert comparison["difference"] == seeing["metrics"]["top1"] - blind["metrics"]["top1"] > 20
    low, high = comparison["interval"]
    assert 0 < low < comparison["difference"] < high
    assert comparison["p"] < 0.01
    with pytest.raises(InputError, match="The model colours is named twice"):
        evaluation.evaluate(Colours(), path, against=[Colours()])
    with pytest.raises(InputError, match="is named twice: once is enough"):
        evaluation.evaluate(Colours(), [path, path])


def test_models_that_read_different_images_are_still_asked_the_same() -> None:
    one = Judged("a", "d", "zero-shot", ranks={"class": torch.tensor([0, 1])}, asked=torch.tensor([0, 1]), choices=2)
    other = replace(one, model="b", asked=torch.tensor([1, 0]))
    assert same_queries(one, replace(one, model="b"))
    assert not same_queries(one, other)
    assert not same_queries(one, replace(one, model="b", data="other"))
    assert not same_queries(replace(one, ranks={}), replace(one, model="b", ranks={}))


def test_the_published_metric_is_compared() -> None:
    ranks = torch.tensor([0, 0, 0, 1, 0, 1])
    one = Judged("a", "d", "zero-shot", ranks={"class": ranks}, asked=torch.tensor([0, 0, 0, 0, 1, 1]), choices=2)
    other = replace(one, model="b", ranks={"class": 1 - ranks})
    (found,) = compare(one, other, "mean_per_class")
    assert (found.metric, found.difference) == ("mean_per_class", 100 * ((0.75 - 0.25) + (0.5 - 0.5)) / 2)
    (found,) = compare(one, other, "top1")
    assert found.difference == pytest.approx(100 * (4 - 2) / 6)
    add_intervals(one)
    assert one.intervals.keys() == {"top1", "top5", "mean_per_class"}


def test_linear_probe(tmp_path: Path) -> None:
    train, test = shades(tmp_path / "train.parquet", 80), shades(tmp_path / "test.parquet", 20)
    result = evaluation.evaluate(Colours(), test, ["linear-probe"], train=train, shots=[1, 2])
    few, more, full = result["results"]
    assert [row["task"] for row in result["results"]] == ["linear-probe"] * 3
    assert (few["shots"], more["shots"], few["seeds"]) == (1, 2, 3)
    low, high = few["intervals"]["top1"]
    assert low < few["metrics"]["top1"] < high or few["top1_deviation"] == 0
    assert full["learnt_from"] == 80
    assert full["metrics"]["top1"] == 100.0
    assert full["intervals"]["top1"] == [100.0, 100.0]
    assert evaluation.evaluate(Colours(), test, ["linear-probe"], train=train, shots=[1, 2]) == result
    with pytest.raises(InputError, match="nothing to learn from: give labelled pairs with --train"):
        evaluation.evaluate(Colours(), test, ["linear-probe"])


def test_a_set_of_other_classes_is_not_probed(tmp_path: Path) -> None:
    train, test = shades(tmp_path / "train.parquet", 40), shades(tmp_path / "test.parquet", 20)
    other = write(tmp_path / "other.parquet", [{"image": picture(name), "label": name + "dish"} for name in COLOURS])
    result = evaluation.evaluate(Colours(), [test, other], train=train)
    tasks = {(Path(row["data"]).stem, row["task"]) for row in result["results"]}
    assert tasks == {("test", "zero-shot"), ("test", "linear-probe"), ("other", "zero-shot")}
    assert result["notes"] == [f"{other} is not probed: {train} has none of its classes."]
    with pytest.raises(InputError, match=r"has none of the classes of .*: give labelled pairs of the same classes"):
        evaluation.evaluate(Colours(), other, ["linear-probe"], train=train)


def test_a_probe_counts_classes_and_images_that_it_cannot_know_as_wrong(tmp_path: Path) -> None:
    rows = [{"image": picture(name), "label": name} for name in ("red", "green") * 10]
    train = write(tmp_path / "train.parquet", rows)
    test = write(
        tmp_path / "test.parquet", [*rows[:2], {"image": picture("blue"), "label": "blue"}, {**rows[0], "image": b""}]
    )
    (row,) = evaluation.evaluate(Colours(), test, ["linear-probe"], train=train)["results"]
    assert (row["items"], row["undecodable"], row["metrics"]["top1"]) == (4, 1, 50.0)


def test_a_known_set(tmp_path: Path) -> None:
    benchmark_folders.cifar(tmp_path, 10)
    result = evaluation.evaluate(Colours(), "CIFAR-10", root=tmp_path)
    probe = result["results"][1]
    assert [(row["data"], row["task"], row["items"]) for row in result["results"]] == [
        ("cifar10", "zero-shot", 4),
        ("cifar10", "linear-probe", 4),
    ]
    assert probe["learnt_from"] == 20
    with pytest.raises(InputError, match="not for retrieval"):
        evaluation.evaluate(Colours(), "cifar10", ["retrieval"], root=tmp_path)
    with pytest.raises(InputError, match="did you mean cifar10"):
        evaluation.evaluate(Colours(), "cifra10", root=tmp_path)
    with pytest.raises(InputError, match="cifar-100-python"):
        evaluation.evaluate(Colours(), "cifar100", root=tmp_path)


def test_retrieval_in_folds(tmp_path: Path) -> None:
    source = open_sources([shades(tmp_path / "t.parquet", 23, labels=False)], Data())
    test = TestSet("t", source, tasks=("retrieval",), folds=3)
    model = Colours()
    embedded = embed_source(model, source, "t")
    texts = embed_captions(model, test, embedded, None)
    judged = Judged("m", "t", "retrieval")
    retrieval(test, embedded, texts, judged)
    sums = torch.zeros(6)
    for first, last in ((0, 7), (7, 15), (15, 23)):
        part = retrieval_metrics(
            embedded.images[first:last], texts.embeddings[texts.rows[first:last]], torch.arange(last - first)
        )
        sums += (last - first) * torch.tensor(list(part.values())[:6])
    torch.testing.assert_close(torch.tensor(list(judged.metrics.values())[:6]), sums / 23)
    with pytest.raises(InputError, match="judged in 24 parts"):
        retrieval(replace(test, folds=24), embedded, texts, judged)


@pytest.mark.parametrize(
    ("classes", "says"),
    [
        (["red", " "], "the name of class 1 is empty"),
        (["red", "green", "red"], r"1 class names stand for several classes \(red\)"),
        (["red", "blue"], "the label 'green' is none of the 2 classes: give"),
    ],
)
def test_classes_that_do_not_fit(classes: list[str], says: str) -> None:
    with pytest.raises(InputError, match=says):
        class_numbers(["red", "green", None], classes, "set")
    assert class_numbers(["red", "green", None], None, "set") == (["green", "red"], [1, 0, -1])


def test_embeddings_that_are_no_numbers(tmp_path: Path) -> None:
    class Broken(Colours):
        def encode_image(self, images: Any, batch_size: int = 256) -> np.ndarray:
            found = super().encode_image(images)
            found[1] = np.nan
            return found

    with pytest.raises(InputError, match=r"1 of 8 embeddings .* no numbers \(the first is number 1\)"):
        evaluation.evaluate(Broken(), shades(tmp_path / "t.parquet", 8))


@pytest.fixture(scope="module")
def tiny_clip() -> Any:
    from declip.model.pretrained import LoadedModel

    torch.manual_seed(0)
    clip = open_clip.CLIP(
        16,
        {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        {"context_length": 32, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
    ).eval()
    preprocess = open_clip.image_transform(32, is_train=False)
    return LoadedModel("tiny", clip, preprocess, open_clip.SimpleTokenizer(context_length=32))


def test_images_are_the_same_read_by_other_processes(tiny_clip: Any, tmp_path: Path) -> None:
    source = open_sources([shades(tmp_path / "t.parquet", 40)], Data(), need_captions=False)
    found = [embed_source(tiny_clip, source, "t", workers=workers) for workers in (0, 2)]
    assert torch.equal(found[0].images, found[1].images)
    assert found[0].labels == found[1].labels == [list(COLOURS)[n % 4] for n in range(40)]
    # And as open_clip prepares them.
    from declip.data.decode import decode_image

    whole = tiny_clip.encode_image([decode_image(source[n].image) for n in range(40)])
    torch.testing.assert_close(found[0].images, whole, rtol=0, atol=1e-6)


def test_large_jpegs_are_prepared_nearly_as_if_they_were_decoded_whole(tiny_clip: Any) -> None:
    import io

    from PIL import Image, ImageFilter

    noise = np.random.default_rng(0).integers(0, 256, (600, 800, 3), np.uint8)
    image = Image.fromarray(noise).filter(ImageFilter.GaussianBlur(12))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    prepared = tiny_clip.prepare(buffer.getvalue())
    whole = Image.open(buffer)
    for transform in tiny_clip.prepare.geometry:
        whole = transform(whole)
    difference = np.abs(prepared.astype(int) - np.asarray(whole).astype(int))
    assert prepared.shape == (32, 32, 3)
    assert 0 < difference.max() <= 3


def test_class_embeddings_are_open_clips(tiny_clip: Any) -> None:
    names, templates = ["red cat", "dog", "blue house"], ["a photo of a {}.", "the {} in a game"]
    theirs = open_clip.build_zero_shot_classifier(
        tiny_clip.clip, tiny_clip.tokenizer, names, [lambda name, t=t: t.format(name) for t in templates]
    )
    torch.testing.assert_close(class_embeddings(tiny_clip, names, templates), theirs.T, rtol=0, atol=1e-6)


def test_class_embeddings_are_kept(tiny_clip: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(class_cache, "_WORTH", 1)
    names, templates = ["cat", "dog"], ["a {}", "the {}"]
    first = class_cache.cached_class_embeddings(tiny_clip, names, templates, tmp_path)
    (kept,) = tmp_path.iterdir()
    monkeypatch.setattr(class_cache, "class_embeddings", lambda *_: pytest.fail("computed again"))
    assert torch.equal(class_cache.cached_class_embeddings(tiny_clip, names, templates, tmp_path), first)
    monkeypatch.setattr(class_cache, "class_embeddings", lambda *_: torch.zeros(2, 16))
    assert not class_cache.cached_class_embeddings(tiny_clip, names, ["an {}"], tmp_path).any()  # other prompts
    with torch.no_grad():
        tiny_clip.clip.text_projection.add_(1)
    assert not class_cache.cached_class_embeddings(tiny_clip, names, templates, tmp_path).any()  # other weights
    with torch.no_grad():
        tiny_clip.clip.text_projection.sub_(1)
    kept.write_bytes(b"damaged")
    assert not class_cache.cached_class_embeddings(tiny_clip, names, templates, tmp_path).any()


def test_what_a_report_shows(tmp_path: Path) -> None:
    rows = [{"image": picture(name), "label": name, "caption": f"plain {name}"} for name in list(COLOURS) * 5]
    source = open_sources([write(tmp_path / "t.parquet", rows)], Data())
    train = open_sources([shades(tmp_path / "train.parquet", 40)], Data(), need_captions=False)
    test = TestSet("t", source, train=TestSet("train", train))
    found = evaluate_models([Blind()], [test], Asked(templates=["{}"], shots=[1], details=True, robustness=True))
    assert [judged.task for judged in found.results] == ["retrieval", "zero-shot", "linear-probe", "linear-probe"]
    by_task: dict[str, Details] = {details.task: details for details in found.details}
    classified = by_task["zero-shot"]
    top1 = next(judged.metrics["top1"] for judged in found.results if judged.task == "zero-shot")
    assert sum(each.accuracy * each.items for each in classified.classes) / 20 == pytest.approx(top1)
    assert sum(each.items for each in classified.classes) == 20
    wrong = sum(each.count for each in classified.confusions)
    assert wrong == len(classified.worst) == round(20 * (1 - top1 / 100)) > 0
    assert all(example.truth != example.taken_for for example in classified.worst)
    assert all(example.truth == example.taken_for for example in classified.best)
    assert classified.calibration is not None
    assert {curve.corruption for curve in classified.robustness} >= {"gaussian_blur", "low_light"}
    assert all(curve.points[0] == (0, top1) for curve in classified.robustness)
    asked = by_task["retrieval"].retrieved
    assert {type(found.query) for found in asked} == {str, bytes}
    assert all(len(found.hits) == len(found.right) for found in asked)
    assert any(True in found.right for found in asked)
    assert by_task["retrieval"].health["matched_cosine"] > by_task["retrieval"].health["unmatched_cosine"]
    assert by_task["linear-probe"].classes


def test_few_pairs_start_no_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "read_ahead", lambda *_, **__: pytest.fail("a loader for 8 pairs"))
    evaluation.evaluate(Colours(), shades(tmp_path / "t.parquet", 8))


def test_a_folder_with_splits(tmp_path: Path) -> None:
    for split, count in (("train", 6), ("val", 3)):
        for name in COLOURS:
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):
                (tmp_path / split / name / f"{number}.png").write_bytes(picture(name))
    result = evaluation.evaluate(Colours(), str(tmp_path))
    assert [(row["task"], row["items"]) for row in result["results"]] == [("zero-shot", 12), ("linear-probe", 12)]
    assert result["results"][1]["learnt_from"] == 24
