"""`declip compare` from what was asked to `report.html` and `results.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any

import declip
from declip.compare.findings import METRICS, Findings, Ran, chance, find, line_json
from declip.compare.grid import Cell, Method
from declip.compare.prepare import Prepared
from declip.compare.schedule import Told, finished, run_cells
from declip.compare.search import Rates, rate_of, search_rates
from declip.files import write_atomically

RESULTS, REPORT = "results.json", "report.html"


def grid_cells(prepared: Prepared, rates: Rates) -> list[Cell]:
    """Every cell after the search; of a variant that changes nothing the whole method's once more."""
    found = []
    for seed in range(prepared.asked.seeds):
        for fraction in prepared.pairs:
            for method in prepared.methods:
                rate = rate_of(prepared, rates, method, fraction)
                lengths = prepared.lengths(method)
                found += [prepared.cell(method, fraction, seed, length, rate) for length in lengths]
        for fraction in ablated(prepared):
            for method in prepared.extras:
                found.append(prepared.cell(method, fraction, seed, 1.0, rate_of(prepared, rates, method, fraction)))
    # Lengths that are the same number of steps are one run.
    return list({(cell.method, cell.key): cell for cell in found}.values())


def ablated(prepared: Prepared) -> tuple[Fraction, ...]:
    """Where variants are judged: the middle one of the fractions."""
    fractions = sorted(prepared.pairs)
    return (fractions[len(fractions) // 2],)


def compare(prepared: Prepared, metric: str = "mean", told: Told | None = None) -> dict[str, Any]:
    """Run what is not finished, and write what all of it says; returns that.

    Raises what `schedule.run_cells` raises.
    """
    asked = prepared.asked
    asked.out.mkdir(parents=True, exist_ok=True)

    def run(cells: Sequence[Cell]) -> dict[str, dict[str, Any]]:
        return run_cells(asked.out, cells, prepared.flops, prepared.jobs, prepared.environments, told)

    rates = search_rates(prepared, run)
    cells = grid_cells(prepared, rates)
    found = run(cells)
    ran = [Ran(cell, found[cell.key]) for cell in cells]
    findings = find(prepared, ran, metric)
    result = as_json(prepared, rates, ran, findings, metric)
    write_atomically(asked.out / RESULTS, lambda path: path.write_text(json.dumps(result, indent=1)))
    from declip.compare.report import write_report

    write_report(asked.out / REPORT, prepared, ran, findings, result)
    return result


def as_json(prepared: Prepared, rates: Rates, ran: Sequence[Ran], findings: Findings, metric: str) -> dict[str, Any]:
    def described(method: Method) -> dict[str, Any]:
        return {
            "name": method.name,
            "recipe": method.recipe,
            "changes": [*prepared.asked.changes, *method.changes],
            "flops_per_pair": prepared.flops[method.name],
            "rates": {
                str(fraction): {str(rate): score if math.isfinite(score) else None for rate, score in of.items()}
                for fraction, of in rates[method.name].items()
            },
        }

    by_key = {one.cell.key: one.found for one in ran}
    any_found = next((one.found for one in ran if not one.diverged), None)
    return {
        "declip": declip.__version__,
        "report": str(prepared.asked.out / REPORT),
        "data": list(prepared.asked.data),
        "judged": prepared.judged,
        "chance": {judged: chance(any_found, judged, metric) for judged in prepared.judged} if any_found else {},
        "metric": METRICS[metric][1],
        "metric_name": metric,
        "base": prepared.base.name,
        "pairs": {str(fraction): pairs for fraction, pairs in prepared.pairs.items()},
        "held_out": prepared.held_out,
        "pairs_seen": prepared.seen,
        "seeds": prepared.asked.seeds,
        "methods": [described(method) for method in prepared.methods],
        "lines": [line_json(line) for line in findings.lines],
        "factors": [
            {"method": line.method, "judged": line.judged, "view": line.view, **factor.as_json()}
            for line, factors in findings.factors
            for factor in factors
        ],
        "ablation": findings.ablation,
        "diverged": [{**one.cell.described(), "reason": one.found["reason"]} for one in ran if one.diverged],
        "runs": [{**one.cell.described(), "pairs_seen": one.cell.seen, "file": one.cell.file} for one in ran],
        "cells": len(by_key),
        "seconds": sum(found["wall_seconds"] for found in by_key.values()),
        "notes": [*prepared.notes, *_mixed(by_key.values())],
    }


def _mixed(found: Iterable[dict[str, Any]]) -> list[str]:
    """A note where cells of machines that compute otherwise stand beside each other; earlier cells do not say."""
    ways = sorted({one["computed"] for one in found if "computed" in one})
    said = f"Some runs were computed in {', some in '.join(ways)}: what differs may be that."
    return [said] if len(ways) > 1 else []


def plan(prepared: Prepared) -> dict[str, Any]:
    """How much there is to do, by the recipes' own rates: those of the search are not known yet."""
    guess: Rates = {m.name: {f: {1.0: 0.0} for f in prepared.searched} for m in prepared.methods}
    cells = {cell.key: cell for cell in grid_cells(prepared, guess)}
    tried = prepared.asked.rates if len(prepared.asked.rates) > 1 else ()
    for method in prepared.methods:
        for fraction in prepared.searched:
            cells |= {cell.key: cell for cell in (prepared.search(method, fraction, rate) for rate in tried)}
    left = [cell for cell in cells.values() if finished(prepared.asked.out, cell) is None]
    return {
        "cells": len(cells),
        "finished": len(cells) - len(left),
        "flops": sum(prepared.flops[cell.method] * cell.seen for cell in left),
        "pairs": {str(fraction): pairs for fraction, pairs in prepared.pairs.items()},
        "pairs_seen": prepared.seen,
        "batch_sizes": {f"{name}, {fraction}": batch for (name, fraction), batch in prepared.batches.items()},
        "flops_per_pair": prepared.flops,
        "jobs": prepared.jobs,
        "notes": prepared.notes,
    }
