"""Image self-supervision: SimSiam (Chen & He, CVPR 2021), DeCLIP's L_ISS."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from declip.data.batch import Batch
from declip.model.dual_encoder import Features
from declip.model.heads import Predictor, Projector


def negative_cosine(prediction: Tensor, target: Tensor) -> Tensor:
    """-cos(prediction, stop-gradient(target)), mean over the batch. [batch, width] each -> scalar in [-1, 1]."""
    return -F.cosine_similarity(prediction, target.detach(), dim=-1).mean()


class SimSiam(nn.Module):
    """Each view's prediction against the other view's projection: 1/2 [D(p1, z2) + D(p2, z1)].

    Works on the joint-space embeddings before they are normalised. Batch norm sees one view at a time.

    views: which two image views
    """

    def __init__(self, dim: int, width: int, bottleneck: int, views: tuple[int, int] = (0, 1)) -> None:
        super().__init__()
        self.views = views
        self.projector = Projector(dim, width)
        self.predictor = Predictor(width, bottleneck)

    def forward(self, features: Features, batch: Batch) -> Tensor:
        return self.loss(*features.image[list(self.views)])

    def loss(self, view1: Tensor, view2: Tensor) -> Tensor:
        """On tensors alone: two views' embeddings [batch, dim] each, not normalised."""
        z1, z2 = self.projector(view1), self.projector(view2)
        p1, p2 = self.predictor(z1), self.predictor(z2)
        return (negative_cosine(p1, z2) + negative_cosine(p2, z1)) / 2
