"""The small networks that single terms put on top of the towers."""

from __future__ import annotations

from torch import Tensor, nn


class Projector(nn.Module):
    """SimSiam's projector: three linear layers with batch norm, ReLU after the first two (DeCLIP, §3.2).

    [batch, dim] -> [batch, width]
    """

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.linear1, self.bn1 = nn.Linear(dim, width), nn.BatchNorm1d(width)
        self.linear2, self.bn2 = nn.Linear(width, width), nn.BatchNorm1d(width)
        self.linear3, self.bn3 = nn.Linear(width, width), nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.linear1(x)).relu()
        x = self.bn2(self.linear2(x)).relu()
        x = self.bn3(self.linear3(x))
        return x


class Predictor(nn.Module):
    """SimSiam's predictor: a bottleneck of two linear layers. [batch, width] -> [batch, width]"""

    def __init__(self, width: int, bottleneck: int) -> None:
        super().__init__()
        self.linear1, self.bn1 = nn.Linear(width, bottleneck), nn.BatchNorm1d(bottleneck)
        self.layer2 = nn.Linear(bottleneck, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.bn1(self.linear1(x)).relu())
        return x
