"""`declip finetune` from end to end, with tiny models."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import pair, picture, write_pairs

import declip
from declip.cli import main
from declip.recipe import Recipe, load_recipe
from declip.training.finetuning import choose
from declip.training.plan import Facts, Plan

pytestmark = pytest.mark.usefixtures("cache")

Capture = pytest.CaptureFixture[str]
SHORT = ["schedule.epochs=1", "evaluation.every=1.0", "data.workers=0", "engine.device=cpu"]


@pytest.fixture
def first(tiny: Callable[..., Recipe], tmp_path: Path) -> Path:
    """A run folder to start from."""
    declip.train(tiny("clip", "schedule.pairs_seen=8"), tmp_path / "first", quiet=True)
    return tmp_path / "first"


def folder(path: Path, count: int = 40) -> Path:
    """Pictures with a caption table whose columns no one would guess; each picture has two rows."""
    path.mkdir()
    with (path / "captions.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["datei", "satz"])
        for number in range(count):
            (path / f"{number}.png").write_bytes(picture(number))
            table.writerows([f"{number}.png", caption] for caption in pair(number)["captions"])
    return path


def finetune(*argv: Any) -> int:
    return main(["finetune", *map(str, argv)])


def answer(capsys: Capture) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def sentence(capsys: Capture) -> str:
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


def test_a_run_folder_on_pictures_beside_a_table(first: Path, tmp_path: Path, capsys: Capture) -> None:
    photos, out = folder(tmp_path / "photos"), tmp_path / "mine"
    columns = ["--image", "datei", "--captions", "satz"]
    general = ["--general", tmp_path / "pairs.parquet"]
    assert finetune(first, photos, *columns, *general, "--out", out, *SHORT, "optimizer.lr=0.02", "--json") == 0
    found = answer(capsys)
    assert found["data"]["pairs"] == 40
    assert found["data"]["captions"] == 2
    assert found["data"]["held_out"] == 4
    recipe = load_recipe(out / "recipe.toml")
    assert (recipe.optimizer.lr, recipe.data.holdout_by, recipe.schedule.batch_size) == (0.02, "picture", 4)
    assert recipe.evaluation.interpolate
    held, general_retrieval, zero_shot = found["results"]
    assert (held["data"], held["items"], held["task"]) == ("held-out pairs", 4, "retrieval")
    assert (general_retrieval["items"], zero_shot["task"]) == (40, "zero-shot")
    assert {one["metric"] for one in held["differences"]} == {"text_to_image_r1", "image_to_text_r1"}
    before = declip.evaluate(first, str(tmp_path / "pairs.parquet"), ["retrieval"])["results"][0]["metrics"]
    after = declip.evaluate(out, str(tmp_path / "pairs.parquet"), ["retrieval"])["results"][0]["metrics"]
    assert (general_retrieval["before"], general_retrieval["after"]) == (before, after)
    report = (out / "report.html").read_text("utf-8")
    assert found["report"] == str(out / "report.html")
    assert "fine-tuned − before" in report
    assert report.count('<article class="card query">') == 4
    assert "optimizer.lr" in report
    assert "rates are for 256 pairs a step" in report
    declip.load(out).encode_text(["a red cat"])


def test_two_towers_have_chance_before(first: Path, tmp_path: Path, capsys: Capture) -> None:
    """The image tower of a path with a plus in it."""
    one = tmp_path / "a+b"
    first.rename(one)
    out = tmp_path / "mine"
    assert finetune(f"{one}+{one}", tmp_path / "pairs.parquet", "--out", out, *SHORT) == 0
    printed = capsys.readouterr().out
    assert "before: chance" in printed
    assert "The plan" in printed
    recipe = load_recipe(out / "recipe.toml")
    assert recipe.model.image.init == recipe.model.text.init == str(one)
    assert recipe.optimizer.projection_lr == 1e-3
    assert recipe.data.text.pool == "turn"
    report = (out / "report.html").read_text("utf-8")
    assert "guessing" in report


def test_a_timm_file_and_a_hugging_face_folder(tmp_path: Path, pairs: Path, bert: Path, capsys: Capture) -> None:
    import timm
    from safetensors.torch import save_file

    weights = tmp_path / "resnet.safetensors"
    save_file(timm.create_model("resnet10t.c3_in1k").state_dict(), weights)
    towers = ["model.image.timm_model_name=resnet10t.c3_in1k", "model.image.image_size=32"]
    assert finetune(f"{weights}+{bert}", pairs, "--plan", "--json", *SHORT, *towers) == 0
    plan = {row["path"]: row["value"] for row in answer(capsys)["plan"]}
    assert plan["model.embed_dim"] == 512
    assert plan["model.image.image_size"] == 32


def test_chance_is_what_guessing_gives() -> None:
    import torch

    from declip.evaluation.judged import Judged
    from declip.finetune.judge import chance

    judged = Judged("m", "d", "retrieval", items=3, asked=torch.tensor([0, 0, 1, 2]))
    found = chance(judged)
    assert found["text_to_image_r1"] == pytest.approx(100 / 3)
    assert found["image_to_text_r1"] == pytest.approx(100 * (2 / 4 + 1 / 4 + 1 / 4) / 3)
    assert found["image_to_text_r5"] == found["text_to_image_r10"] == 100
    judged = Judged("m", "d", "zero-shot", items=3, choices=4, metrics={"top1": 0.0, "top5": 0.0})
    assert chance(judged) == {"top1": 25.0, "top5": 100.0}


def test_the_plan_writes_nothing(first: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    out = tmp_path / "mine"
    before = sorted(first.rglob("*"))
    asked = [first, tmp_path / "pairs.parquet", "--plan", "--minutes", "5", "--out", out, "data.workers=0"]
    assert finetune(*asked) == 0
    printed = capsys.readouterr().out
    assert "40, of which 4 judge" in printed
    assert "WiSE-FT" in printed
    assert not out.exists()
    assert not list((tmp_path / "empty").iterdir())
    assert sorted(first.rglob("*")) == before


def test_resuming_a_run_that_was_killed_or_has_ended(
    first: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from declip.training import loop

    asked = [first, tmp_path / "pairs.parquet", *SHORT, "optimizer.lr=0.02", "--json"]
    assert finetune(*asked, "--out", tmp_path / "whole") == 0
    whole = answer(capsys)
    step = loop.make_step

    def killed(run: Any) -> Any:
        made = step(run)

        def some(batch: Any) -> Any:
            if run.step == 4:
                raise KeyboardInterrupt
            return made(batch)

        return some

    out = tmp_path / "mine"
    monkeypatch.setattr(loop, "make_step", killed)
    assert finetune(*asked, "--out", out) == 130
    monkeypatch.undo()
    capsys.readouterr()
    assert not (out / "report.html").exists()
    assert finetune(*asked, "--out", out) == 2
    assert "already holds files" in sentence(capsys)
    for _ in range(2):  # where it was killed, and when it has ended
        assert finetune(*asked, "--out", out, "--resume") == 0
        found = answer(capsys)
        assert found["results"] == whole["results"]
        assert (found["plan"], found["data"]) == (whole["plan"], whole["data"])
        assert "WiSE-FT" in (out / "report.html").read_text("utf-8")
    assert finetune(*asked, "--out", out, "--resume", "optimizer.lr=0.5") == 2
    assert "trained with another recipe (optimizer.lr = 0.02 there, 0.5 now)" in sentence(capsys)
    assert finetune(tmp_path / "whole", *asked[1:], "--out", out, "--resume") == 2
    assert "started from model.init" in sentence(capsys)


def test_a_recipe_keeps_what_it_says(first: Path, recipe_file: Any, tmp_path: Path, capsys: Capture) -> None:
    recipe = recipe_file("declip")
    text = recipe.read_text().replace("[model]", "[model]\ninit = " + json.dumps(str(first)))
    towers = ("embed_dim", "image = ", "text = ")
    recipe.write_text("\n".join(line for line in text.splitlines() if not line.startswith(towers)))
    assert finetune(recipe, tmp_path / "pairs.parquet", "--plan", "--json", "data.workers=0") == 0
    paths = {row["path"] for row in answer(capsys)["plan"]}
    assert "optimizer.lr" in paths
    assert not {path for path in paths if path.startswith(("terms", "schedule.batch_size", "evaluation.every"))}
    assert finetune("declip", tmp_path / "pairs.parquet", "--plan", f"model.init={first}", "--json") == 0
    assert "schedule.batch_size" in {row["path"] for row in answer(capsys)["plan"]}


def test_with_pairs_to_judge_by_nothing_is_held_out(first: Path, tmp_path: Path, capsys: Capture) -> None:
    other = write_pairs(tmp_path / "other.parquet", [pair(number) for number in range(100, 110)])
    asked = [first, tmp_path / "pairs.parquet", "--out", tmp_path / "mine", *SHORT, f"data.validation={other}"]
    assert finetune(*asked, "--json") == 0
    found = answer(capsys)
    assert (found["training"]["training_pairs"], found["data"]["held_out"]) == (40, 10)
    assert found["results"][0]["items"] == 10
    assert "data.holdout_by" not in {row["path"] for row in found["plan"]}


def test_without_pairs_to_judge_by_it_trains_even_so(first: Path, tmp_path: Path, capsys: Capture) -> None:
    assert finetune(first, tmp_path / "pairs.parquet", "--out", tmp_path / "mine", *SHORT, "data.holdout=0") == 0
    assert "nothing was judged" in capsys.readouterr().out
    assert (tmp_path / "mine" / "report.html").is_file()


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (["{first}"], "No data was given"),
        (["{first}", "{pairs}", "--out", ""], "required: --out"),
        (["{first}", "{few}"], "There are 12 pairs, too few to learn from and to judge by: fine-tuning needs 20"),
        (["nothing-here", "{pairs}"], "There is no model 'nothing-here'"),
        (["{first}+", "{pairs}"], "names one tower alone: write IMAGE+TEXT"),
        (["{first}", "nowhere.parquet"], "nowhere.parquet"),
        (["{first}", "{pairs}", "schedule.epoch=3"], "the nearest is schedule.epochs"),
        (["{first}", "{pairs}", "model.init=x"], "says what to start from, and so does model.init"),
        (["clip", "{pairs}"], "clip starts from no weights: say model.init=…"),
        (["{first}", "{pairs}", "--general", "nosuchset"], "nosuchset"),
        (["{first}", "{pairs}", "--minutes", "5", "schedule.epochs=3"], "both say how long to train"),
        (["{first}", "{pairs}", "--minutes", "1e-6"], "leaves no time to train"),
        (["{first}", "{pairs}", "--plan", "--resume"], "leave one of them out"),
        (["{first}", "{pairs}", "--resume"], "holds no run of declip finetune to resume"),
        (["{first}", "{pairs}", "schedule.batch_size=64"], "schedule.batch_size = 64 is larger than the training set"),
        (["{first}", "{pairs}", "--image", "bild"], "bild"),
    ],
)
def test_wrong_input(asked: list[str], says: str, first: Path, tmp_path: Path, pairs: Path, capsys: Capture) -> None:
    few = write_pairs(tmp_path / "few.parquet", [pair(number) for number in range(12)])
    capsys.readouterr()
    out = tmp_path / "mine"
    argv = [one.format(first=first, pairs=pairs, few=few) for one in asked]
    if "" in argv:
        argv = argv[: argv.index("--out")]
    else:
        argv += ["--out", str(out)]
    assert finetune(*argv, "data.workers=0") == 2
    assert says in sentence(capsys)
    assert not out.exists()


def test_a_batch_that_is_too_large_for_the_memory_comes_in_pieces(
    first: Path, pairs: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("declip.finetune.prepare._small_steps", lambda recipe: (1e-3, 2.0**20, 2**21))
    assert finetune(first, pairs, "--out", tmp_path / "run", *SHORT, "--json") == 0
    assert load_recipe(tmp_path / "run" / "recipe.toml").engine.micro_batch == 1
    plan = {row["path"]: row for row in answer(capsys)["plan"]}
    assert "GB of memory, 0.00195 are free" in plan["engine.micro_batch"]["reason"]


def test_the_rules_know_whether_views_can_be_kept(first: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Facts] = []

    def noted(facts: Facts) -> Plan:
        found.append(facts)
        return choose(facts)

    monkeypatch.setattr("declip.finetune.prepare.choose", noted)
    changes = {
        "data.images.convolve=0.0": True,
        "data.images.convolve=0.5": False,
        "data.second_images.blur=0.5": False,
    }
    for change, alike in changes.items():
        found.clear()
        assert finetune(first, pairs, "--plan", change, "data.workers=0") == 0
        assert {facts.views_alike for facts in found} == {alike}
