"""How often equals meet in a batch, where they are false negatives to each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from math import exp, lgamma, log


def expected_equals(pairs: int, batch_size: int, holders: Iterable[int], shown: float = 1.0) -> float:
    """Expected number of pairs in a batch that have an equal elsewhere in the batch.

    A batch is `batch_size` of `pairs` pairs, drawn without replacement. `holders`: for each thing that pairs can have
    in common (a caption, an image), how many pairs hold it. `shown`: the probability that a pair which holds it shows
    it, 1 / k where one of k captions is drawn.

    Of a group of n, h are in the batch with hypergeometric probability; each of them shows the thing with probability
    p, and none of the other h - 1 does with (1 - p)^(h - 1):
    sum over groups of sum_h P(h; pairs, n, batch) h p (1 - (1 - p)^(h - 1)).
    For p = 1 that is n B / N (1 - C(N - n, B - 1) / C(N - 1, B - 1)).
    """
    batch = min(batch_size, pairs)
    total = 0.0
    for size, groups in Counter(holders).items():
        most = min(size, batch)
        for h in range(max(2, batch - (pairs - size)), most + 1):
            chance = exp(_log_choose(size, h) + _log_choose(pairs - size, batch - h) - _log_choose(pairs, batch))
            none = 0.0 if shown == 1 else exp((h - 1) * log(1 - shown))
            total += groups * chance * h * shown * (1 - none)
    return total


def _log_choose(n: int, k: int) -> float:
    return lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)
