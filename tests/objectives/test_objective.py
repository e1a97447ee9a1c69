"""The weighted sum of terms, and terms that ask for what is not there."""

from __future__ import annotations

import pytest
import torch
from made import batch, features
from torch.nn import functional as F

from declip.model.dual_encoder import Features
from declip.model.heads import TokenMappings
from declip.objectives.contrastive import Contrastive
from declip.objectives.nearest_neighbour import NearestNeighbour
from declip.objectives.objective import Objective
from declip.objectives.sigmoid import Sigmoid, sigmoid_loss
from declip.objectives.simclr import SimCLR, nt_xent
from declip.objectives.token_wise import TokenWise, token_wise_infonce


def test_weighted_sum() -> None:
    made = features()
    terms = {"contrastive": Contrastive(1, ["caption"]), "other": Contrastive(2, ["augmented"])}
    total, values = Objective(terms, {"contrastive": 0.3, "other": 2.0})(made, batch())
    assert total.item() == pytest.approx(0.3 * values["contrastive"].item() + 2 * values["other"].item())


def test_a_weight_fades_in_a_line_to_the_end() -> None:
    made = features()
    terms = {"contrastive": Contrastive(1, ["caption"]), "other": Contrastive(2, ["augmented"])}
    objective = Objective(terms, {"contrastive": 1.0, "other": 0.4}, {"other": 0.5})
    weights = []
    for done in (0.0, 0.5, 0.75, 0.9, 1.0):
        objective.done = done
        total, values = objective(made, batch())
        weights.append((total - values["contrastive"]).item() / values["other"].item())
    assert weights == [pytest.approx(weight, abs=1e-6) for weight in (0.4, 0.4, 0.2, 0.08, 0.0)]


def test_parts_of_a_term_are_told_and_not_added() -> None:
    class Halves(torch.nn.Module):
        def forward(self, features: Features, batch: object) -> torch.Tensor:
            self.parts = {"one": torch.tensor(1.0), "other": torch.tensor(2.0)}
            return features.logit_scale * 0 + 3

    total, values = Objective({"halves": Halves()}, {"halves": 1.0})(features(), batch())
    assert {name: float(value) for name, value in values.items()} == {"halves": 3, "halves.one": 1, "halves.other": 2}
    assert float(total) == 3


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ({"contrastive": 1.0, "simclr": 0.2}, "'simclr' has a weight but no term: terms are contrastive"),
        ({}, "'contrastive' has a term but no weight"),
    ],
)
def test_weights_and_terms_belong_together(weights: dict[str, float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Objective({"contrastive": Contrastive(1, ["caption"])}, weights)


def with_tokens(seed: int = 0, **changes: object) -> Features:
    generator = torch.Generator().manual_seed(seed)
    made = features(seed=seed)
    tokens = {view: torch.randn(5, 4, 6, generator=generator) for view in ("caption", "masked")}
    mask = torch.arange(4) < torch.tensor([4, 2, 3, 1, 4])[:, None]
    fields = {
        "image": made.image,
        "text": made.text,
        "logit_scale": made.logit_scale,
        "logit_bias": torch.tensor(-2.0),
        "pooled_image": torch.randn(3, 5, 7, generator=generator),
        "image_tokens": torch.randn(2, 5, 3, 8, generator=generator),
        "text_tokens": tokens,
        "text_mask": dict.fromkeys(tokens, mask),
    }
    return Features(**{**fields, **changes})  # type: ignore[arg-type]


def test_sigmoid_is_the_mean_over_views() -> None:
    made = with_tokens()
    found = Sigmoid(2, ["caption", "augmented"])(made, batch())
    cells = [
        sigmoid_loss(
            F.normalize(image, dim=-1), F.normalize(made.text[view], dim=-1), made.logit_scale, made.logit_bias
        )  # type: ignore[arg-type]
        for image in made.image
        for view in ("caption", "augmented")
    ]
    assert found.item() == pytest.approx(sum(cell.item() for cell in cells) / 4, rel=1e-5)


def test_simclr_takes_its_own_views_and_sees_one_at_a_time() -> None:
    torch.manual_seed(0)
    made, term = with_tokens(), SimCLR(7, 16, 4, 0.1, (1, 2))
    assert made.pooled_image is not None
    found = term(made, batch())
    expected = nt_xent(term.head(made.pooled_image[1]), term.head(made.pooled_image[2]))
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("mask_padding", [True, False])
def test_token_wise_is_the_mean_over_views(mask_padding: bool) -> None:
    torch.manual_seed(0)
    made, mappings = with_tokens(), TokenMappings(8, 6, 5)
    term = TokenWise(mappings, 2, ["caption", "masked"], mask_padding=mask_padding, logit_scale_init=1.5)
    assert made.image_tokens is not None
    cells = []
    for view in ("caption", "masked"):
        words = F.normalize(mappings.text_mapping(made.text_tokens[view]), dim=-1)
        mask = made.text_mask[view] if mask_padding else None
        for tokens in made.image_tokens:
            patches = F.normalize(mappings.image_mapping(tokens), dim=-1)
            cells.append(token_wise_infonce(patches, words, torch.tensor(1.5).exp(), mask).item())
    assert term(made, batch()).item() == pytest.approx(sum(cells) / 4, rel=1e-5)
    assert all(parameter.grad is None for parameter in term.parameters())
    term(made, batch()).backward()
    assert all(parameter.grad is not None for parameter in term.parameters())


def test_what_stands_in_the_padding_does_not_matter() -> None:
    torch.manual_seed(0)
    term = TokenWise(TokenMappings(8, 6, 5), 1, ["caption"], top_k=2)
    made = with_tokens()
    before = term(made, batch())
    noise = torch.where(made.text_mask["caption"][..., None], made.text_tokens["caption"], 100 * torch.randn(5, 4, 6))
    torch.testing.assert_close(term(with_tokens(text_tokens={"caption": noise}), batch()), before)


def test_queue_takes_the_views_that_it_is_told() -> None:
    term = NearestNeighbour(8, 20, 1, ["caption"], enqueue=["augmented", "masked"])
    made = features()
    term(made, batch())
    expected = torch.cat([made.unit_texts([view])[0] for view in ("masked", "augmented")])
    torch.testing.assert_close(term.queue[:10], expected)


@pytest.mark.parametrize(
    ("term", "says"),
    [
        (Sigmoid(1, ["caption"]), "needs a logit bias"),
        (SimCLR(7, 8, 4, 0.1, (0, 1)), "needs the image tower's pooled features"),
        (TokenWise(TokenMappings(8, 6, 5), 1, ["caption"]), "needs the towers' tokens"),
    ],
)
def test_features_that_are_not_there(term: torch.nn.Module, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        term(features(), batch())
