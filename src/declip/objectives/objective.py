"""The loss of a recipe: the weighted sum of its terms."""

from __future__ import annotations

from torch import Tensor, nn

from declip.data.batch import Batch
from declip.model.dual_encoder import DualEncoder, Features
from declip.objectives.contrastive import Contrastive
from declip.objectives.masked_language import MaskedLanguage
from declip.objectives.nearest_neighbour import NearestNeighbour
from declip.objectives.simsiam import SimSiam
from declip.recipe import Recipe


class Objective(nn.Module):
    """Every term by name, and their weighted sum."""

    def __init__(self, terms: dict[str, nn.Module], weights: dict[str, float]) -> None:
        super().__init__()
        self.terms = nn.ModuleDict(terms)
        self.weights = dict(weights)

    def forward(self, features: Features, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The total, and each term by name before its weight."""
        values = {name: term(features, batch) for name, term in self.terms.items()}
        total = sum((self.weights[name] * value for name, value in values.items()), features.logit_scale.new_zeros(()))
        return total, values


def build_objective(recipe: Recipe, model: DualEncoder, used_tokens: Tensor | None = None) -> Objective:
    """The terms that a recipe asks for, with heads that fit the model's towers.

    used_tokens: int64 [used], the token ids of the training captions, for a masked language term that chooses among
    them alone.
    """
    asked = recipe.terms
    projection = model.clip.text_projection
    dim = projection.out_features if isinstance(projection, nn.Linear) else projection.shape[-1]
    width, vocabulary = model.clip.token_embedding.embedding_dim, model.clip.vocab_size
    terms: dict[str, nn.Module] = {}
    if asked.contrastive:
        terms["contrastive"] = Contrastive(asked.contrastive.images, asked.contrastive.texts)
    if asked.simsiam:
        terms["simsiam"] = SimSiam(dim, asked.simsiam.width, asked.simsiam.bottleneck)
    if asked.masked_language:
        used = used_tokens if asked.masked_language.vocabulary == "used" else None
        terms["masked_language"] = MaskedLanguage(width, vocabulary + 1, used)  # the mask token has a row too
    if asked.nearest_neighbour:
        neighbour = asked.nearest_neighbour
        terms["nearest_neighbour"] = NearestNeighbour(
            dim, neighbour.queue_size, neighbour.images, neighbour.texts, neighbour.exclude_own, neighbour.random_start
        )
    active = recipe.terms.active()
    return Objective(
        {name: term for name, term in terms.items() if name in active},
        {name: term.weight for name, term in active.items()},  # type: ignore[attr-defined]
    )
