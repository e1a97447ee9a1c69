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


class CrossPool(nn.Module):
    """What queries find among tokens: layer norms, attention with 8 heads, nothing after it (COSMOS, §3.3).

    queries [views, batch, dim], tokens [batch, tokens, dim], mask bool [batch, tokens], false where there is no token
    -> [views, batch, dim]
    """

    def __init__(self, dim: int, heads: int = 8) -> None:
        super().__init__()
        self.ln_q, self.ln_k = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = nn.MultiheadAttention(dim, heads, batch_first=True)

    def forward(self, queries: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        keys, hidden = self.ln_k(tokens), None if mask is None else ~mask
        found, _ = self.attn(self.ln_q(queries).transpose(0, 1), keys, keys, hidden, need_weights=False)
        return found.transpose(0, 1)  # type: ignore[no-any-return]


class CrossModal(nn.Module):
    """Both towers' tokens mapped to the joint space, and where embeddings of the other side look into them (COSMOS).

    Raises ValueError where `dim` has no 8 equal parts, one a head.
    """

    def __init__(self, image_width: int, text_width: int, dim: int) -> None:
        super().__init__()
        if dim % 8:
            raise ValueError(f"cross-attention has 8 heads, which {dim} is not divided by")
        self.image_mapping, self.text_mapping = nn.Linear(image_width, dim), nn.Linear(text_width, dim)
        self.from_image, self.from_text = CrossPool(dim), CrossPool(dim)


class TextPooler(nn.Module):
    """What each text finds among an image's patches, in the joint space (FLAIR, §3.2).

    Layer norms on queries, keys and values, attention with 8 heads and one empty place to look at, nothing after it.

    patches [images, patches, width], texts [images, texts, dim] -> [images, texts, dim], normalised
    Raises ValueError where `dim` has no 8 equal parts.
    """

    def __init__(self, image_width: int, dim: int) -> None:
        super().__init__()
        if dim % 8:
            raise ValueError(f"text-conditioned pooling has 8 heads, which {dim} is not divided by")
        self.mapping = nn.Linear(image_width, dim, bias=False)
        self.ln_q, self.ln_k, self.ln_v = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = nn.MultiheadAttention(dim, 8, add_zero_attn=True, batch_first=True)

    def forward(self, patches: Tensor, texts: Tensor) -> Tensor:
        mapped = self.mapping(patches)
        found, _ = self.attn(self.ln_q(texts), self.ln_k(mapped), self.ln_v(mapped), need_weights=False)
        return F.normalize(found, dim=-1)


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
