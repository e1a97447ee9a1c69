"""How much of a large matrix exists at once."""

from __future__ import annotations

from torch import Tensor

CHUNK_BYTES = {"cpu": 2**26, "cuda": 2**30}  # of similarities that exist at once; on a CPU, larger ones are no faster


def chunks(count: int, numbers: int, like: Tensor) -> list[slice]:
    """Slices of `count` items, each with at most CHUNK_BYTES of `numbers` numbers an item, in the type of `like`.

    Of no items one slice, an empty one.
    """
    limit = CHUNK_BYTES.get(like.device.type, CHUNK_BYTES["cpu"])
    step = max(1, limit // max(numbers * like.element_size(), 1))
    return [slice(start, min(start + step, count)) for start in range(0, max(count, 1), step)]
