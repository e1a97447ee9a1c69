"""Terms that have a logit scale of their own."""

from __future__ import annotations

import torch
from torch import nn


class OwnScale(nn.Module):
    """A term with a logit scale, a logarithm that is kept in `logit_scale_range`."""

    def __init__(self, logit_scale_init: float, logit_scale_range: tuple[float, float]) -> None:
        super().__init__()
        self.logit_scale, self.logit_scale_range = (
            nn.Parameter(torch.tensor(float(logit_scale_init))),
            logit_scale_range,
        )

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Keep the term's logit scale in its range; called after each optimizer step."""
        self.logit_scale.clamp_(*self.logit_scale_range)
