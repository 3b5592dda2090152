"""The heat map of lateness: a row for each rank, or for several that are alike where there are many."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from outlast.diagnostics.report.bins import bins_of, edges_of, mean_and_most, rounded
from outlast.diagnostics.report.load import Floats
from outlast.diagnostics.report.model import Report

MOST_BINS = 240
MOST_ROWS = 160
"""Rows of ranks; more than that would be thinner than a pixel is worth."""
MOST_ALONE = 40
"""Ranks with a row of their own where others share one: stragglers, and ranks of incidents and slow phases."""


def heat_data(report: Report) -> dict[str, Any]:
    """What the script draws. A row of several ranks shows the latest of them in each bin, so that none is hidden."""
    late = report.lateness
    heat = np.asarray(late.late_ms, dtype=np.float64).reshape(len(late.ranks), len(late.steps))
    finite = heat[np.isfinite(heat)]
    # the scale reaches at least twice the straggler threshold, so that noise stays dark
    limits = report.thresholds
    least_ms = 2e3 * max(limits.straggler_min_s, limits.straggler_share * report.facts.median_step_s)
    top_ms = max(least_ms, float(np.percentile(finite, 99)) if len(finite) else 0.0)
    del finite
    edges = edges_of(len(late.steps), MOST_BINS)
    mean, most = mean_and_most(heat, edges)
    medians = _medians_ms(report, heat)
    guilty = {row.rank for row in report.stragglers if row.straggler}
    rows = _rows(report, guilty)
    return {
        "ranks": [late.ranks[low] for low, _ in rows],
        "last_ranks": [late.ranks[high - 1] for _, high in rows],
        "hosts": [_hosts(late.hosts[low:high]) for low, high in rows],
        "guilty": [any(rank in guilty for rank in late.ranks[low:high]) for low, high in rows],
        "bins": bins_of(late.steps, edges),
        "mean": [rounded(_latest(mean[low:high]), 2) for low, high in rows],
        "most": [rounded(_latest(most[low:high]), 2) for low, high in rows],
        "median": [round(float(np.max(medians[low:high])), 2) for low, high in rows],
        "top_ms": top_ms,
    }


def _latest(values: Floats) -> Floats:
    """[bins]: the maximum over the ranks of a row, NaN where none of them has a value."""
    highest: Floats = np.fmax.reduce(values, axis=0)
    return highest


def _medians_ms(report: Report, heat: Floats) -> Floats:
    """Each rank's median lateness as in the ranking; over all steps if it had several hosts, or no verdict."""
    judged: dict[int, list[float]] = {}
    for row in report.stragglers:
        judged.setdefault(row.rank, []).append(row.median_lateness_ms)
    found = []
    for rank, late_ms in zip(report.lateness.ranks, heat, strict=True):
        known = judged.get(rank, [])
        finite = late_ms[np.isfinite(late_ms)] if len(known) != 1 else late_ms[:0]
        found.append(known[0] if len(known) == 1 else float(np.median(finite)) if len(finite) else 0.0)
    return np.asarray(found)


def _rows(report: Report, guilty: set[int]) -> list[tuple[int, int]]:
    """The places of the first and the one after the last rank of each row."""
    ranks = report.lateness.ranks
    if len(ranks) <= MOST_ROWS:
        return [(place, place + 1) for place in range(len(ranks))]
    named = [row.rank for row in report.stragglers if row.straggler]
    named += [one.rank for one in sorted(report.slow_phases, key=lambda one: -one.cost_s)]
    named += [one.rank for one in report.incidents if one.rank is not None]
    alone = set(list(dict.fromkeys(named))[:MOST_ALONE])
    # each rank with a row of its own may cut a row of others in two
    each = math.ceil(len(ranks) / max(1, MOST_ROWS - 2 * len(alone)))
    rows: list[tuple[int, int]] = []
    for place, rank in enumerate(ranks):
        low = rows[-1][0] if rows else 0
        apart = rank in alone or (rows and ranks[low] in alone) or place // each != low // each
        if rows and not apart:
            rows[-1] = (low, place + 1)
        else:
            rows.append((place, place + 1))
    return rows


def _hosts(hosts: tuple[str, ...]) -> str:
    different = list(dict.fromkeys(hosts))
    return different[0] if len(different) == 1 else f"{different[0]} to {different[-1]}"
