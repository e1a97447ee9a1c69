"""Text self-supervision: masked language modelling (BERT), DeCLIP's L_TSS."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from declip.data.batch import Batch
from declip.model.dual_encoder import Features
from declip.ranks import ALONE, Ranks

LOGITS = 2**24


class _LinearCrossEntropy(torch.autograd.Function):
    """Σ CE(W x + b, label) and, in the same pass over chunks of rows, its gradients: no chunk's logits are kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, chunk: int) -> Tensor:
        total = x.new_zeros(())
        gradients = [torch.zeros_like(tensor) for tensor in (x, weight, bias)]
        for rows, own, slope in zip(*(torch.split(each, chunk) for each in (x, labels, gradients[0])), strict=True):
            logits = torch.addmm(bias, rows, weight.T)
            norm = logits.logsumexp(dim=-1, keepdim=True)
            total += (norm.squeeze(1) - logits.gather(1, own[:, None]).squeeze(1)).sum()
            if not any(ctx.needs_input_grad):
                continue
            shares = logits.sub_(norm).exp_()
            shares[torch.arange(len(own), device=own.device), own] -= 1
            torch.mm(shares, weight, out=slope)
            gradients[1].addmm_(shares.T, rows)
            gradients[2] += shares.sum(dim=0)
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        return gradient * x, gradient * weight, gradient * bias, None, None


def linear_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, chunk: int | None = None) -> Tensor:
    """Σ_i CE(W x_i + b, label_i): [rows, width], [classes, width], [classes], int64 [rows] -> scalar.

    chunk: as many rows at once, by default so many that their logits take LOGITS numbers; the value is the same.
    """
    with torch.autocast(x.device.type, enabled=False):  # its own gradients need one precision throughout
        chunk = chunk or max(1, LOGITS // len(weight))
        total: Tensor = _LinearCrossEntropy.apply(x.to(weight.dtype), weight, bias, labels, chunk)
    return total


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
        total = linear_cross_entropy(rows, self.head.weight, self.head.bias, labels)
        return ranks.count * total / ranks.sum(hidden.sum()).clamp(min=1)
