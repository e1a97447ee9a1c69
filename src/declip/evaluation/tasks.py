"""The three tasks, each on the embeddings of one set of pairs: ranks of the right answers, and what they amount to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from declip.errors import InputError
from declip.evaluation.class_cache import cached_class_embeddings
from declip.evaluation.embedding import Embedded, Encoder, Progress, embed_texts
from declip.evaluation.judged import MISSED, Judged
from declip.evaluation.sets import TestSet, class_numbers

TASKS = ("retrieval", "zero-shot", "linear-probe")


def possible_tasks(test: TestSet, embedded: Embedded) -> tuple[str, ...]:
    """What can be asked of the pairs: retrieval where they have captions, zero-shot where they have two labels."""
    if test.tasks is not None:
        return test.tasks
    possible = []
    if any(embedded.captions):
        possible.append("retrieval")
    if len({label for label in embedded.labels if label is not None}) >= 2:
        possible.append("zero-shot")
    if test.train is not None:
        possible.append("linear-probe")
    if not possible:
        raise InputError(
            f"{test.name} has neither captions nor labels of at least two classes: there is nothing to judge."
        )
    return tuple(possible)
