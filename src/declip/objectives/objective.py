"""The loss of a recipe: the weighted sum of its terms."""

from __future__ import annotations

from torch import Tensor, nn

from declip.data.batch import Batch
from declip.model.dual_encoder import DualEncoder, Features
from declip.model.heads import CrossModal, TextPooler, TokenMappings
from declip.objectives.contrastive import Contrastive
from declip.objectives.distillation import Distillation
from declip.objectives.masked_language import MaskedLanguage
from declip.objectives.nearest_neighbour import NearestNeighbour
from declip.objectives.own_scale import OwnScale
from declip.objectives.sigmoid import Sigmoid
from declip.objectives.simclr import SimCLR
from declip.objectives.simsiam import SimSiam
from declip.objectives.teacher_contrast import TeacherContrast
from declip.objectives.text_conditioned import TextConditioned
from declip.objectives.token_wise import TokenWise
from declip.recipe import Recipe


class Objective(nn.Module):
    """Every term by name, and their weighted sum.

    fade_from: by term from which share of the run on its weight falls to 0; `done` says where the run is.
    Raises ValueError where a weight has no term or a term no weight.
    """

    def __init__(
        self, terms: dict[str, nn.Module], weights: dict[str, float], fade_from: dict[str, float] | None = None
    ) -> None:
        super().__init__()
        if odd := sorted(terms.keys() ^ weights.keys()):
            what = "weight but no term" if odd[0] in weights else "term but no weight"
            raise ValueError(f"{odd[0]!r} has a {what}: terms are {', '.join(terms) or 'none'}")
        self.terms = nn.ModuleDict(terms)
        self.weights, self.fade_from, self.done = dict(weights), dict(fade_from or {}), 0.0

    def forward(self, features: Features, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The total, and each term by name before its weight; of one that has parts, NAME.PART too."""
        values = {name: term(features, batch) for name, term in self.terms.items()}
        total = sum((self.weight(name) * value for name, value in values.items()), features.logit_scale.new_zeros(()))
        for name, term in self.terms.items():
            values |= {f"{name}.{part}": value for part, value in getattr(term, "parts", {}).items()}
        return total, values

    def weight(self, name: str) -> float:
        """A term's weight where the run is now."""
        start = self.fade_from.get(name, 1.0)
        left = 1.0 if self.done <= start else (1.0 - self.done) / (1.0 - start)
        return self.weights[name] * left

    def clamp_logit_scale(self) -> None:
        """Keep logit scales of the terms' own in their ranges; called after each optimizer step."""
        for term in self.terms.values():
            if isinstance(term, OwnScale):
                term.clamp_logit_scale()


def build_objective(
    recipe: Recipe,
    model: DualEncoder,
    used_tokens: Tensor | None = None,
    teacher: tuple[int | None, float] = (None, 1.0),
) -> Objective:
    """The terms that a recipe asks for, with heads that fit the model's towers.

    used_tokens: int64 [used], the token ids of the training captions, for a masked language term that chooses among
    them alone.
    teacher: width and logit scale of whom a distillation term learns from; no width of the start's pooled features
    """
    active = recipe.terms.active()
    modules = {name: _build_term(name, recipe, model, used_tokens, teacher) for name in active}
    weights, fades = (
        {name: getattr(term, field) for name, term in active.items()} for field in ("weight", "fade_from")
    )
    return Objective(modules, weights, fades)


def _build_term(
    name: str, recipe: Recipe, model: DualEncoder, used_tokens: Tensor | None, teacher: tuple[int | None, float]
) -> nn.Module:
    options = getattr(recipe.terms, name)
    match name:
        case "contrastive":
            equal = options.equal_captions == "positives"
            return Contrastive(options.images, options.texts, options.multi_view, equal)
        case "sigmoid":
            return Sigmoid(options.images, options.texts, options.equal_captions == "positives", options.per)
        case "token_wise":
            mappings = TokenMappings(model.image_token_width, model.text.width, options.dim)
            scale = options.logit_scale_init, options.logit_scale_range
            return TokenWise(mappings, options.images, options.texts, options.top_k, options.mask_padding, *scale)
        case "simsiam":
            return SimSiam(model.dim, options.width, options.bottleneck, recipe.self_views)
        case "simclr":
            head = model.pooled_width, options.width, options.dim
            return SimCLR(*head, options.temperature, recipe.self_views)
        case "masked_language":
            # A mask token of our own has a row too: it stands behind the vocabulary.
            vocabulary = model.text.vocabulary + (not model.text.own_mask)
            return MaskedLanguage(model.text.width, vocabulary, used_tokens if options.vocabulary == "used" else None)
        case "nearest_neighbour":
            queue = options.queue_size, options.images, options.texts
            how = options.exclude_own, options.random_start, options.enqueue, options.queue_per_rank, options.top_k
            return NearestNeighbour(model.dim, *queue, *how)
        case "teacher_contrast":
            cross = (
                CrossModal(model.image_token_width, model.text.width, model.dim) if options.cross_attention else None
            )
            views = options.images, options.texts, options.seen_by_average
            scale = options.logit_scale_init, options.logit_scale_range
            return TeacherContrast(*views, options.weights, options.own_view, cross, options.mask_padding, *scale)
        case "text_conditioned":
            return TextConditioned(TextPooler(model.image_token_width, model.dim), options.texts)
        case "distillation":
            width, teacher_scale = teacher
            widths = None if width is None else (model.dim, width)
            return Distillation(widths, options.images, options.features, options.similarities, teacher_scale)
    raise ValueError(f"there is no term {name!r}")
