"""What a report shows beside the figures: small extracts of what one model did on one set of pairs."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Example:
    """An image (encoded bytes, as stored), what it is, and what the model took it for.

    confidence: the model's probability of what it took it for, 0 to 1
    """

    image: bytes
    truth: str
    taken_for: str
    confidence: float


@dataclass(frozen=True, slots=True)
class ClassScore:
    name: str
    items: int
    accuracy: float  # percent


@dataclass(frozen=True, slots=True)
class Confusion:
    """How many images of one class were taken for another, and how many images the class has."""

    truth: str
    taken_for: str
    count: int
    of: int


@dataclass(frozen=True, slots=True)
class Calibration:
    """How far a model's probabilities can be believed.

    bins: (mean confidence, accuracy, share of the items), each 0 to 1, of those bins that are not empty
    ece, ece_after: expected calibration error in percent, with the model's own logit scale and after `temperature`,
        by which its logits are divided; fitted on one half of the items and judged on the other, both ways
    """

    bins: tuple[tuple[float, float, float], ...]
    ece: float
    ece_after: float
    temperature: float


@dataclass(frozen=True, slots=True)
class Found:
    """What retrieval brought for one query, best first: images for a caption, captions for an image.

    right: of each hit, whether it belongs to the query; rank: of the first that does, 1 is best
    """

    query: str | bytes  # a caption, or an encoded image
    hits: tuple[str | bytes, ...]
    right: tuple[bool, ...]
    rank: int


@dataclass(frozen=True, slots=True)
class Robustness:
    """One metric under one corruption: (severity, value in percent), severity 0 is the clean set of the same items."""

    corruption: str
    metric: str
    points: tuple[tuple[int, float], ...]


@dataclass
class Details:
    """Of one model and one set of pairs; what does not apply is empty."""

    model: str
    data: str
    task: str
    classes: list[ClassScore] = field(default_factory=list)
    confusions: list[Confusion] = field(default_factory=list)  # most frequent first
    worst: list[Example] = field(default_factory=list)  # most confident mistakes first
    best: list[Example] = field(default_factory=list)  # most confident right ones first
    calibration: Calibration | None = None
    retrieved: list[Found] = field(default_factory=list)
    robustness: list[Robustness] = field(default_factory=list)
    health: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Published:
    """A published figure to stand beside ours: whose, on which set (our name of it), task, metrics in percent.

    mark: the doubt about it, † or ‡, or nothing; source: where it was read
    """

    model: str
    data: str
    task: str
    metrics: dict[str, float]
    mark: str
    source: str


@dataclass(frozen=True, slots=True)
class Overlap:
    """How many images of a set of pairs also are among those that a model was trained on."""

    model: str
    data: str
    items: int
    exact: int
    near: int
    examples: tuple[str, ...] = ()  # keys or places of the first few
    checked: bool = True  # not where the training pairs could not be read, or were too many
    reason: str = ""
