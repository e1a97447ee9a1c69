"""What a scan says about a source, in sentences: what it is, how bad it is, what to do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from declip.curation.chances import expected_equals
from declip.curation.copies import Copies, Indices, common
from declip.curation.duplicates import Pairs
from declip.curation.scan import EXAMPLES, Scan
from declip.pairs import Data

TINY = 32
"""Pixels: an image with a shorter side than this shows next to nothing."""
MANY_EQUAL = 0.1
"""Share of a batch that has an equal caption in it."""
EXTREME = 4.0
"""Of the longer to the shorter side."""

Severity = Literal["fine", "look", "act"]


@dataclass(slots=True)
class Finding:
    """One thing found.

    name: as in the JSON; count, share: of the pairs (or of the captions, where the sentence says so); says: what it is;
    advice: what to do, "" where there is nothing to do; examples: the first places; shown: indices of the pairs that
    a report shows, alone or side by side with one of the same set or of the test set.
    """

    name: str
    severity: Severity
    count: int
    share: float
    says: str
    advice: str = ""
    examples: list[str] = field(default_factory=list)
    shown: Sequence[tuple[int, ...]] = field(default_factory=list)
    shown_in: Literal["own", "test"] = "own"

    def as_json(self) -> dict[str, Any]:
        """What the JSON says of it."""
        said = asdict(self)
        del said["shown"], said["shown_in"]
        return said


def find(
    scan: Scan, copies: Copies, test: Scan | None, data: Data, batch_size: int, image_size: int, context_length: int
) -> list[Finding]:
    """All findings, the worst first."""
    found = [_broken(scan, data), *_sizes(scan, image_size), *_captions(scan, context_length)]
    found += [_equal_captions(scan, batch_size), *_equal_images(scan, copies, batch_size)]
    if test is not None:
        found += _leaks(scan, copies, test)
    order = {"act": 0, "look": 1, "fine": 2}
    return sorted(found, key=lambda finding: order[finding.severity])


def percent(share: float) -> str:
    """0 %, 0.03 %, 1.2 %, 45 %: never 0 % where there is something, nor 100 % where something is missing."""
    if 0 < share < 0.0001:
        return "under 0.01 %"
    if 0.9995 <= share < 1:
        return "nearly 100 %"
    return f"{100 * share:.{2 if share < 0.001 else 1 if share < 0.1 else 0}f} %".replace(".0 %", " %")


def _judge(count: int, share: float, act_above: float) -> Severity:
    return "fine" if not count else "act" if share > act_above else "look"


def counted(count: int, what: str, plural: str = "") -> str:
    """1 pair, 1,200 pairs."""
    return f"{count:,} {what if count == 1 else plural or what + 's'}"


def _about(count: float) -> str:
    """0.036, 8.6, 256."""
    return f"{count:,.0f}" if count >= 10 else f"{count:.2g}"


def _broken(scan: Scan, data: Data) -> Finding:
    count = sum(found.count for found in scan.broken.values())
    share = count / len(scan.pairs)
    if not count:
        return Finding("broken", "fine", 0, 0.0, "Every image can be decoded.")
    reasons = sorted(scan.broken.items(), key=lambda item: -item[1].count)
    listed = "; ".join(f"{reason}: {found.count:,}" for reason, found in reasons[:4])
    says = f"{counted(count, 'pair')} ({percent(share)}) cannot be used. {listed[0].upper()}{listed[1:]}."
    examples = [f"{where}: {reason}" for reason, found in reasons for _, where in found.first][:EXAMPLES]
    advice = (
        f"More than data.broken_limit = {data.broken_limit:g} allows: a training run would stop. Repair the files, or "
        "write a set without them with `declip data dedup`."
        if share > data.broken_limit
        else "Training skips them and says so. `declip data dedup` writes a set without them."
    )
    return Finding("broken", _judge(count, share, data.broken_limit), count, share, says, advice, examples)


def _sizes(scan: Scan, image_size: int) -> list[Finding]:
    if not len(scan.whole):
        return []
    pairs = scan.pairs[scan.whole]
    short = np.minimum(pairs["width"], pairs["height"])
    ratio = np.maximum(pairs["width"], pairs["height"]) / np.maximum(short, 1)
    size = f"{image_size} px"

    def finding(name: str, chosen: Any, says: str, advice: str, act_above: float) -> Finding:
        indices = scan.whole[chosen]
        share = len(indices) / len(scan.whole)
        if not len(indices):
            return Finding(name, "fine", 0, 0.0, says.format("No image"))
        some = [f"{scan.source.where(int(i))} ({_size(scan, int(i))})" for i in indices[:EXAMPLES]]
        says = says.format(f"{counted(len(indices), 'image')} ({percent(share)})")
        shown = [(int(i),) for i in indices[:EXAMPLES]]
        return Finding(name, _judge(len(indices), share, act_above), len(indices), share, says, advice, some, shown)

    large = finding("small_images", short < image_size, "{} below " + size + " a side.", "", 0.5)
    large.severity = "look" if large.share > 0.5 else "fine"
    large.advice = f"They are enlarged to {size}: a smaller model.image.image_size costs less." if large.count else ""
    heavy = float(np.median(short)) >= 2 * image_size
    pack = f"`declip data pack --resize {round(image_size * 1.15)}` makes loading several times faster."
    big = Finding(
        "large_images",
        "look" if heavy else "fine",
        int((short >= 2 * image_size).sum()),
        float((short >= 2 * image_size).mean()),
        f"The shorter side has {int(np.median(short)):,} px at the median.",
        pack if heavy else "",
    )
    return [
        finding("tiny_images", short < TINY, f"{{}} below {TINY} px a side.", "Leave them out: nothing shows.", 0.01),
        large,
        big,
        finding(
            "extreme_ratios",
            ratio > EXTREME,
            f"{{}} more than {EXTREME:g} times as long as wide.",
            "Banners and strips mostly: a crop shows little of what the caption says. Leave them out.",
            0.05,
        ),
    ]


def _size(scan: Scan, index: int) -> str:
    return f"{scan.pairs[index]['width']} × {scan.pairs[index]['height']}"


def _captions(scan: Scan, context_length: int) -> list[Finding]:
    captions, source = scan.captions, scan.source
    if not len(captions):
        return [Finding("no_captions", "look", len(scan.pairs), 1.0, "No pair has a caption.")]
    empty = np.flatnonzero(scan.pairs["captions"] == 0)
    long = np.flatnonzero(captions["tokens"] > context_length)
    share = len(long) / len(captions)
    odd = sum(found.count for found in scan.odd.values())
    kinds = sorted(scan.odd.items(), key=lambda item: -item[1].count)
    listed = "; ".join(f"{kind}: {found.count:,}" for kind, found in kinds)
    return [
        Finding(
            "empty_captions",
            _judge(len(empty), len(empty) / len(scan.pairs), 0.01),
            len(empty),
            len(empty) / len(scan.pairs),
            f"{counted(len(empty), 'pair has', 'pairs have')} no caption."
            if len(empty)
            else "Every pair has a caption.",
            "They cannot be trained on." if len(empty) else "",
            [source.where(int(i)) for i in empty[:EXAMPLES]],
        ),
        Finding(
            "long_captions",
            _judge(len(long), share, 0.1),
            len(long),
            share,
            f"{counted(len(long), 'caption has', 'captions have')} over {context_length} tokens ({percent(share)})."
            if len(long)
            else f"Every caption fits in {context_length} tokens.",
            "Their end is cut off: raise model.text.context_length, or split them into several captions a pair."
            if len(long)
            else "",
            [source.where(int(i)) for i in captions["pair"][long[:EXAMPLES]]],
        ),
        Finding(
            "not_language",
            _judge(odd, odd / len(captions), 0.01),
            odd,
            odd / len(captions),
            f"{counted(odd, 'caption is', 'captions are')} no language ({percent(odd / len(captions))}): {listed}."
            if odd
            else "Every caption looks like language.",
            "They teach nothing: leave them out or clean them." if odd else "",
            [f"{source.where(i)}: {text}" for _, found in kinds for i, text in found.first][:EXAMPLES],
        ),
    ]


def holders(scan: Scan) -> tuple[Any, Indices]:
    """The different captions, as hashes, and by how many pairs each is held."""
    held = np.unique(scan.captions[["pair", "hash"]])
    hashes, counts = np.unique(held["hash"], return_counts=True)
    return hashes, counts


def _equal_captions(scan: Scan, batch_size: int) -> Finding:
    if not len(scan.captions):
        return Finding("equal_captions", "fine", 0, 0.0, "There are no captions.")
    hashes, counts = holders(scan)
    repeated = np.isin(scan.captions["hash"], hashes[counts > 1])
    count = len(np.unique(scan.captions["pair"][repeated]))
    share = count / len(scan.pairs)
    if not count:
        return Finding("equal_captions", "fine", 0, 0.0, "No two pairs have an equal caption.")
    with_captions = int((scan.pairs["captions"] > 0).sum())
    shown = with_captions / len(np.unique(scan.captions[["pair", "hash"]]))
    touched = expected_equals(len(scan.pairs), batch_size, counts[counts > 1].tolist(), min(1.0, shown))
    per_batch = touched / min(batch_size, len(scan.pairs))
    says = (
        f"{counted(count, 'pair')} ({percent(share)}) share a caption with another. Of a batch of {batch_size:,}, "
        f"{_about(touched)} on average have an equal caption elsewhere in it: false negatives of the contrastive loss."
    )
    # Where a caption came twice, in 3 % of a batch, neither option measured better; with class names positives did.
    advice = (
        "Set terms.contrastive.equal_captions=positives: with so many it measures better."
        if per_batch > MANY_EQUAL
        else "Few enough to do no harm that was measured; data.keep_apart=captions keeps them out of one batch."
    )
    severity: Severity = "act" if per_batch > MANY_EQUAL else "look" if touched >= 0.1 else "fine"
    return Finding("equal_captions", severity, count, share, says, advice if severity != "fine" else "")


def _equal_images(scan: Scan, copies: Copies, batch_size: int) -> list[Finding]:
    exact = copies.exact()
    if not len(scan.whole):
        return []
    near = _side_by_side(
        "near_duplicates",
        copies.near,
        len(scan.whole),
        scan.source.where,
        scan.source.where,
        "{} of nearly the same picture: recompressed, resized, cropped or drawn alike.",
        "No two pictures are nearly the same.",
        "Look at them below. `declip data dedup` keeps the largest of each group.",
        "pair of images",
        "pairs of images",
    )
    sizes = np.unique(copies.first[copies.first >= 0], return_counts=True)[1]
    touched = expected_equals(len(scan.whole), batch_size, sizes[sizes > 1].tolist())
    repeated = _side_by_side(
        "equal_images",
        exact,
        len(scan.whole),
        scan.source.where,
        scan.source.where,
        f"{{}} an earlier one exactly. Of a batch of {batch_size:,}, {_about(touched)} on average have an equal in it.",
        "No two images are equal.",
        "`declip data dedup` makes one pair of them with all captions; or set data.keep_apart=images.",
        "image repeats",
        "images repeat",
    )
    return [repeated, near]


def _leaks(scan: Scan, copies: Copies, test: Scan) -> list[Finding]:
    own, other = scan.source.where, test.source.where
    keyed, test_keyed = (np.flatnonzero(part.pairs["key_hash"] != 0) for part in (scan, test))
    keys = common(scan.pairs["key_hash"], keyed, test.pairs["key_hash"], test_keyed)
    captions = common(
        scan.captions["hash"], np.arange(len(scan.captions)), test.captions["hash"], np.arange(len(test.captions))
    )
    captions = np.stack([scan.captions["pair"][captions[:, 0]], test.captions["pair"][captions[:, 1]]], axis=1)
    captions = captions[np.unique(captions[:, 0], return_index=True)[1]]
    drop = "The score on the test set would be too good. `declip data dedup --test` leaves them out."
    total = len(scan.pairs)
    found = [
        _side_by_side("test_images", copies.test_exact, total, own, other, "{} in the test set.",
                      "No image is in the test set.", drop, "image is", "images are"),
        _side_by_side("test_near_duplicates", copies.test_near, total, own, other, "{} a near-copy in the test set.",
                      "No image has a near-copy in the test set.", drop, "image has", "images have"),
        _side_by_side("test_keys", keys, total, own, other, "{} a key that is in the test set.",
                      "No key is in the test set.", drop, "pair has", "pairs have"),
        _side_by_side("test_captions", captions, total, own, other, "{} a caption that is in the test set.",
                      "No caption is in the test set.", "Short captions meet by chance; look at the examples.",
                      "pair has", "pairs have"),
    ]  # fmt: skip
    for finding in found:
        finding.shown_in = "test"
        if finding.count and finding.name != "test_captions":
            finding.severity = "act"
    found[-1].shown = ()  # equal words say nothing about the pictures
    return found


def _side_by_side(
    name: str,
    pairs: Pairs,
    total: int,
    where: Callable[[int], str],
    other: Callable[[int], str],
    says: str,
    nothing: str,
    advice: str,
    one: str,
    many: str,
) -> Finding:
    """A finding about two pairs that are equal in something; `says` has {} for how many there are."""
    if not len(pairs):
        return Finding(name, "fine", 0, 0.0, nothing)
    share = len(np.unique(pairs[:, 0])) / total
    some = [(int(a), int(b)) for a, b in pairs[:EXAMPLES]]
    examples = [f"{where(a)} = {other(b)}" for a, b in some]
    says = says.format(counted(len(pairs), one, many))
    return Finding(name, _judge(len(pairs), share, 0.01), len(pairs), share, says, advice, examples, some)
