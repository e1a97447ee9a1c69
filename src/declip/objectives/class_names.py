"""Not forgetting what a classifier knew: pictures against the names of the classes that it saw in them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from declip.data.batch import Batch
from declip.model.dual_encoder import Features
from declip.model.mixing import of_partners
from declip.ranks import ALONE, Ranks


def class_names_loss(
    images: Tensor, names: Tensor, scores: Tensor, logit_scale: Tensor, own_share: float = 1.0, ranks: Ranks = ALONE
) -> Tensor:
    """Cross-entropy of each image's softmax over the names with how likely it was each class, mean over image views.

    Learning without forgetting (Li & Hoiem 2016, arXiv:1606.09282, eq. 2) with the text tower's embeddings of the names
    in the place of the old classifier, so that what it knew is learnt by both towers.

    images: [views, batch, dim] and names: [classes, dim], normalised
    scores: [batch, classes], probabilities at the start; where they do not sum to one, the rest is of classes that take
        no part, and a row counts for so much less. NaN where the image could not be read then: it takes no part
    own_share: of each image that is its own; the rest is its partner's (`model/mixing.py`)
    """
    known = scores.isfinite().all(-1)
    wanted = scores.nan_to_num()
    if own_share != 1:
        wanted = own_share * wanted + (1 - own_share) * of_partners(wanted)
        known = known & of_partners(known)
    lost = -((logit_scale * images @ names.T).log_softmax(-1) * wanted).sum(-1)
    return (lost * known).sum(-1).mean() * ranks.count / ranks.sum(known.sum()).clamp(min=1)


class ClassNames(nn.Module):
    """`class_names_loss` over the first `images` image views."""

    def __init__(self, images: int) -> None:
        super().__init__()
        self.images = images

    def forward(self, features: Features, batch: Batch) -> Tensor:
        assert features.class_text is not None
        assert batch.class_scores is not None
        names, images = F.normalize(features.class_text, dim=-1), features.unit_image[: self.images]
        own_share = 1.0 if batch.own_share is None else batch.own_share
        return class_names_loss(images, names, batch.class_scores, features.logit_scale, own_share, features.ranks)
