"""The moving average of weights beside plain arithmetic."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

from declip.training.average import WeightAverage


def test_beside_plain_arithmetic() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    average = WeightAverage(list(layer.parameters()), 0.6)
    expected = layer.weight.detach().double().clone()
    for update in range(1, 21):
        with torch.no_grad():
            layer.weight.normal_()
        average.update()
        decay = min(0.6, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * layer.weight.detach().double()
        torch.testing.assert_close(average.average[0].double(), expected, rtol=1e-5, atol=1e-6)
    assert average.updates == 20


def test_the_first_random_weights_are_soon_forgotten() -> None:
    """After 100 updates nothing is left of the start, even with a decay whose memory is ten thousand steps."""
    weight = nn.Parameter(torch.full((1,), 1e3))
    average = WeightAverage([weight], 0.9999)
    weight.data.fill_(1.0)
    for _ in range(100):
        average.update()
    assert average.average[0].item() == pytest.approx(1.0, abs=1e-4)


def test_applied_and_taken_back() -> None:
    """Within, the model has the average and its own batch-norm statistics; afterwards all is as before."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    average = WeightAverage(list(model.parameters()), 0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
        model[1].running_mean.add_(3)
    average.update()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    plain.load_state_dict(before)
    for parameter, tensor in zip(plain.parameters(), average.average, strict=True):
        parameter.data.copy_(tensor)
    rows = torch.randn(5, 3)
    with contextlib.suppress(KeyError), average.applied():
        assert torch.equal(model(rows), plain(rows))
        raise KeyError
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_its_state_goes_on() -> None:
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(4)) for _ in range(2)]
    averages = [WeightAverage([weight], 0.9) for weight in weights]
    for _ in range(3):
        averages[0].update()
        weights[0].data.mul_(2)
    state = averages[0].state_dict()
    averages[1].load_state_dict({**state, "average": [tensor.clone() for tensor in state["average"]]})
    weights[1].data.copy_(weights[0])
    for average in averages:
        average.update()
    assert averages[0].updates == averages[1].updates == 4
    assert torch.equal(averages[0].average[0], averages[1].average[0])
