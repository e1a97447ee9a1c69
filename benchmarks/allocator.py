"""Training on a CPU with glibc's memory kept, as declip does, and given back after every step, as it is by default.

    python benchmarks/allocator.py            # a table; --json for figures
    python benchmarks/allocator.py --check    # exit 1 where EfficientNet-Lite0 is not 1.3 times as fast

Forward and backward passes in bfloat16, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch
from torch import Tensor, nn

TARGET = 1.3
CASES = {  # by name: images and their side
    "efficientnet": [(64, 160), (64, 192), (256, 160), (256, 192)],
    "resnet": [(64, 64), (256, 64)],
}


def tower(name: str) -> nn.Module:
    """EfficientNet-Lite0 with batch norm as in evaluation, or the ResNet of the recipe `clip`."""
    if name == "efficientnet":
        import timm

        from declip.model.depthwise import hasten_depthwise

        net: nn.Module = timm.create_model("tf_efficientnet_lite0", num_classes=0).eval()
        hasten_depthwise(net)
    else:
        from declip.model.towers import build_towers
        from declip.recipe import load_recipe

        net = build_towers(load_recipe("clip").model).visual
    return net.to(memory_format=torch.channels_last)


def measure(name: str, batch: int, size: int, keeps: bool, repeats: int) -> dict[str, float]:
    """Images per second, GB at most, and pages that were brought in at a step."""
    from declip.memory import keep_freed_memory

    if keeps and not keep_freed_memory():
        raise SystemExit("This C library is not glibc, or the environment says how malloc shall behave.")
    torch.manual_seed(0)
    net = tower(name)
    pixels = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
    for _ in range(2):
        step(net, pixels)
    seconds, before = [], resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(repeats):
        began = time.perf_counter()
        step(net, pixels)
        seconds.append(time.perf_counter() - began)
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "images_per_second": batch / statistics.median(seconds),
        "gigabytes": used.ru_maxrss / 2**20,
        "pages_per_step": (used.ru_minflt - before) / repeats,
    }


def step(net: nn.Module, pixels: Tensor) -> None:
    net.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = net(pixels).float().square().mean()
    loss.backward()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--one", nargs=4, metavar=("TOWER", "BATCH", "SIZE", "KEEPS"), help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    if args.one:
        name, batch, size, keeps = args.one
        print(json.dumps(measure(name, int(batch), int(size), keeps == "1", args.repeats)))
        return 0
    figures = {}
    for name, shapes in CASES.items():
        for batch, size in shapes:
            own = {
                word: run(name, batch, size, keeps, args.repeats) for word, keeps in (("given back", 0), ("kept", 1))
            }
            ratio = own["kept"]["images_per_second"] / own["given back"]["images_per_second"]
            figures[f"{name}, {batch} images of {size} px"] = {**own, "ratio": ratio}
    if args.json:
        print(json.dumps(figures, indent=1))
    else:
        for name, found in figures.items():
            rates, held = (
                " → ".join(f"{found[word][what]:.{digits}f}" for word in ("given back", "kept"))
                for what, digits in (("images_per_second", 0), ("gigabytes", 1))
            )
            print(f"{name}: {rates} images/s, {found['ratio']:.2f} times; {held} GB")
    slow = [name for name, found in figures.items() if name.startswith("efficientnet") and found["ratio"] < TARGET]
    return int(args.check and bool(slow))


def run(name: str, batch: int, size: int, keeps: int, repeats: int) -> dict[str, float]:
    one = [name, str(batch), str(size), str(keeps)]
    command = [sys.executable, __file__, "--repeats", str(repeats), "--one", *one]
    found: dict[str, float] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return found


if __name__ == "__main__":
    sys.exit(main())
