"""The processes that share each batch: which one this is, and how tensors of all of them meet, with exact gradients.

Each rank has an equal part of every global batch and computes a loss on its own rows. The convention everywhere is that
**the mean of the ranks' losses is the loss of the global batch**. `Ranks.gather` sends gradients back to where the rows
came from, summed over the ranks that used them, so the mean over the ranks of each parameter's gradient, which is what
DistributedDataParallel takes, is the gradient of the global loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

# PyTorch has renamed them.
all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class _Gather(torch.autograd.Function):
    """[*shape] -> [ranks, *shape]; backward sums over ranks what each computed for this rank's rows."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, count: int, rank: int) -> Tensor:
        ctx.rank = rank
        everything = part.new_empty((count * len(part), *part.shape[1:]))
        all_gather(everything, part.contiguous())
        return everything.view(count, *part.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        gradient = gradient.contiguous()
        if gradient.device.type == "cuda":
            own = torch.empty_like(gradient[0])
            _reduce_scatter(own, gradient)
            return own, None, None
        # gloo cannot reduce and scatter; its all-to-all is faster, but now and then a rank aborted with it.
        dist.all_reduce(gradient)
        return gradient[ctx.rank], None, None


@dataclass(frozen=True)
class Ranks:
    """This process among `count`; with one, everything here gives back what it is given."""

    rank: int = 0
    count: int = 1

    def gather(self, part: Tensor, dim: int = 0) -> Tensor:
        """The equal parts of all ranks one after the other along `dim`; gradients find their way back."""
        if self.count == 1:
            return part
        if part.dtype == torch.bool:
            return self.gather(part.byte(), dim).bool()
        everything: Tensor = _Gather.apply(part, self.count, self.rank)
        return everything.movedim(0, dim).flatten(dim, dim + 1)

    def gather_padded(self, part: Tensor) -> Tensor:
        """As `gather` along the first dimension, where the ranks' second ones differ: filled up with zeros."""
        if self.count == 1:
            return part
        longest = torch.tensor(part.shape[1], device=part.device)
        dist.all_reduce(longest, dist.ReduceOp.MAX)
        missing = int(longest) - part.shape[1]
        return self.gather(F.pad(part, (0, 0) * (part.ndim - 2) + (0, missing)))

    def pass_on(self, tensor: Tensor, tag: int = 0) -> Callable[[], Tensor]:
        """Send a tensor to the next rank of a ring, without a gradient; gives what waits for the previous rank's."""
        taken, around = torch.empty_like(tensor), self.count
        ends = ((dist.isend, tensor, (self.rank + 1) % around), (dist.irecv, taken, (self.rank - 1) % around))
        works = dist.batch_isend_irecv([dist.P2POp(way, part, other, tag=tag) for way, part, other in ends])

        def wait() -> Tensor:
            for work in works:
                work.wait()
            return taken

        return wait

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all ranks, without a gradient."""
        if self.count == 1:
            return value
        if value.device.type == "cuda":
            total = value.detach().clone()
            dist.all_reduce(total)
            return total
        # gloo takes two or three times as long to reduce a small tensor as to gather it.
        everything = value.new_empty(self.count, *value.shape)
        all_gather(everything.view(-1), value.detach().contiguous().view(-1))
        return everything.sum(0, dtype=value.dtype)


ALONE = Ranks()
