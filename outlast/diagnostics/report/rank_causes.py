"""Why a rank was late, as the rank itself has seen it: what it did in the very steps in which it was late."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from outlast.diagnostics import formatting as fmt
from outlast.diagnostics.report.delays import Delays
from outlast.diagnostics.report.load import Floats, Steps
from outlast.diagnostics.syndromes.own_times import OwnTimes
from outlast.diagnostics.syndromes.rules import Rules

Bools = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.int64]

EXPLAINED_SHARE = Rules.explained_share
"""Of the seconds that a rank was late, what a cause has to explain, step by step."""
COLUMNS = {"data_wait": "data_s", "checkpoint": "checkpoint_s"}
"""What has a column of its own in the steps."""
SEEN_SHARE = 0.1
"""Of a step's lateness, from which on a cause counts as seen in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankCause:
    """Why a rank was late."""

    name: str
    """``garbage collection``."""
    words: str
    """With its values: ``garbage collection: 1.9 s in 18 of 20 steps (36 collections, up to generation 2)``."""
    explained_s: float


class RankCauses:
    """What ranks told of themselves, for the steps that count.

    Args:
        steps: the last execution of every step.
        delays: of the same steps.
    """

    def __init__(self, steps: Steps, delays: Delays) -> None:
        self._steps = steps
        self._delays = delays
        told = {what: seconds for what in delays.by_what if (seconds := delays.seconds(what)) is not None}
        self._own = OwnTimes(
            seconds=told
            | {what: np.nan_to_num(steps.values[name]) for what, name in COLUMNS.items() if name in steps.values},
            elements=_elements(steps),
            work_s=_work_s(steps),
        )

    def of(self, column: int, at: Indices, behind_s: Floats) -> RankCause | None:
        """What explains that a rank was late; None if nothing that is known does.

        Args:
            column: of the rank.
            at: the rows of the steps in question.
            behind_s: [at], seconds by which it was behind its median peer there.
        """
        behind_s = np.maximum(np.nan_to_num(behind_s), 0.0)
        needed_s = EXPLAINED_SHARE * float(behind_s.sum())
        if needed_s <= 0:
            return None
        found = [
            one
            for one in (
                self._collections(column, at, behind_s),
                self._compilations(column, at, behind_s),
                self._timed("data_wait", "waiting for its data", column, at, behind_s),
                self._timed("checkpoint", "checkpointing", column, at, behind_s),
                self._work(column, at, behind_s),
            )
            if one is not None and one.explained_s >= needed_s
        ]
        return max(found, key=lambda one: one.explained_s, default=None)

    def of_all(self, at: Indices, counted: Bools, lost_s: float) -> str:
        """``collecting garbage`` or ``compiling``, if all ranks lost most of the time with it; else empty.

        Args:
            at: the rows of the steps in question.
            counted: [steps], those from which the usual is learned.
            lost_s: what they took longer than usual, seconds.
        """
        for what, words in (("compile", "compiling"), ("garbage_collection", "collecting garbage")):
            seconds = self._delays.seconds(what)
            if seconds is not None:
                more_s = seconds[at].sum(axis=0) - np.median(seconds[counted], axis=0) * len(at)
                if more_s.min() > EXPLAINED_SHARE * lost_s:
                    return words
        return ""

    def _collections(self, column: int, at: Indices, behind_s: Floats) -> RankCause | None:
        more_s = self._own.beyond_s("garbage_collection", column, at)
        if more_s is None:
            return None
        seconds, counts, generations = (values[at, column] for values in self._delays.by_what["garbage_collection"])
        times = int(counts.sum())
        detail = f" ({times} collection{'s' if times != 1 else ''}, up to generation {int(generations.max())})"
        return _cause("garbage collection", more_s, behind_s, seconds, detail)

    def _compilations(self, column: int, at: Indices, behind_s: Floats) -> RankCause | None:
        more_s = self._own.beyond_s("compile", column, at)
        if more_s is None:
            return None
        seconds, counts, _ = (values[at, column] for values in self._delays.by_what["compile"])
        times = int(counts.sum())
        return _cause("compilation", more_s, behind_s, seconds, f" ({times} time{'s' if times != 1 else ''})")

    def _timed(self, what: str, name: str, column: int, at: Indices, behind_s: Floats) -> RankCause | None:
        more_s = self._own.beyond_s(what, column, at)
        if more_s is None:
            return None
        return _cause(name, more_s, behind_s, self._own.seconds[what][at, column], "")

    def _work(self, column: int, at: Indices, behind_s: Floats) -> RankCause | None:
        more_s = self._own.by_work_s(column, at, behind_s)
        if more_s is None or self._own.elements is None:
            return None
        more, elements = more_s > 0, self._own.elements[at]
        own, typical = np.median(elements[more, column]), np.nanmedian(np.delete(elements[more], column, axis=1))
        return RankCause(
            name="uneven work",
            words=f"uneven work (batch of {own:.0f} elements against a median of {typical:.0f})",
            explained_s=float(np.minimum(more_s, behind_s).sum()),
        )


def _elements(steps: Steps) -> Floats | None:
    """[steps, ranks]: elements of batches, or tokens, where either is told by a rank; None if nobody tells."""
    if not steps.steps:
        return None
    elements, tokens = steps.values["batch_elements"], steps.values["tokens"]
    told: Floats = elements if np.isfinite(elements).any() else np.where(tokens > 0, tokens, np.nan)
    return told if np.isfinite(told).any() and len(steps.ranks) > 1 else None


def _work_s(steps: Steps) -> Floats | None:
    """[steps, ranks]: of each step, outside collectives and without waiting for data."""
    if not steps.steps:
        return None
    values = steps.values
    work_s: Floats = values["step_s"] - values["collective_s"] - values["data_s"]
    return work_s


def _cause(name: str, more_s: Floats, behind_s: Floats, seconds: Floats, detail: str) -> RankCause:
    seen: Bools = (more_s > SEEN_SHARE * behind_s) & (more_s > 0)
    which = f"{int(seen.sum())} of {len(seen)} step{'s' if len(seen) != 1 else ''}"
    return RankCause(
        name=name,
        words=f"{name}: {fmt.duration(float(seconds.sum()))} in {which}{detail}",
        explained_s=float(np.minimum(more_s, behind_s).sum()),
    )
