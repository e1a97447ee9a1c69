"""Depthwise convolutions' own gradients against PyTorch's."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame
from torch import nn

from declip.model.depthwise import hasten_depthwise, input_gradient


@pytest.mark.parametrize("kernel", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("size", [(7, 8), (12, 11), (9, 9)])
def test_input_gradient_is_autograds(kernel: int, stride: int, size: tuple[int, int]) -> None:
    for padding in {0, kernel // 2}:
        weight = torch.randn(4, 1, kernel, kernel, dtype=torch.float64)
        pixels = torch.randn(2, 4, *size, dtype=torch.float64, requires_grad=True)
        output = F.conv2d(pixels, weight, None, stride, padding, 1, 4)
        gradient = torch.randn_like(output)
        (expected,) = torch.autograd.grad(output, pixels, gradient)
        torch.testing.assert_close(input_gradient(gradient, weight, pixels.shape, stride, padding), expected)


@pytest.mark.parametrize("kind", [nn.Conv2d, Conv2dSame])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2)])
def test_gradients_in_bfloat16_are_those_of_float32(kind: type[nn.Conv2d], kernel: int, stride: int) -> None:
    torch.manual_seed(0)
    plain = kind(16, 16, kernel, stride=stride, padding=kernel // 2, groups=16, bias=False)
    own = copy.deepcopy(plain)
    hasten_depthwise(own)
    assert type(own) is not kind
    pixels = torch.randn(4, 16, 12, 12).contiguous(memory_format=torch.channels_last)
    found = []
    for conv, half in ((plain, False), (own, True), (own, False)):
        conv.zero_grad()
        given = pixels.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            output = conv(given)
        output.float().square().sum().backward()
        found.append((output.float(), given.grad, conv.weight.grad))
    for exact, half_precise, same in zip(*found, strict=True):
        assert (exact - half_precise).norm() < 0.02 * exact.norm()
        torch.testing.assert_close(same, exact)


def test_others_are_left_alone() -> None:
    convs = nn.Sequential(
        nn.Conv2d(4, 4, 3), nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(4, 4, 3, groups=4, bias=True), nn.Conv2d(1, 1, 3)
    )
    hasten_depthwise(convs)
    assert {type(conv) for conv in convs} == {nn.Conv2d}
    tower = nn.Conv2d(4, 4, 3, groups=4, bias=False)
    before = list(tower.state_dict())
    hasten_depthwise(tower)
    assert list(tower.state_dict()) == before
    assert list(copy.deepcopy(tower).state_dict()) == before
