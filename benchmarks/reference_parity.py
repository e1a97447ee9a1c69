"""One training step of the public DeCLIP code and ours, from the same weights: terms, gradients, queue, embeddings.

    python benchmarks/reference_parity.py DIR [DIR ...] [--json] [--check]

A DIR holds golden files: NAME.safetensors with the weights before the step (in the released files' own layout), the
batch, and what came out; NAME.json with the terms, their weights and the gradients' norms. Relative errors: of numbers
|ours - theirs| / |theirs|, of tensors the largest difference over the largest entry. Three are over a larger number,
because what they are made of cancels and leaves rounding: a bias's gradient over at least a hundredth of its weight's
(before a batch norm it is zero); a logit scale's over at least 0.01 (it is a difference between means of logits, which
are of the size of 1); SimSiam over the mean size of the cosines that it is the mean of (at random weights they have
either sign). Targets: 1e-5, gradients 1e-4.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from declip.data.batch import Batch
from declip.model.dual_encoder import DualEncoder
from declip.model.export import FinishedModel
from declip.model.image_tower import encode_image
from declip.model.released import HEADS, ROWS, convert_released
from declip.model.text_tower import encode_text
from declip.objectives.objective import Objective, build_objective
from declip.recipe import Recipe, parse_recipe

TARGETS = {"terms": 1e-5, "total": 1e-5, "gradients": 1e-4, "queue": 1e-5, "embeddings": 1e-5}
OUR_TERM = {
    "clip": "contrastive",
    "simsiam": "simsiam",
    "simclr": "simclr",
    "mlm": "masked_language",
    "nn_text": "nearest_neighbour",
    "filip": "token_wise",
}
POINTER_BEFORE = 60  # where the text queue stood before the step, in all golden files
TO_OURS = ROWS.argsort()  # the mask, start and end tokens have other ids there


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="folders with golden files")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a target is missed")
    args = parser.parse_args()
    cases = [case for folder in args.folders for case in find_cases(folder)]
    if not cases:
        parser.error(f"no golden files in {', '.join(map(str, args.folders))}")
    results = [{"file": str(case), **compare(case)} for case in cases]
    missed = [f"{row['file']}: {what}" for row in results for what in missed_targets(row)]
    if args.json:
        print(json.dumps({"targets": TARGETS, "results": results, "missed": missed}, allow_nan=False))
    else:
        print_table(results, missed)
    return 1 if args.check and missed else 0


def find_cases(folder: Path) -> list[Path]:
    """The golden files of a training step, without suffix; others (of later methods) are left alone."""
    found = []
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        if {"terms", "weights", "grad_norms"} <= content.keys() and path.with_suffix(".safetensors").is_file():
            found.append(path.with_suffix(""))
    return found


def compare(case: Path, image_heads: int | None = 2, text_heads: int | None = 2) -> dict[str, Any]:
    """Relative errors of our step against a golden file; infinite errors (a gradient too many) come out as 1e30.

    The towers of the golden files have two heads each, which no tensor's shape tells; a ResNet's has 64 a head.
    """
    expected = json.loads(case.with_suffix(".json").read_text())
    tensors = load_file(case.with_suffix(".safetensors"))
    resnet = "state.module.visual.layer1.0.conv1.weight" in tensors
    state = {k.removeprefix("state.module."): v for k, v in tensors.items() if k.startswith("state.module.")}
    finished = convert_released(state, str(case), None if resnet else image_heads, text_heads)
    recipe = golden_recipe(finished, expected["weights"], tensors)
    model, objective = load(recipe, finished, tensors)
    objective.weights = {OUR_TERM[name]: weight for name, weight in expected["weights"].items()}
    batch = make_batch(recipe, tensors)

    total, terms = objective(model(batch), batch)
    total.backward()
    gradients = gradient_errors(expected["grad_norms"], model, objective)
    floors = {"simsiam": mean_cosine(model, objective, batch)} if "simsiam" in expected["weights"] else {}
    ours = {name: terms[OUR_TERM[name]].item() for name in expected["weights"]}
    return {
        "terms": {name: _relative(ours[name], expected["terms"][name], floors.get(name, 0.0)) for name in ours},
        "total": _relative(total.item(), expected["total"]),
        "gradients": max(gradients.values()),
        "worst_gradient": max(gradients, key=lambda name: gradients[name]),
        "gradients_compared": len(gradients),
        "gradient_of": gradients,
        "gradients_absent": sum(norm is None for norm in expected["grad_norms"].values()),
        "queue": queue_error(objective, tensors),
        "embeddings": embedding_errors(model, batch, tensors),
    }


def golden_recipe(finished: FinishedModel, weights: dict[str, float], tensors: dict[str, Tensor]) -> Recipe:
    """The reference's method in our words, with heads as wide as the file's."""
    config, heads = finished.config["model_cfg"], finished.heads
    two_views, masked = "simsiam" in weights, "mlm" in weights or "filip" in weights
    texts = (["masked"] if masked else ["caption"]) + (["augmented"] if two_views else [])
    sections: dict[str, dict[str, Any]] = {"contrastive": {"images": 2 if two_views else 1, "texts": texts}}
    if "simsiam" in weights:
        bottleneck, width = heads["simsiam.predictor.linear1.weight"].shape
        sections["simsiam"] = {"width": width, "bottleneck": bottleneck}
    if "simclr" in weights:
        dim, width = heads["simclr.head.linear3.weight"].shape
        sections["simclr"] = {"width": width, "dim": dim, "temperature": 0.1}
    if "mlm" in weights:
        sections["masked_language"] = {}
    if "nn_text" in weights:
        sections["nearest_neighbour"] = {
            **{"images": 2, "texts": texts, "queue_size": tensors["io.nn_bank_before"].shape[1]},
            **{"exclude_own": False, "random_start": True},
        }
    if "filip" in weights:
        dim = heads["token_wise.mappings.image_mapping.weight"].shape[0]
        sections["token_wise"] = {"texts": ["masked"], "dim": dim, "top_k": 16, "mask_padding": False}
    model = {
        "embed_dim": config["embed_dim"],
        "image": config["vision_cfg"],
        "text": config["text_cfg"],
        "quick_gelu": True,
        "freeze_patch_embedding": True,
        "views_apart": True,
        # SLIP and FILIP do not cap the factor; at these weights it is far below the cap anyway.
        "logit_scale_cap": 100.0,
    }
    data = {"strong_images": {}} if "simclr" in weights else {}
    return parse_recipe({"model": model, "terms": sections, "data": data})


def load(recipe: Recipe, finished: FinishedModel, tensors: dict[str, Tensor]) -> tuple[DualEncoder, Objective]:
    """Our modules with the file's weights, in training mode."""
    model = DualEncoder(recipe)
    objective = build_objective(recipe, model)
    model.clip.load_state_dict(finished.weights, strict=True)
    if model.mask_embedding is not None:
        model.mask_embedding.data.copy_(finished.heads["mask_embedding"])
    for name, term in objective.terms.items():
        own = finished.head(name)
        if name == "nearest_neighbour":
            term.queue.copy_(tensors["io.nn_bank_before"].T)
            term.pointer.fill_(POINTER_BEFORE)
        elif own:
            term.load_state_dict(own, strict=True)
    return model.train(), objective.train()


def make_batch(recipe: Recipe, tensors: dict[str, Tensor]) -> Batch:
    """The file's batch in our layout and our ids."""
    views = recipe.image_views
    images = tensors["io.images"].unflatten(1, (-1, 3))[:, :views].permute(1, 0, 3, 4, 2).contiguous()
    names = recipe.text_views
    tokens = [TO_OURS[tensors["io.tokens_1" if name == "augmented" else "io.tokens_0"]] for name in names]
    labels = tensors.get("io.labels_0")
    if labels is not None:
        labels = torch.where(labels == -100, labels, TO_OURS[labels.clamp(min=0)])
    return Batch(images, torch.stack(tokens), tuple(names), labels, torch.arange(images.shape[1]))


@torch.no_grad()
def mean_cosine(model: DualEncoder, objective: Objective, batch: Batch) -> float:
    """The mean size of the cosines between SimSiam's predictions and projections."""
    term = objective.terms["simsiam"]
    z1, z2 = (term.projector(model(batch).image[view]) for view in term.views)
    cosines = [nn.functional.cosine_similarity(term.predictor(a), b) for a, b in ((z1, z2), (z2, z1))]
    return float(torch.cat(cosines).abs().mean())


def gradient_errors(norms: dict[str, float | None], model: DualEncoder, objective: Objective) -> dict[str, float]:
    """By the reference's names. No gradient here means: no gradient reaches it, or we have no such parameter."""
    text = "text_encoder." if any(name.startswith("text_encoder.") for name in norms) else "encode_text."
    ours = _by_their_names(model, objective, text)
    errors = {}
    for name, norm in norms.items():
        found = [p.grad.norm() for p in ours.pop(name, []) if p.grad is not None]
        if norm is None:
            errors[name] = 1e30 if found else 0.0
        elif not found:
            errors[name] = 1e30
        else:
            weight = norms.get(name.removesuffix("bias") + "weight") if name.endswith("bias") else 0.0
            floor = 0.01 * (1.0 if name.startswith("logit_scale") else weight or 0.0)
            errors[name] = _relative(float(torch.stack(found).norm()), norm, floor)
    errors.update(dict.fromkeys(ours, 1e30))  # a parameter that the reference does not have
    return errors


def _by_their_names(model: DualEncoder, objective: Objective, text: str) -> dict[str, list[nn.Parameter]]:
    named: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.clip.named_parameters():
        named[name if name.startswith("visual.") or name == "logit_scale" else text + name] = [parameter]
    if model.mask_embedding is not None:
        named[f"{text}token_embedding.weight"].append(model.mask_embedding)
    for name, parameter in objective.terms.named_parameters():
        theirs = next(theirs + name.removeprefix(ours) for theirs, ours in HEADS.items() if name.startswith(ours))
        named[theirs] = [parameter]
    return named


def queue_error(objective: Objective, tensors: dict[str, Tensor]) -> float | None:
    """Of the queue's rows and its pointer after the step; None where the method has no queue."""
    if "io.nn_bank_after" not in tensors:
        return None
    term = objective.terms["nearest_neighbour"]
    if int(term.pointer) != int(tensors["io.nn_bank_ptr_after"]):
        return 1e30
    return _largest(term.queue.T, tensors["io.nn_bank_after"])


@torch.no_grad()
def embedding_errors(model: DualEncoder, batch: Batch, tensors: dict[str, Tensor]) -> float:
    """Of the embeddings in evaluation mode, after the step's batch-norm updates."""
    model.eval()
    errors = []
    for view, images in enumerate(batch.images):
        found = encode_image(model.clip, model.pixels(images)).embedding
        errors.append(_largest(found, tensors[f"io.image_embedding_{view}"]))
    tokens = TO_OURS[tensors["io.text_tokens_eval"]]
    errors.append(_largest(encode_text(model.clip, tokens).embedding, tensors["io.text_embedding"]))
    return max(errors)


def _relative(found: float, expected: float, floor: float = 0.0) -> float:
    scale = max(abs(expected), floor)
    if scale == 0:
        return 0.0 if found == 0 else 1e30
    return min(abs(found - expected) / scale, 1e30) if math.isfinite(found) else 1e30


def _largest(found: Tensor, expected: Tensor) -> float:
    return _relative(float((found.detach() - expected).abs().max() / expected.abs().max()), 0.0, floor=1.0)


def missed_targets(row: dict[str, Any]) -> list[str]:
    """Which of a file's errors lie above their target."""
    errors = {f"term {name}": (error, TARGETS["terms"]) for name, error in row["terms"].items()}
    errors |= {what: (row[what], TARGETS[what]) for what in ("total", "gradients", "queue", "embeddings")}
    return [f"{what} {error:.1e}" for what, (error, target) in errors.items() if error is not None and error > target]


def print_table(results: list[dict[str, Any]], missed: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Largest relative error against the public code, float32", title_justify="left")
    for heading in ("file", "terms", "total", "gradients", "of", "queue", "embeddings"):
        table.add_column(heading)
    for row in results:
        terms = "\n".join(f"{name} {error:.1e}" for name, error in row["terms"].items())
        queue = "-" if row["queue"] is None else f"{row['queue']:.1e}"
        compared = f"{row['gradients_compared']} ({row['gradients_absent']} none)"
        gradients = f"{row['gradients']:.1e}\n{row['worst_gradient']}"
        table.add_row(
            Path(row["file"]).name, terms, f"{row['total']:.1e}", gradients, compared, queue, f"{row['embeddings']:.1e}"
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    print("\n".join(f"MISSED {what}" for what in missed) or f"All within {TARGETS}.")


if __name__ == "__main__":
    sys.exit(main())
