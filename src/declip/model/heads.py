"""The small networks that single terms put on top of the towers."""

from __future__ import annotations

import torch.nn.functional as F
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


class ContrastiveHead(nn.Module):
    """SimCLR's head in SLIP: three linear layers, batch norm and ReLU after the first two (Mu et al. 2022, §4).

    [batch, width of the tower] -> [batch, dim]
    """

    def __init__(self, tower_width: int, width: int, dim: int) -> None:
        super().__init__()
        self.linear1, self.bn1 = nn.Linear(tower_width, width), nn.BatchNorm1d(width)
        self.linear2, self.bn2 = nn.Linear(width, width), nn.BatchNorm1d(width)
        self.linear3 = nn.Linear(width, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.linear1(x)).relu()
        x = self.bn2(self.linear2(x)).relu()
        x = self.linear3(x)
        return x


class TokenMappings(nn.Module):
    """Maps patches and words into one space, where they are compared by cosine (FILIP, §3.1).

    [..., tokens, tower width] -> [..., tokens, dim], normalised
    """

    def __init__(self, image_width: int, text_width: int, dim: int) -> None:
        super().__init__()
        self.image_mapping, self.text_mapping = nn.Linear(image_width, dim), nn.Linear(text_width, dim)

    def map_image(self, tokens: Tensor) -> Tensor:
        return F.normalize(self.image_mapping(tokens), dim=-1)

    def map_text(self, tokens: Tensor) -> Tensor:
        return F.normalize(self.text_mapping(tokens), dim=-1)
