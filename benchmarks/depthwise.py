"""Forward and backward passes of convolutional towers on a CPU in bfloat16: depthwise gradients, PyTorch's and ours.

python benchmarks/depthwise.py            # a table; --json for figures
python benchmarks/depthwise.py --check    # exit 1 where the last third of EfficientNet-Lite0 is not 1.5 times as fast
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable

import timm
import torch
from torch import Tensor, nn

from declip.model.depthwise import hasten_depthwise

TARGET = 1.5


def towers(size: int) -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """By name: a network in evaluation mode, as of a tower that does not learn as a whole, and its input's shape."""
    net = timm.create_model("tf_efficientnet_lite0", num_classes=0).eval()
    last = nn.Sequential(*net.blocks[5:], net.conv_head, net.bn2)
    whole = nn.Sequential(net.conv_stem, net.bn1, *net.blocks, net.conv_head, net.bn2)
    return {
        f"EfficientNet-Lite0, last 5 blocks, {size} px": (last, (112, size // 16, size // 16)),
        f"EfficientNet-Lite0, all, {size} px": (whole, (3, size, size)),
    }


def step(net: nn.Module, pixels: Tensor) -> Callable[[], None]:
    def run() -> None:
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = net(pixels).mean((2, 3)).float().square().sum()
        loss.backward()

    return run


def seconds(run: Callable[[], None], repeats: int) -> float:
    run()
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=192)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    figures = {}
    for name, (plain, shape) in towers(args.size).items():
        plain.to(memory_format=torch.channels_last)
        own = copy.deepcopy(plain)
        hasten_depthwise(own)
        pixels = torch.randn(args.batch, *shape).contiguous(memory_format=torch.channels_last)
        theirs, ours = (args.batch / seconds(step(net, pixels), args.repeats) for net in (plain, own))
        figures[name] = {"pytorch": theirs, "declip": ours, "ratio": ours / theirs}
    if args.json:
        print(json.dumps(figures, indent=1))
    else:
        for name, own in figures.items():
            rates = f"{own['pytorch']:.0f} → {own['declip']:.0f} images/s"
            print(f"{name}: {rates}, {own['ratio']:.2f} times")
    return int(args.check and next(iter(figures.values()))["ratio"] < TARGET)


if __name__ == "__main__":
    sys.exit(main())
