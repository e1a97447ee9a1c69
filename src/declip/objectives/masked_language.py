"""Text self-supervision: masked language modelling (BERT), DeCLIP's L_TSS."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from declip.data.batch import Batch
from declip.model.dual_encoder import Features


class MaskedLanguage(nn.Module):
    """Cross-entropy of the hidden tokens, predicted from the text tower's final tokens at their own positions.

    The head runs on hidden positions alone, about one in seven; its vocabulary is large and the rest would be unused.
    A batch in which nothing is hidden costs 0.
    """

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, vocabulary)

    def forward(self, features: Features, batch: Batch) -> Tensor:
        if features.masked_tokens is None or batch.labels is None:
            raise ValueError("masked language modelling needs the masked text view and its tokens")
        hidden = batch.labels != -100
        logits = self.head(features.masked_tokens[hidden]).float()
        total = F.cross_entropy(logits, batch.labels[hidden], reduction="sum")
        return total / hidden.sum().clamp(min=1)
