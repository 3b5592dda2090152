"""When a series rose and stayed up: a change point, and then the proof that it is one.

The change point alone accuses too easily. It is believed if the medians before and after differ by enough, in most of
the steps since, up to the newest; so that a spike, and what has healed, is nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from outlast.diagnostics.syndromes.rules import Rules
from outlast.diagnostics.syndromes.trace import Bools, Floats, Ints

MAD_TO_SIGMA = 1.4826
MEDIAN_ERROR = 1.2533
CAP = 3.0
"""A single value counts for at most this many thresholds, so that a spike does not move the change point."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Shifts:
    """Of each series."""

    found: Bools
    """[series]: whether it rose, and is still up."""
    at: Ints
    """[series]: the index of the first step after; 0 where it was up from the beginning."""
    before: Floats
    """[series]: the median before; 0 where it was up from the beginning."""
    after: Floats
    """[series]: the median since."""
    share: Floats
    """[series]: the share of the steps since then in which it was up."""


def find_shifts(series: Floats, threshold: float, rules: Rules, *, from_start: bool) -> Shifts:
    """Find the steps from which on series are higher by a threshold.

    Args:
        series: [series, steps]: how much longer than usual, seconds; NaN is left out.
        threshold: in seconds.
        rules: how many steps, how persistent, how far above the noise.
        from_start: whether a series that was up in all of its steps counts; only where 0 means as its peers.
    """
    count, length = series.shape
    least = rules.slow_steps
    if length < least or not count:
        empty = np.zeros(count)
        return Shifts(
            found=np.zeros(count, dtype=np.bool_),
            at=np.zeros(count, dtype=np.int64),
            before=empty,
            after=empty,
            share=empty,
        )
    known = np.isfinite(series)
    middle = _median(series)
    values = np.where(known, series, middle[:, None])
    at = _change_points(np.clip(values, -CAP * threshold, CAP * threshold), least)
    steps = np.arange(length)
    since = steps[None, :] >= at[:, None]
    before, after = _median(np.where(since, np.nan, values)), _median(np.where(since, values, np.nan))
    always = (np.nan_to_num(before) >= threshold / 2) | (at == 0)
    if from_start:  # it was up before the change point, too
        at = np.where(always, 0, at)
        since = steps[None, :] >= at[:, None]
        after = _median(np.where(since, values, np.nan))
        before = np.where(always, 0.0, before)
    rise = after - np.nan_to_num(before)
    up = values - np.nan_to_num(before)[:, None] >= threshold / 2
    n_after = since.sum(axis=1)
    share = (up & since).sum(axis=1) / n_after
    newest = up[:, -least:].mean(axis=1)
    level = np.where(since, after[:, None], np.nan_to_num(before)[:, None])
    noise = MAD_TO_SIGMA * np.maximum(
        _median(np.abs(values - level)),
        # few values close to one another by chance are no proof: neighbours tell how much they usually differ
        _median(np.abs(np.diff(values, axis=1))) / np.sqrt(2.0),
    )
    n_before = np.maximum(length - n_after, 1)
    error = MEDIAN_ERROR * noise * np.sqrt(1.0 / n_after + np.where(at > 0, 1.0 / n_before, 0.0))
    found = (
        (rise >= threshold)
        & (rise >= rules.slow_noise * error)
        & (share >= rules.slow_persistence)
        & (newest >= rules.slow_persistence)
        & (n_after >= least)
        & (known.sum(axis=1) >= least)
    )
    if not from_start:
        found &= at >= least
    return Shifts(found=found, at=at, before=np.nan_to_num(before), after=after, share=share)


def _change_points(values: Floats, least: int) -> Ints:
    """[series]: where the mean rises most against the noise, with so many steps on either side; 0 if it never does."""
    count, length = values.shape
    if length < 2 * least:
        return np.zeros(count, dtype=np.int64)
    sums = np.cumsum(values, axis=1)
    cuts = np.arange(least, length - least + 1)
    head = sums[:, cuts - 1] / cuts
    tail = (sums[:, -1:] - sums[:, cuts - 1]) / (length - cuts)
    gain = (tail - head) * np.sqrt(cuts * (length - cuts) / length)
    best = gain.argmax(axis=1)
    rises = gain[np.arange(count), best] > 0
    return np.where(rises, cuts[best], 0)


def _median(values: Floats) -> Floats:
    """[series]: over the steps; NaN of none, without a warning."""
    known = np.isfinite(values)
    found = np.full(len(values), np.nan)
    some = known.any(axis=1)
    if some.any():
        found[some] = np.nanmedian(values[some], axis=1)
    return found


def recurring(series: Floats, threshold: float, rules: Rules) -> Bools:
    """[series]: whether it is up now and then, so often that it costs the threshold in the mean step.

    Args:
        series: [series, steps]: seconds longer than usual; NaN is left out.
        threshold: in seconds.
        rules: how often.
    """
    high = np.nan_to_num(series) > threshold
    times = high.sum(axis=1)
    cost = np.where(high, np.nan_to_num(series), 0.0).sum(axis=1)
    steps = np.maximum(np.isfinite(series).sum(axis=1), 1)
    # without its highest value, so that one long stall is not a habit
    highest = np.where(high, np.nan_to_num(series), 0.0).max(axis=1, initial=0.0)
    often = times >= np.maximum(rules.recurring_steps, rules.recurring_share * steps)
    found: Bools = often & (cost - highest >= threshold / 2 * steps)
    return found
