"""Files that look like released ones and are not: each is refused in one sentence that names the culprit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from released import HEADS, State, make_file, save, vit

import declip
from declip.cli import main
from declip.errors import InputError


def without(name: str) -> Callable[[State], None]:
    def remove(state: State) -> None:
        del state[name]

    return remove


def without_all(prefix: str) -> Callable[[State], None]:
    def remove(state: State) -> None:
        for name in [name for name in state if name.startswith(prefix)]:
            del state[name]

    return remove


def with_more(name: str) -> Callable[[State], None]:
    def add(state: State) -> None:
        state[name] = torch.zeros(3)

    return add


def other_shape(name: str) -> Callable[[State], None]:
    def change(state: State) -> None:
        state[name] = torch.zeros(5, 5)

    return change


def openai_rows(state: State) -> None:
    name = "module.encode_text.token_embedding.weight"
    state[name] = state[name][:-1]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (without("module.visual.ln_post.bias"), "missing: visual.ln_post.bias"),
        (without("module.visual.conv1.weight"), "missing: visual.conv1.weight; left over: "),
        (without("module.visual.proj"), "missing: visual.proj"),
        (without("module.logit_scale"), "missing: logit_scale"),
        (without("module.encode_text.positional_embedding"), "missing: encode_text.positional_embedding"),
        (without("module.projector.bn2.running_var"), "missing: projector.bn2.running_var"),
        (without("module.text_label_predictor.bias"), "missing: text_label_predictor.bias"),
        (without_all("module.predictor."), "missing: predictor.bn1.bias, predictor.bn1.num_batches_tracked"),
        (other_shape("module.projector.linear1.weight"), "simsiam.projector.linear1.weight has the shape [5, 5]"),
        (other_shape("module.text_label_predictor.weight"), "does not fit together"),
        (other_shape("module.visual.positional_embedding"), "does not fit together"),
        (other_shape("module.visual.conv1.weight"), "does not fit together"),
        (other_shape("module.encode_text.token_embedding.weight"), "its token_embedding has 5 rows"),
        (other_shape("module.logit_scale"), "does not fit together"),
        (with_more("module.visual.adapter.weight"), "left over: visual.adapter.weight"),
        (with_more("module.teacher.weight"), "left over: teacher.weight"),
        (with_more("module.projector.bn4.weight"), "left over: projector.bn4.weight"),
        (other_shape("module.visual.ln_post.weight"), "visual.ln_post.weight has the shape [5, 5]"),
        (openai_rows, "its token_embedding has 49408 rows, theirs has 49409"),
    ],
)
def test_other_tensors(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[State], None],
    says: str,
) -> None:
    folder = tmp_path / "converted"
    assert main(["convert", str(make_file(tmp_path, "declip", spoil)), str(folder), *HEADS]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert "Traceback" not in error
    assert not folder.exists()


class Payload:
    """What a malicious file would do when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (without("module.logit_scale_dense"), "missing: logit_scale_dense"),
        (without_all("module.image_mapping."), "missing: image_mapping.bias, image_mapping.weight"),
        (other_shape("module.image_mapping.weight"), "image_mapping.weight has the shape [5, 5]"),
    ],
)
def test_filip_with_half_its_mappings(tmp_path: Path, spoil: Callable[[State], None], says: str) -> None:
    """It would be scored by an embedding that was never trained."""
    with pytest.raises(InputError) as error:
        declip.load(make_file(tmp_path, "filip", spoil), image_heads=2, text_heads=2)
    assert says in str(error.value)


def test_no_code_is_run(tmp_path: Path) -> None:
    state, trap = vit(64, 64, 32, 64), tmp_path / "trap"
    path = save(tmp_path / "evil.pth.tar", state, note=Payload(trap))
    with pytest.raises(InputError, match="holds more than tensors: it is refused"):
        declip.load(path)
    assert not trap.exists()


def test_truncated_and_other_files(tmp_path: Path) -> None:
    whole = save(tmp_path / "whole.pth.tar", vit(64, 64, 32, 64)).read_bytes()
    for name, content in (
        ("cut.pth.tar", whole[:5000]),
        ("end.pth.tar", whole[:-2000]),
        ("empty.pth.tar", b""),
        ("text.pth.tar", b"no checkpoint at all\n" * 20),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(InputError) as error:
            declip.load(path)
        assert name in str(error.value)
        assert "is damaged or no checkpoint" in str(error.value)
        assert "\n" not in str(error.value)
    for name, state in (("list", [torch.zeros(2)]), ("words", {"model": {"a": "b"}}), ("nothing", {})):
        torch.save(state, tmp_path / name)
        with pytest.raises(InputError, match="holds no tensors by name"):
            declip.load(tmp_path / name)


def test_heads_that_do_not_fit(tmp_path: Path) -> None:
    path = make_file(tmp_path, "clip")
    with pytest.raises(
        InputError, match=r"a width of 16 is not made of heads of 64: say how many there are .* --text-heads N"
    ):
        declip.load(path)
    with pytest.raises(InputError, match="--image-heads 3 does not divide the width of 64"):
        declip.load(path, image_heads=3)


def test_bad_destinations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    declip_file, filip_file, new = make_file(tmp_path), make_file(tmp_path, "filip"), str(tmp_path / "new")
    for argv, says in (
        ([str(declip_file), str(tmp_path / "full"), *HEADS], "already holds files"),
        ([str(declip_file), new, *HEADS, "--to", "onnx"], "There is no format 'onnx'"),
        ([str(declip_file), new, *HEADS, "--to", "huggingface"], "bias"),
        ([str(filip_file), new, *HEADS, "--to", "huggingface"], "compares tokens (FILIP)"),
        (["nowhere", new], "There is no model 'nowhere'"),
    ):
        assert main(["convert", *argv]) == 2
        assert says in capsys.readouterr().err
        assert not (tmp_path / "new").exists()
