"""What models are judged on: pairs, and what a benchmark says about them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from declip.data.sources import Source
from declip.errors import InputError

_SHOWN = 3  # names in a message


@dataclass(frozen=True)
class TestSet:
    """A set of pairs to judge models on.

    name: what it is called in results; source: the pairs; tasks: what is asked (None: whatever they have captions or
    labels for)
    classes: names in the order of their numbers (None: the sorted labels of the pairs); labels: int64 [pairs], the
    number of each pair's class, where its label does not say it; templates: prompts (None: the
    model's user chooses); metric: the published one of a classification, top1 or mean_per_class
    train, validation: labelled pairs that a linear probe learns from, and chooses its strength with
    folds: retrieval is judged within each of so many equal parts, in order (COCO's 1k)
    """

    __test__ = False  # pytest takes it for a test

    name: str
    source: Source
    tasks: tuple[str, ...] | None = None
    classes: tuple[str, ...] | None = None
    labels: NDArray[np.int64] | None = None
    templates: tuple[str, ...] | None = None
    metric: str = "top1"
    train: TestSet | None = None
    validation: TestSet | None = None
    folds: int = 1


def check_classes(where: str, names: Sequence[str], *, repeated: bool = False) -> None:
    """Class names that images can be told apart by. repeated: of a published list, in which a name may stand twice.

    Raises InputError where one is empty, two are the same, or there are fewer than two.
    """
    if empty := [number for number, name in enumerate(names) if not name.strip()]:
        raise InputError(f"{where}: the name of class {empty[0]} is empty, so no prompt can be made of it: name it.")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice and not repeated:
        raise InputError(
            f"{where}: {len(twice)} class names stand for several classes ({', '.join(twice[:_SHOWN])}): prompts could "
            "not tell them apart, so give each class a name of its own."
        )
    if len(names) < 2:
        found = f"only the class {names[0]!r}" if names else "no labels"
        raise InputError(
            f"{where} has {found}, so it cannot be classified: name the label column, or leave that task out."
        )


def class_numbers(
    labels: Sequence[str | None], classes: Sequence[str] | None, whose: str
) -> tuple[list[str], list[int]]:
    """The class names, and the number of each label's class, -1 where there is no label.

    classes: in the order of their numbers; by default the sorted labels.
    Raises InputError as ``check_classes`` does, and where a label is none of them.
    """
    found = sorted({label for label in labels if label is not None})
    names = list(found if classes is None else classes)
    check_classes(whose, names)
    position = {name: number for number, name in enumerate(names)}
    if outside := [label for label in found if label not in position]:
        raise InputError(
            f"{whose}: the label {outside[0]!r} is none of the {len(names)} classes"
            + (f" ({len(outside)} labels are not)" if len(outside) > 1 else "")
            + ": give the list that belongs to the labels."
        )
    return names, [-1 if label is None else position[label] for label in labels]
