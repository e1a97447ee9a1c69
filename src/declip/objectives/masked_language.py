"""Text self-supervision: masked language modelling (BERT), DeCLIP's L_TSS."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from declip.data.batch import Batch
from declip.model.dual_encoder import Features
from declip.objectives.cross_entropy import cross_entropy
from declip.ranks import ALONE, Ranks


class MaskedLanguage(nn.Module):
    """Cross-entropy of the hidden tokens, predicted from the text tower's final tokens at their own positions.

    The head runs on hidden positions alone, about one in seven; its vocabulary is large and the rest would be unused.
    A batch in which nothing is hidden costs 0.

    vocabulary: how many token ids there are
    used: int64 [used], the ids to choose from where not all are: a small set uses a few thousand, and the others
        would only be pushed down
    """

    index: Tensor | None

    def __init__(self, width: int, vocabulary: int, used: Tensor | None = None) -> None:
        super().__init__()
        self.head = nn.Linear(width, vocabulary if used is None else len(used))
        index = None
        if used is not None:
            index = torch.full((vocabulary,), -100)
            index[used] = torch.arange(len(used))
        self.register_buffer("index", index)

    def forward(self, features: Features, batch: Batch) -> Tensor:
        if "masked" not in features.text_tokens or batch.labels is None:
            raise ValueError("masked language modelling needs the masked text view and its tokens")
        return self.loss(features.text_tokens["masked"], batch.labels, features.ranks)

    def loss(self, tokens: Tensor, labels: Tensor, ranks: Ranks = ALONE) -> Tensor:
        """On tensors alone: the mean over hidden positions j of CE(W x_j + b, label_j).

        tokens: [batch, tokens, width]; labels: int64 [batch, tokens], -100 where nothing is hidden.
        ranks: with several the mean is over the hidden positions of all, however they are spread.
        """
        hidden = labels != -100
        rows, labels = tokens[hidden], labels[hidden]
        if self.index is not None:
            known = self.index[labels] != -100
            rows, labels = rows[known], self.index[labels[known]]
        head, each = self.head, rows.new_ones(len(rows))
        total = cross_entropy(rows, head.weight, labels, weights=each, bias=head.bias)
        return ranks.count * total / ranks.sum(hidden.sum()).clamp(min=1)
