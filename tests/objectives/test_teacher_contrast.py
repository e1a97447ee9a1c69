"""The contrast with a moving average of the weights: beside plain loops, and beside COSMOS's public code."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from conftest import require_shared
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from declip.data.batch import Batch
from declip.model.dual_encoder import Features
from declip.model.heads import CrossModal
from declip.model.image_tower import encode_image
from declip.model.text_tower import caption_mask, encode_text
from declip.objectives.contrastive import multi_view_infonce
from declip.objectives.teacher_contrast import PARTS, TeacherContrast, contrast
from declip.training.average import WeightAverage

TEXTS = ("joined", "joined_2", "single", "single_2")


def vectors(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive(views: Tensor, targets: Tensor, scale: float, without: set[tuple[int, int]] = frozenset()) -> Tensor:  # type: ignore[assignment]
    """One number at a time."""
    cells = []
    for v in range(len(views)):
        for u in range(len(targets)):
            if (v, u) in without:
                continue
            losses = []
            for i in range(views.shape[1]):
                row = torch.stack([scale * views[v, i] @ targets[u, j] for j in range(views.shape[1])])
                column = torch.stack([scale * views[v, j] @ targets[u, i] for j in range(views.shape[1])])
                losses.append((row.logsumexp(0) - row[i] + column.logsumexp(0) - column[i]) / 2)
            cells.append(torch.stack(losses).mean())
    return torch.stack(cells).mean()


@pytest.mark.parametrize("without", [set(), {(0, 0), (1, 1)}, {(2, 0)}])
def test_contrast_beside_loops(without: set[tuple[int, int]]) -> None:
    views = F.normalize(vectors(3, 4, 8), dim=-1).requires_grad_()
    targets, scale = F.normalize(vectors(2, 4, 8, seed=1), dim=-1), torch.tensor(5.0, dtype=torch.float64)
    found, expected = contrast(views, targets, scale, without=without), naive(views, targets, 5.0, without)
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(loss, views, retain_graph=True)[0] for loss in (found, expected)]
    torch.testing.assert_close(*grads)


def batch_of(rows: int) -> Batch:
    empty = torch.empty(len(TEXTS), rows, 0, dtype=torch.int64)
    return Batch(torch.empty(2, rows, 1, 1, 3), empty, TEXTS, None, torch.arange(rows))


def features_of(rows: int, **more: Any) -> Features:
    return Features(
        image=vectors(2, rows, 16, seed=1),
        text={view: vectors(rows, 16, seed=10 + number) for number, view in enumerate(TEXTS)},
        logit_scale=torch.ones((), dtype=torch.float64),
        local_image=vectors(3, rows, 16, seed=2),
        teacher_image=F.normalize(vectors(2, rows, 16, seed=3), dim=-1),
        teacher_text=F.normalize(vectors(2, rows, 16, seed=4), dim=-1),
        **more,
    )


@pytest.mark.parametrize("own_view", [True, False])
def test_the_term_is_the_weighted_sum_of_its_parts(own_view: bool) -> None:
    features, weights = features_of(5), (0.4, 0.3, 0.2, 0.1)
    term = TeacherContrast(2, TEXTS, ("joined_2", "single"), weights, own_view).double()
    images = F.normalize(torch.cat([features.image, features.local_image]), dim=-1)  # type: ignore[list-item]
    texts = F.normalize(torch.stack([features.text[view] for view in TEXTS]), dim=-1)
    scale = float(term.logit_scale.exp())
    both = {"image": (images, features.teacher_image), "text": (texts, features.teacher_text)}
    same = {"image_to_image": {(0, 0), (1, 1)}, "text_to_text": {(1, 0), (2, 1)}}
    expected = {}
    for part in PARTS:
        of, to = part.split("_to_")
        expected[part] = naive(both[of][0], both[to][1], scale, set() if own_view else same.get(part, set()))  # type: ignore[arg-type]
    found = term(features, batch_of(5))
    torch.testing.assert_close(found, sum(w * expected[part] for w, part in zip(weights, PARTS, strict=True)))
    assert term.parts.keys() == set(PARTS)
    for part in PARTS:
        torch.testing.assert_close(term.parts[part], expected[part])


def test_what_weighs_nothing_is_not_computed() -> None:
    term = TeacherContrast(2, TEXTS, TEXTS[:2]).double()
    term(features_of(4), batch_of(4))
    assert term.parts.keys() == {"image_to_image", "text_to_text"}


def test_padding_is_not_looked_at() -> None:
    tokens = {"joined": vectors(4, 6, 12, seed=5)}
    mask = {"joined": torch.arange(6)[None] < torch.tensor([2, 6, 3, 4])[:, None]}
    spoilt = {"joined": torch.where(mask["joined"][..., None], tokens["joined"], 99.0)}
    patches = vectors(2, 4, 9, 20, seed=6)
    torch.manual_seed(0)
    cross = CrossModal(20, 12, 16)

    def loss(words: dict[str, Tensor], masked: bool) -> Tensor:
        term = TeacherContrast(2, TEXTS, TEXTS[:2], [0.25] * 4, cross=cross, mask_padding=masked).double()
        return term(features_of(4, image_tokens=patches, text_tokens=words, text_mask=mask), batch_of(4))  # type: ignore[no-any-return]

    torch.testing.assert_close(loss(tokens, True), loss(spoilt, True))
    assert not torch.allclose(loss(tokens, False), loss(spoilt, False))


def test_queries_do_not_see_one_another() -> None:
    """All views at once find what each finds alone."""
    torch.manual_seed(0)
    pool = CrossModal(8, 8, 16).double().from_text
    queries, tokens = vectors(3, 4, 16), vectors(4, 5, 16, seed=1)
    together = pool(queries, tokens)
    for view in range(3):
        torch.testing.assert_close(pool(queries[view : view + 1], tokens)[0], together[view])


# COSMOS's public code, in float64

_POOLS = {"text_attn_cross_pool.": "from_text.", "visual.attn_cross_pool.": "from_image."}
_MAPPINGS = {"image_token_mapping.": "image_mapping.", "text_token_mapping.": "text_mapping."}


class Golden:
    """Towers by open_clip and our term, with the weights of the file."""

    def __init__(self, whose: str) -> None:
        from open_clip import CLIP

        path = require_shared("golden/cosmos.json")
        self.expected, self.tensors = json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))
        config = self.expected["config"]
        vision = {
            name: config["vision"][name] for name in ("image_size", "layers", "width", "head_width", "patch_size")
        }
        text = {name: config["text"][name] for name in ("context_length", "vocab_size", "width", "heads", "layers")}
        self.clip: Any = CLIP(config["embed_dim"], {**vision, "pool_type": "tok"}, text).double()
        cross = CrossModal(vision["width"], text["width"], config["embed_dim"])
        self.views = tuple(f"view{n}" for n in range(config["global_captions"] + config["local_captions"]))
        self.term = TeacherContrast(2, self.views, self.views[:2], [0.25] * 4, cross=cross, mask_padding=False).double()
        self.names = {}  # of our parameters, by the public code's
        for key in self.tensors:
            if key.startswith("student."):
                name = key.removeprefix("student.")
                self.names[name] = self._ours(name)
        own = dict(self.named_parameters())
        with torch.no_grad():
            for theirs, ours in self.names.items():
                own[ours].copy_(self.tensors[f"{whose}.{theirs}"])
        assert own.keys() == set(self.names.values())

    @staticmethod
    def _ours(name: str) -> str:
        if name == "distill_logit_scale":
            return "term.logit_scale"
        for theirs, ours in {**_POOLS, **_MAPPINGS}.items():
            if name.startswith(theirs):
                return f"term.cross.{ours}{name.removeprefix(theirs)}"
        return f"clip.{name}"

    def named_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [
            *((f"clip.{name}", parameter) for name, parameter in self.clip.named_parameters()),
            *((f"term.{name}", parameter) for name, parameter in self.term.named_parameters()),
        ]

    def images(self, which: str, count: int) -> list[Any]:
        pixels = [self.tensors[f"in.image_{which}{number}"].double() for number in range(count)]
        return [encode_image(self.clip, some, normed_tokens=True, any_size=True) for some in pixels]

    def texts(self, count: int) -> list[Any]:
        ids = self.tensors["in.texts"].long()
        return [encode_text(self.clip, ids[:, number], whole=True) for number in range(count)]


def test_cosmos_is_its_public_code() -> None:
    """Losses, their parts, embeddings and all 83 gradients; asked for: 1e-5."""
    student, teacher = Golden("student"), Golden("teacher")
    expected, ids = student.expected, student.tensors["in.texts"].long()
    seen, local, texts = student.images("global", 2), student.images("local", 3), student.texts(6)
    with torch.no_grad():
        taught = [
            torch.stack([each.embedding for each in own]) for own in (teacher.images("global", 2), teacher.texts(2))
        ]
    features = Features(
        image=torch.stack([each.embedding for each in seen]),
        text={view: each.embedding for view, each in zip(student.views, texts, strict=True)},
        logit_scale=student.clip.logit_scale.exp(),
        image_tokens=torch.stack([each.tokens for each in seen]),
        text_tokens={student.views[0]: texts[0].tokens},
        text_mask={student.views[0]: caption_mask(ids[:, 0])},
        local_image=torch.stack([each.embedding for each in local]),
        teacher_image=F.normalize(taught[0], dim=-1),
        teacher_text=F.normalize(taught[1], dim=-1),
    )
    empty = torch.empty(len(student.views), 5, 0, dtype=torch.int64)
    batch = Batch(torch.empty(2, 5, 1, 1, 3), empty, student.views, None, torch.arange(5))
    clip = multi_view_infonce(
        F.normalize(features.image, dim=-1),
        F.normalize(torch.stack(list(features.text.values())), dim=-1),
        features.logit_scale,
    )
    distilled = student.term(features, batch)
    assert float(clip) == pytest.approx(expected["loss"]["clip_loss"], rel=1e-6)
    assert float(distilled) == pytest.approx(expected["loss"]["distill_loss"], rel=1e-6)
    theirs = ("img_cross_to_t_image", "img_cross_to_t_text", "txt_cross_to_t_image", "txt_cross_to_t_text")
    for part, name in zip(PARTS, theirs, strict=True):
        assert float(student.term.parts[part]) == pytest.approx(
            expected["distill_sub_terms_mean_of_four"][name], rel=1e-6
        )
    images = F.normalize(torch.cat([features.image, features.local_image]), dim=-1).flatten(0, 1)  # type: ignore[list-item]
    torch.testing.assert_close(images, student.tensors["out.student.image_features"], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(
        features.teacher_image.flatten(0, 1),  # type: ignore[union-attr]
        student.tensors["out.teacher.image_features"],
        rtol=1e-6,
        atol=1e-7,
    )
    (clip + distilled).backward()
    own = dict(student.named_parameters())
    for name, ours in student.names.items():
        gradient, wanted = own[ours].grad, student.tensors[f"grad.{name}"].double()
        assert gradient is not None, name
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-7 * float(wanted.norm()) + 1e-12, msg=name)


def test_the_average_moves_as_the_public_codes_does() -> None:
    student, teacher = Golden("student"), Golden("teacher")
    moved = student.expected["ema"]
    average = WeightAverage([parameter for _, parameter in student.named_parameters()], moved["momentum"], warm=False)
    places = {name: place for place, (name, _) in enumerate(student.named_parameters())}
    for name, parameter in teacher.named_parameters():
        average.average[places[name]].copy_(parameter.detach())
    average.update()
    for theirs, ours in student.names.items():
        norm = float(average.average[places[ours]].norm())
        assert norm == pytest.approx(moved["teacher_param_norm_after"][theirs], rel=1e-6), theirs
