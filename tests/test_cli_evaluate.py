"""`declip evaluate` from its arguments to what it prints and writes."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from colours import COLOURS, Colours, picture, write
from html_page import Page

from declip.cli import main
from declip.model import pretrained
from declip.recipe import load_recipe

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """Two run folders; the second one's model sees everything upside down."""

    class Opposite(Colours):
        def encode_image(self, images: Any, batch_size: int = 256) -> Any:
            return super().encode_image([255 - image for image in images])

    def load(spec: str) -> Colours:
        model = Opposite() if spec.endswith("opposite") else Colours()
        model.name = spec
        return model

    monkeypatch.setattr(pretrained, "load", load)
    return str(tmp_path / "runs/[mine]"), str(tmp_path / "runs/opposite")


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    rows = [{"key": f"k{n}", "image": picture(name), "caption": name, "label": name} for n, name in enumerate(COLOURS)]
    return write(tmp_path / "[a].parquet", [*rows, {**rows[0], "key": "broken", "image": b"no image"}])


def test_tables_and_remarks(models: tuple[str, str], pairs: str, capsys: Capture) -> None:
    assert main(["evaluate", models[0], pairs, "--against", models[1], "--template", "{}"]) == 0
    out = capsys.readouterr().out
    for text in (
        "retrieval (%, 95 % interval)",
        "[a].parquet",
        "text → image",
        "R@10",
        "median rank",
        "mean per class",
    ):
        assert text in out
    assert "mine]" in out  # not taken for a style
    assert "zero-shot, top-1: [mine] less opposite is +80.0" in out
    assert "unreadable images count as missed; the first: " in out


def test_json(models: tuple[str, str], pairs: str, capsys: Capture) -> None:
    argv = ["evaluate", models[0], pairs, "--task", "zero-shot", "--template", "a {}", "--json"]
    assert main(argv) == 0
    found = json.loads(capsys.readouterr().out)
    (row,) = found["results"]
    assert (found["model"], row["model"], row["data"]) == (models[0], models[0], pairs)
    assert (row["items"], row["undecodable"], row["metrics"]["top1"]) == (5, 1, 80.0)
    assert found["comparisons"] == found["overlaps"] == []


def test_files(models: tuple[str, str], pairs: str, tmp_path: Path) -> None:
    files = {ending: tmp_path / f"out.{ending}" for ending in ("html", "json", "csv", "md", "tex")}
    saved = [text for path in files.values() for text in ("--save", str(path))]
    assert main(["evaluate", models[0], pairs, "--against", models[1], "--robustness", *saved]) == 0
    page = Page(files["html"].read_text(encoding="utf-8"))
    assert "opposite" in page.source
    assert "Robustness" in page.source
    assert "http" not in "".join(str(value) for _, attributes in page.tags for value in attributes.values())
    rows = list(csv.DictReader(files["csv"].open(encoding="utf-8")))
    found = json.loads(files["json"].read_text(encoding="utf-8"))
    assert len(rows) == sum(len(row["metrics"]) for row in found["results"])
    assert {row["metric"] for row in rows} >= {"top1", "text_to_image_median_rank"}
    markdown, latex = (files[ending].read_text(encoding="utf-8") for ending in ("md", "tex"))
    assert "| **80.0 (40.0–100.0)** |" in markdown
    assert r"\textbf{80.0}" in latex
    assert latex.count(r"\begin{tabular}") == latex.count(r"\bottomrule") == 2


def test_what_was_trained_on_is_found(models: tuple[str, str], pairs: str, tmp_path: Path, capsys: Capture) -> None:
    from declip.explain import commented_toml

    other = write(tmp_path / "train.parquet", [{"image": picture("red"), "caption": "red"}] * 3)
    run = Path(models[0])
    run.mkdir(parents=True)
    (run / "recipe.toml").write_text(
        commented_toml(load_recipe("clip", [f"data.train={other}", "data.holdout=0"])), encoding="utf-8"
    )
    assert main(["evaluate", models[0], pairs, "--task", "retrieval", "--json"]) == 0
    (overlap,) = json.loads(capsys.readouterr().out)["overlaps"]
    assert (overlap["exact"], overlap["items"], overlap["examples"], overlap["checked"]) == (1, 5, ["k0"], True)
    assert main(["evaluate", models[0], pairs, "--task", "retrieval"]) == 0
    assert "1 of 5 images also are among the training pairs of [mine]" in capsys.readouterr().out
    assert main(["evaluate", models[0], pairs, "--leaks", "off", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["overlaps"] == []
    Path(other).unlink()
    assert main(["evaluate", models[0], pairs, "--task", "retrieval"]) == 0
    assert "was not compared with what [mine] was trained on: " in capsys.readouterr().out


def test_runs_on_different_parts_of_one_file_are_told_apart(
    models: tuple[str, str], pairs: str, tmp_path: Path, capsys: Capture
) -> None:
    from declip.data.sources import open_sources, take_fraction
    from declip.explain import commented_toml

    rows = [{"key": f"t{n}", "image": picture(name), "caption": name} for n, name in enumerate(list(COLOURS) * 2)]
    other = write(tmp_path / "train.parquet", rows)
    for folder, fraction in zip(models, (0.125, 1.0), strict=True):
        recipe = load_recipe("clip", [f"data.train={other}", "data.holdout=0", f"data.fraction={fraction}"])
        Path(folder).mkdir(parents=True)
        (Path(folder) / "recipe.toml").write_text(commented_toml(recipe), encoding="utf-8")
    assert len(take_fraction(open_sources([other], load_recipe("clip").data), 0.125, 0)) == 1
    assert main(["evaluate", models[0], pairs, "--against", models[1], "--task", "retrieval", "--json"]) == 0
    few, all_of_it = json.loads(capsys.readouterr().out)["overlaps"]
    assert (few["model"], all_of_it["model"]) == models
    assert (few["exact"], all_of_it["exact"]) == (1, 4)


def test_seeds_are_taken_together(models: tuple[str, str], pairs: str, tmp_path: Path, capsys: Capture) -> None:
    from declip.explain import commented_toml

    for folder, seed in zip(models, (0, 1), strict=True):
        Path(folder).mkdir(parents=True)
        recipe = load_recipe("clip", ["data.train=nowhere.parquet", f"seed={seed}"])
        (Path(folder) / "recipe.toml").write_text(commented_toml(recipe), encoding="utf-8")
    argv = ["evaluate", models[0], pairs, "--against", models[1], "--task", "zero-shot", "--template", "{}", "--json"]
    assert main([*argv, "--save", str(tmp_path / "report.html")]) == 0
    one, other, both = json.loads(capsys.readouterr().out)["results"]
    assert both["runs"] == 2
    assert both["metrics"]["top1"] == (one["metrics"]["top1"] + other["metrics"]["top1"]) / 2
    assert both["intervals"]["top1"][0] < both["metrics"]["top1"] < both["intervals"]["top1"][1]
    assert "and 1 more seeds" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_list(tmp_path: Path, capsys: Capture) -> None:
    assert main(["evaluate", "--list", "--root", str(tmp_path)]) == 0
    assert "cifar-10-batches-py" in capsys.readouterr().out
    assert main(["evaluate", "--list", "--root", str(tmp_path), "--json"]) == 0
    sets = json.loads(capsys.readouterr().out)["sets"]
    assert {"imagenet", "flickr30k", "coco"} <= {row["name"] for row in sets}
    assert all(row["found"] is None for row in sets)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "Name a model and what to judge it on"),
        (["m"], "Name a model and what to judge it on"),
        (["m", "cifra10"], "did you mean cifar10?"),
        (["m", "d.parquet", "--save", "out.pdf"], "'out.pdf' ends in none of .html, .json, .csv, .md, .tex"),
        (["m", "d.parquet", "--save", "nowhere/out.csv"], "there is no folder nowhere"),
        (["m", "d.parquet", "--shots", "1,two"], "'1,two' is no list of whole numbers above 0"),
        (["m", "d.parquet", "--robustness"], "--robustness is part of the report: say --save report.html"),
    ],
)
def test_wrong_input(argv: list[str], says: str, capsys: Capture) -> None:
    assert main(["evaluate", *argv]) == 2
    assert says in capsys.readouterr().err
