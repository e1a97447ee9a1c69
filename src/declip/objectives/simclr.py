"""Image self-supervision with negatives: SimCLR's NT-Xent (Chen et al., ICML 2020), as SLIP uses it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from declip.data.batch import Batch
from declip.model.dual_encoder import Features
from declip.model.heads import ContrastiveHead
from declip.objectives.cross_entropy import cross_entropy
from declip.ranks import ALONE, Ranks


def nt_xent(
    z1: Tensor,
    z2: Tensor,
    temperature: float = 0.1,
    candidates: tuple[Tensor, Tensor] | None = None,
    first: int = 0,
) -> Tensor:
    """The normalised, temperature-scaled cross-entropy of two views (SimCLR, eq. 1).

    z1, z2: [batch, dim], not normalised. Each of the 2 · batch vectors is an anchor; its positive is the other view of
    its image, its negatives are all candidates but its own two; mean over the anchors:

        -log exp(cos(a, p) / τ) / Σ_{c ≠ a} exp(cos(a, c) / τ)

    candidates: both views of a larger batch, [all, dim] each, in which the anchors' images stand from row `first` on
        (the batches of all processes); by default the anchors themselves.

    Memory goes with batch and not with batch²: see `cross_entropy.py`.
    """
    batch = len(z1)
    anchors = F.normalize(torch.cat([z1, z2]), dim=-1)
    others = anchors if candidates is None else F.normalize(torch.cat(candidates), dim=-1)
    rows = torch.arange(first, first + batch, device=z1.device)
    own = torch.cat([rows, rows + len(others) // 2])

    def hide(logits: Tensor, part: slice) -> None:
        logits.scatter_(1, own[part, None], float("-inf"))

    return cross_entropy(anchors / temperature, others, own.roll(batch), hide=hide)


class SimCLR(nn.Module):
    """`nt_xent` between two image views, on what a head makes of the tower's feature before its projection.

    Batch norm in the head sees one view at a time.

    views: which two image views
    """

    def __init__(self, tower_width: int, width: int, dim: int, temperature: float, views: tuple[int, int]) -> None:
        super().__init__()
        self.head = ContrastiveHead(tower_width, width, dim)
        self.temperature, self.views = temperature, views

    def forward(self, features: Features, batch: Batch) -> Tensor:
        if features.pooled_image is None:
            raise ValueError("SimCLR needs the image tower's pooled features")
        view1, view2 = features.pooled_image[list(self.views)]
        return self.loss(view1, view2, features.ranks)

    def loss(self, view1: Tensor, view2: Tensor, ranks: Ranks = ALONE) -> Tensor:
        """On tensors alone: two views' features [batch, width of the tower] each."""
        z1, z2 = self.head(view1), self.head(view2)
        if ranks.count == 1:
            return nt_xent(z1, z2, self.temperature)
        both = ranks.gather(torch.stack([z1, z2]), dim=1)
        return nt_xent(z1, z2, self.temperature, (both[0], both[1]), ranks.rank * len(z1))
