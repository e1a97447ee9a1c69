"""Models side by side on sets of pairs: everything is checked first, then each model embeds each set once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations

from declip.errors import InputError
from declip.evaluation import Progress
from declip.evaluation.details import Details
from declip.evaluation.embedding import Embedded, Encoder, embed_source
from declip.evaluation.judged import Comparison, Judged
from declip.evaluation.sets import TestSet
from declip.evaluation.tasks import (
    embed_captions,
    labelled,
    possible_tasks,
    retrieval,
    zero_shot,
    zero_shot_classes,
)


@dataclass
class Evaluation:
    """All that was found: by model, set and task; between models; and, where asked for, what a report shows."""

    results: list[Judged] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    details: list[Details] = field(default_factory=list)
