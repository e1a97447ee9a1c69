"""One training step of the public code, term by term and gradient by gradient, on all golden files there are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from conftest import require_shared
from safetensors.torch import load_file, save_file

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "reference_parity.py"
METHODS = {"clip", "slip", "filip", "declip", "defilip"}


def run(*arguments: str) -> tuple[int, dict]:
    done = subprocess.run([sys.executable, str(SCRIPT), *arguments, "--json"], capture_output=True, text=True)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def test_every_method_equals_the_public_code() -> None:
    golden = require_shared("golden/clip_vit_seed1.json").parent
    code, found = run(str(golden), "--check")
    assert found["missed"] == []
    assert code == 0
    by_method = {Path(row["file"]).name.partition("_")[0]: row for row in found["results"]}
    assert by_method.keys() >= METHODS
    for method, row in by_method.items():
        assert max(row["terms"].values()) <= 1e-5, method
        assert row["gradients"] <= 1e-4, method
        assert (row["queue"] is not None) == (method in {"declip", "defilip"})
    assert set(by_method["defilip"]["terms"]) == {"clip", "simsiam", "mlm", "nn_text", "filip"}
    # In every method the frozen patch embedding has no gradient, in others unused heads too.
    assert all(row["gradients_absent"] >= 1 for row in by_method.values())


def test_the_check_can_fail(tmp_path: Path) -> None:
    golden = require_shared("golden/declip_vit_seed1.json")
    # With another weight of a term, the gradients are others too.
    spoilt = {
        "weight": ["total", "gradients"],
        "gradient": ["gradients"],
        "queue": ["queue"],
        "embedding": ["embeddings"],
    }
    for seed, spoil in enumerate(spoilt):
        content, tensors = json.loads(golden.read_text()), load_file(golden.with_suffix(".safetensors"))
        if spoil == "weight":
            content["weights"]["nn_text"] = 0.3
        if spoil == "gradient":
            content["grad_norms"]["logit_scale"] = None
        if spoil == "queue":
            tensors["io.nn_bank_after"][3, 61] += 0.1
        if spoil == "embedding":
            tensors["io.text_embedding"][2, 2] += 0.1 * torch.ones(())
        (tmp_path / f"declip_vit_seed{seed}.json").write_text(json.dumps(content))
        save_file(tensors, tmp_path / f"declip_vit_seed{seed}.safetensors")
    code, found = run(str(tmp_path), "--check")
    assert code == 1
    for seed, whats in enumerate(spoilt.values()):
        missed = [line for line in found["missed"] if f"declip_vit_seed{seed}" in line]
        assert len(missed) == len(whats)
        assert all(any(what in line for line in missed) for what in whats)
