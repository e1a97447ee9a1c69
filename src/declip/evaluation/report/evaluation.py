"""What models can do on sets of pairs, as one self-contained page: figures, comparisons, pictures, checks."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from declip.evaluation.details import Details, Overlap, Published
from declip.evaluation.judged import Comparison, Judged
from declip.evaluation.report.answer import compared, headline
from declip.evaluation.report.checks import broken, health, leaked, leaks
from declip.evaluation.report.classes import classes
from declip.evaluation.report.curves import calibration, robustness
from declip.evaluation.report.evaluation_style import STYLE
from declip.evaluation.report.figures import figures
from declip.evaluation.report.galleries import galleries
from declip.evaluation.report.judgements import Models
from declip.evaluation.report.parts import setup
from declip.evaluation.report.style import page
from declip.files import write_atomically


def write_evaluation_report(
    path: str | Path,
    results: Sequence[Judged],
    details: Sequence[Details],
    comparisons: Sequence[Comparison],
    overlaps: Sequence[Overlap],
    published: Sequence[Published],
    facts: Sequence[tuple[str, str]],
) -> None:
    """Write the page to ``path`` in one move; the same input gives the same bytes.

    results: in the order of the tables, whose first models give the order of the colours; details, overlaps: of the
        same models; published: only those of a task and set that `results` have are shown; facts: (name, value) pairs
        about what was judged and how

    All texts are plain text. Sections that have nothing to show are left out. Raises ValueError without a result,
    OSError where the file cannot be written.
    """
    if not results:
        raise ValueError("A report needs at least one result.")
    html = _page(results, details, comparisons, overlaps, published, facts)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(
        path, lambda temporary: temporary.write_text(html, encoding="utf-8", errors="replace"), several=True
    )


def _page(
    results: Sequence[Judged],
    details: Sequence[Details],
    comparisons: Sequence[Comparison],
    overlaps: Sequence[Overlap],
    published: Sequence[Published],
    facts: Sequence[tuple[str, str]],
) -> str:
    single = [
        judged for judged in results if "runs" not in judged.settings
    ] or results  # means over seeds are no models
    named = [each.model for group in (results, details, overlaps) for each in group]
    models = Models(tuple(dict.fromkeys([*named, *(name for each in comparisons for name in each.models)])))
    sections = [
        figures(models, results, published),
        compared(models, comparisons),
        classes(models, details),
        galleries(models, details),
        calibration(models, details),
        robustness(models, details),
        health(models, details),
        leaks(models, overlaps),
        broken(results),
    ]
    shown = [section for section in sections if section.body]
    links = "".join(f'<a href="#{section.anchor}">{section.title}</a>' for section in shown)
    title = f"Evaluation of {', '.join(dict.fromkeys(judged.model for judged in single))}"
    header = f"""<p class="eyebrow">{escape(title)}</p>
<h1>{headline(models, single, comparisons)}</h1>
<p class="intro">{escape(_intro(single))}</p>
{_warning(overlaps)}<nav aria-label="Sections">{links}</nav>"""
    body = "\n".join([*(section.html() for section in shown), setup(facts)])
    return page(title, header, body, STYLE)


def _intro(results: Sequence[Judged]) -> str:
    """How much was judged."""
    sets = list(dict.fromkeys(judged.data for judged in results))
    images = sum(max(judged.items for judged in results if judged.data == data) for data in sets)
    models = len({judged.model for judged in results})
    who = f"{models} {'model' if models == 1 else 'models'}"
    what = f"{len(sets)} {'set' if len(sets) == 1 else 'sets'} of pairs with {images:,} images"
    tasks = ", ".join(dict.fromkeys(judged.task for judged in results))
    return f"{who}, {what}: {tasks}."


def _warning(overlaps: Sequence[Overlap]) -> str:
    leaking = [overlap for overlap in overlaps if leaked(overlap)]
    if not leaking:
        return ""
    sets, models = (
        escape(", ".join(dict.fromkeys(found)))
        for found in ((overlap.data for overlap in leaking), (overlap.model for overlap in leaking))
    )
    return (
        f'<p class="warning">Images of {sets} are, or nearly are, among the training images of {models}:'
        ' see the <a href="#leak-check">leak check</a>.</p>\n'
    )
