"""Which ranks are late, without comparing clocks: in a collective, the rank that arrives last waits least."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from outlast.diagnostics.config import DiagnosticsConfig
from outlast.diagnostics.report.load import Floats, Steps

Bools = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.int64]
UNKNOWN_HOST = "unknown host"

MAD_TO_SIGMA = 1.4826
"""Standard deviation / median absolute deviation of normally distributed values."""
MEDIAN_ERROR = 1.2533
"""Standard error of a median, in standard deviations / sqrt(n)."""


@dataclass(frozen=True, kw_only=True)
class StragglerRow:
    """How late one rank was on one host. A rank that moved to another host has a row for each."""

    rank: int
    host: str
    straggler: bool
    median_lateness_ms: float
    """Median over the judged steps of: longest time any rank spent inside collectives, minus this rank's."""
    p90_lateness_ms: float
    behind_typical_ms: float
    """Median over the judged steps of: its lateness minus that of its median peer. The verdict is based on this."""
    noise_ms: float
    """Standard deviation of it from step to step, estimated from the median absolute deviation."""
    latest_share: float
    """Share of the judged steps in which it was the latest, or within its noise of the latest, not counting stragglers
    that are later."""
    slowdown_share: float
    """How much longer steps took because of this rank alone: 0.25 is 25 % longer. 0 unless it is a straggler."""
    steps: int
    """Judged steps: those that it and all its peers took while it was on this host, without warm-up."""
    longer: tuple[tuple[str, float], ...]
    """The parts of the step that took it longer than its median peer, in ms of the median step, largest first."""
    evidence: str


def lateness_s(collective_s: Floats) -> Floats:
    """[steps, ranks], seconds: the longest time any rank spent in collectives minus this rank's; NaN for one rank."""
    late = np.full_like(collective_s, np.nan)
    several = np.sum(np.isfinite(collective_s), axis=1) > 1
    if several.any():
        some = collective_s[several]
        late[several] = np.nanmax(some, axis=1, keepdims=True) - some
    return late


def rank_stragglers(
    steps: Steps, hosts: Mapping[tuple[int, int, int], str], config: DiagnosticsConfig
) -> tuple[StragglerRow, ...]:
    """Every rank on every host it had, the latest first.

    Args:
        steps: the last execution of every step.
        hosts: by (attempt, generation, rank).
        config: when a rank counts as a straggler.
    """
    if not steps.steps:
        return ()
    late = lateness_s(steps.values["collective_s"])
    judged = steps_after_warmup(steps, config.straggler_warmup_steps)
    subjects: dict[tuple[int, str], Indices] = {}  # (column, host): the steps in which it is judged
    for column, rank in enumerate(steps.ranks):
        groups: dict[str, list[int]] = {}
        for row in np.flatnonzero(judged & np.isfinite(late[:, column])):
            where = (steps.attempt[row], steps.generation[row], rank)
            groups.setdefault(hosts.get(where, UNKNOWN_HOST), []).append(int(row))
        subjects |= {(column, host): np.asarray(group) for host, group in groups.items()}
    # A straggler hides ranks that are less late. Name the latest, judge the others without it, and repeat.
    blamed = np.zeros_like(late, dtype=np.bool_)
    done: dict[tuple[int, str], StragglerRow] = {}
    while True:
        rows = {
            subject: _judge(steps, late, blamed, at, *subject, config)
            for subject, at in subjects.items()
            if subject not in done
        }
        found = {subject: row for subject, row in rows.items() if row.straggler}
        for column, host in found:
            blamed[subjects[column, host], column] = True
        done |= found
        if not found:
            break
    done |= rows
    ordered = sorted(
        done, key=lambda subject: (not done[subject].straggler, -done[subject].median_lateness_ms, subject)
    )
    return tuple(
        replace(done[subject], slowdown_share=_slowdown(steps, late, blamed, subjects[subject], subject[0]))
        if done[subject].straggler
        else done[subject]
        for subject in ordered
    )


def steps_after_warmup(steps: Steps, warmup_steps: int) -> Bools:
    """Which steps count for the verdict: all but the first ones of each start."""
    judged = np.ones(len(steps.steps), dtype=np.bool_)
    seen = 0
    start: tuple[int, int] | None = None
    for index, this in enumerate(zip(steps.attempt, steps.generation, strict=True)):
        seen = seen + 1 if this == start else 1
        start = this
        judged[index] = seen > warmup_steps
    return judged


def _judge(
    steps: Steps, late: Floats, blamed: Bools, at: Indices, column: int, host: str, config: DiagnosticsConfig
) -> StragglerRow:
    own = late[at, column]
    peers = np.delete(late[at], column, axis=1)
    behind = own - np.nanmedian(peers, axis=1)
    median_behind = float(np.median(behind))
    noise = MAD_TO_SIGMA * float(np.median(np.abs(behind - median_behind)))
    median_late = float(np.median(own))
    # the noise of a rank that is late every other step is as large as its lateness, but it is not always the latest
    tolerance = min(noise, median_late / 4)
    rivals = np.where(np.delete(blamed[at], column, axis=1) | np.isnan(peers), 0.0, peers)
    latest_share = float(np.mean(rivals.max(axis=1) - own <= tolerance))
    error = MEDIAN_ERROR * noise / len(at) ** 0.5
    step_s = float(np.median(np.nanmedian(steps.values["step_s"][at], axis=1)))
    straggler = (
        len(at) >= config.straggler_min_steps
        and median_behind >= max(config.straggler_min_s, config.straggler_share * step_s)
        and latest_share >= config.straggler_latest_share
        and median_behind >= config.straggler_noise * noise
        and median_behind >= config.straggler_sigmas * error
    )
    longer = _longer(steps, at, column)
    behind_ms = round(median_behind * 1e3, 1) + 0.0  # no "-0.0"
    evidence = (
        f"{median_late * 1e3:.1f} ms late in the median of {len(at)} steps, {behind_ms:.1f} ms behind its "
        f"median peer (noise {noise * 1e3:.1f} ms), the latest in {latest_share:.0%} of the steps"
    )
    if straggler and longer:
        evidence += f"; its own time per step is longer in {', '.join(f'{part} (+{ms:.1f} ms)' for part, ms in longer)}"
    return StragglerRow(
        rank=steps.ranks[column],
        host=host,
        straggler=straggler,
        median_lateness_ms=median_late * 1e3,
        p90_lateness_ms=float(np.percentile(own, 90)) * 1e3,
        behind_typical_ms=median_behind * 1e3,
        noise_ms=noise * 1e3,
        latest_share=latest_share,
        slowdown_share=0.0,
        steps=len(at),
        longer=longer,
        evidence=evidence,
    )


def _longer(steps: Steps, at: Indices, column: int) -> tuple[tuple[str, float], ...]:
    """Parts of the step, without communication, that took this rank at least 1 ms longer than its median peer."""
    values = {name: steps.values[name][at] for name in ("step_s", "data_s", "comm_s", "checkpoint_s")}
    parts = {
        "compute": values["step_s"] - values["data_s"] - values["comm_s"] - values["checkpoint_s"],
        "data": values["data_s"],
        "checkpoint": values["checkpoint_s"],
    }
    found = []
    for name, part in parts.items():
        peers = np.nanmedian(np.delete(part, column, axis=1), axis=1)
        more_ms = float(np.nanmedian(part[:, column] - peers)) * 1e3
        if more_ms >= 1.0:
            found.append((name, more_ms))
    return tuple(sorted(found, key=lambda item: -item[1]))


def _slowdown(steps: Steps, late: Floats, blamed: Bools, at: Indices, column: int) -> float:
    """The time that a straggler adds beyond the latest other rank, as a share of the step without it."""
    others = np.max(np.where(blamed[at] | np.isnan(late[at]), 0.0, late[at]), axis=1)
    lost = float(np.median(np.maximum(late[at, column] - others, 0.0)))
    without = float(np.median(np.nanmax(steps.values["step_s"][at], axis=1))) - lost
    return lost / without if without > 0 else 0.0
