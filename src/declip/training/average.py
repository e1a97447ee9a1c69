"""A moving average of the weights, which is often better than the weights themselves."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class WeightAverage:
    """An exponential moving average of parameters: average ← decay · average + (1 - decay) · parameter.

    In update t = 1, 2, … the decay is min(decay, (1 + t) / (10 + t)), so that the average of a short run is not that of
    its first random weights (as in TensorFlow's ExponentialMovingAverage). Buffers are not averaged: while the average
    is applied the model has its own, such as the latest statistics of batch norm.

    warm: false for one decay from the first update on
    """

    def __init__(self, parameters: list[nn.Parameter], decay: float, warm: bool = True) -> None:
        self.parameters, self.decay, self.warm, self.updates = parameters, decay, warm, 0
        self.average = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Take the parameters of now into the average; called once a step."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warm else self.decay
        torch._foreach_lerp_(self.average, [parameter.detach() for parameter in self.parameters], 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The parameters are the average within; nothing is copied, tensors change places."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for place, parameter in enumerate(self.parameters):
            parameter.data, self.average[place] = self.average[place], parameter.data

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "average": list(self.average)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave, for the same parameters; tensors may be on another device."""
        self.updates = state["updates"]
        own: list[Tensor] = self.average
        for tensor, saved in zip(own, state["average"], strict=True):
            tensor.copy_(saved)
