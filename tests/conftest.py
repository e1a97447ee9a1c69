"""Fixtures that several tests use."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from declip.data.sources import Source
from declip.recipe import Recipe, load_recipe

SHARED = Path(__file__).parents[2] / "shared"
WORDS = ("red", "green", "blue", "cat", "dog", "bird", "fish", "tree", "house", "cloud")

# The towers here are so small that threads, also those of the programs that tests start, only wait for one another.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


def require_shared(path: str) -> Path:
    """A file of ../shared; the test skips without it, unless DECLIP_REQUIRE_SHARED=1 makes that a failure."""
    found = SHARED / path
    if not found.exists():
        if os.environ.get("DECLIP_REQUIRE_SHARED") == "1":
            pytest.fail(f"DECLIP_REQUIRE_SHARED=1, but there is no {path} in ../shared")
        pytest.skip(f"needs {path} from ../shared")
    return found


def picture(number: int) -> bytes:
    """A PNG, another one for each number; the last digit is its colour."""
    colour = np.random.default_rng(number % 10).integers(0, 200, 3)
    pixels = colour + np.random.default_rng(number).integers(0, 56, (20, 24, 3))
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def pair(number: int) -> dict[str, Any]:
    """A row with a picture, two captions and a label."""
    one, other = WORDS[number % len(WORDS)], WORDS[number * 3 % 7]
    captions = [f"a {one} and a {other}", f"{one} number {number} of some"]
    return {"key": f"k{number}", "image": picture(number), "captions": captions, "label": one}


def write_pairs(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def write_one_broken(path: Path) -> Path:
    """40 pairs, one of them broken."""
    rows = [pair(number) for number in range(40)]
    rows[7]["image"] = b"no image"
    return write_pairs(path, rows)


def parquet(path: Path, **columns: Any) -> str:
    pq.write_table(pa.table(columns), path, row_group_size=2)
    return str(path)


def numbered(path: Path, count: int, first: int = 0) -> str:
    """A parquet file of pairs with keys k0, k1, …"""
    numbers = range(first, first + count)
    return parquet(
        path, key=[f"k{n}" for n in numbers], image=[b"%d" % n for n in numbers], caption=[f"text {n}" for n in numbers]
    )


def keys(source: Source) -> list[str]:
    return [source.key(i) for i in range(len(source))]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """40 pairs."""
    return write_pairs(tmp_path / "pairs.parquet", [pair(number) for number in range(40)])


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own, in which declip's is made."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


TINY = """
[data]
workers = 0
holdout = 0.2

[model]
embed_dim = 16
image = { image_size = 16, layers = 1, width = 32, head_width = 32, patch_size = 8 }
text = { context_length = 77, layers = 1, width = 8, heads = 1 }

[schedule]
batch_size = 8
pairs_seen = 64

[evaluation]
every = 0.25

[engine]
device = "cpu"
precision = "float32"
"""
TERMS = {
    "clip": "[terms.contrastive]",
    "declip": """
[data.images]
crop_scale = [0.2, 1.0]
jitter = 0.8
grayscale = 0.2
blur = 0.5
flip = 0.5

[terms.contrastive]
images = 2
texts = ["caption", "augmented"]

[terms.simsiam]
width = 32
bottleneck = 16

[terms.masked_language]

[terms.nearest_neighbour]
queue_size = 20
""",
}


@pytest.fixture
def recipe_file(tmp_path: Path) -> Callable[..., Path]:
    """A recipe of tiny towers in a file, with the terms of CLIP or DeCLIP; it names no data."""

    def write(method: str = "clip") -> Path:
        path = tmp_path / f"tiny_{method}.toml"
        path.write_text(f'name = "{method}"\n{TINY}\n{TERMS[method]}\n')
        return path

    return write


@pytest.fixture
def tiny(pairs: Path, recipe_file: Callable[..., Path]) -> Callable[..., Recipe]:
    """That recipe on the 40 pairs: 32 to train on, 8 held out, 8 steps; with overrides."""

    def make(method: str = "clip", *overrides: str) -> Recipe:
        return load_recipe(recipe_file(method), [f"data.train={str(pairs)!r}", *overrides])

    return make


VOCABULARY = [
    "a",
    "red",
    "green",
    "blue",
    "cat",
    "dog",
    "bird",
    "fish",
    "tree",
    "house",
    "cloud",
    "and",
    "number",
    "of",
]
VOCABULARY += ["some", "photo"]


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with random weights and a tokenizer of a few words, as a folder."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("bert")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *VOCABULARY, *"0123456789"]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    tokenizer = transformers.BertTokenizerFast(vocab={word: i for i, word in enumerate(vocabulary)})
    tokenizer.save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    return folder


CLASSES = ("red", "green", "blue", "circle")


@pytest.fixture(scope="session")
def four_classes(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that name two towers: a timm network that tells four classes apart, whose names it has, and a BERT."""
    timm = pytest.importorskip("timm")
    folder, network = tmp_path_factory.mktemp("classes"), "resnet10t.c3_in1k"
    torch.manual_seed(0)
    save_file(timm.create_model(network, num_classes=len(CLASSES)).state_dict(), folder / "network.safetensors")
    (folder / "names.txt").write_text("\n".join(CLASSES))
    return [
        f"model.image.timm_model_name={network}",
        f"model.image.init={str(folder / 'network.safetensors')!r}",
        f"model.image.classes={str(folder / 'names.txt')!r}",
        f"model.text.init={str(bert)!r}",
        "model.image.image_size=64",
        "model.embed_dim=48",
    ]
