"""What is fetched, and by whom; the network is a fake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import benchmark_folders as made
import huggingface_hub
import pytest
import torchvision.datasets as torchvision

from declip.errors import InputError
from declip.evaluation.datasets import download


def test_torchvision_fetches_what_it_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fetch(root: str, **options: Any) -> None:
        assert options == {"download": True, "split": "test"}
        made.pets(Path(root))

    monkeypatch.setattr(torchvision, "OxfordIIITPet", fetch)
    assert download("pets", tmp_path / "sets").folder == tmp_path / "sets/oxford-iiit-pet"
    monkeypatch.setattr(torchvision, "OxfordIIITPet", None)
    assert download("pets", tmp_path / "sets").layout == "pets"  # it is there already


def test_the_others_come_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fetch(repository: str, repo_type: str, local_dir: Path) -> None:
        assert (repository, repo_type) == ("clip-benchmark/wds_imagenet-a", "dataset")
        made.write_lines(local_dir / "test/nshards.txt", ["1"])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert download("imagenet-a", tmp_path).layout == "webdataset"


def test_what_cannot_be_fetched_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any, **options: Any) -> None:
        raise ConnectionError("no route to host\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(
        InputError, match=r"could not be downloaded to .* \(no route to host\): get it from .*objectnet"
    ):
        download("objectnet", tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **options: None)
    with pytest.raises(InputError, match="is not there: look what came"):
        download("objectnet", tmp_path)
