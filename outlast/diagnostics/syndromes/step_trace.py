"""A trace from the steps that ranks have told of, where their collectives are not known one by one.

A step is told as one meeting of all ranks at its end: what a rank spent inside collectives is how long it was inside,
so that who waits least came last, as in the report. It tells who is slow, across nodes and without comparing clocks,
from two numbers a step.
"""

from __future__ import annotations

import base64
import binascii
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from outlast.diagnostics.syndromes.facts import FactKind
from outlast.diagnostics.syndromes.others import Floats, median_of_others
from outlast.diagnostics.syndromes.trace import RUNNING, Calls, Clocks, Ints, Job, Signs, Trace
from outlast.errors import DiagnosticsError

MOST_STEPS = 48
"""Steps of a rank that are told, the newest."""
DELAYS: tuple[FactKind, ...] = ("garbage_collection", "data_wait", "compile", "checkpoint")
"""What a rank tells of that kept it from its work in a step."""
_ROW = np.dtype(
    [
        *(("step", "<i4"), ("done_s", "<f4"), ("inside_s", "<f4"), ("elements", "<f4")),
        ("delays_s", "<f2", (len(DELAYS),)),  # to a thousandth of it
    ]
)
_LONGEST_DELAY_S = 60000.0
"""What two bytes hold."""
_LEAST_INSIDE_S = 1e-6
"""A rank that did not wait at all was inside nevertheless."""
_GROUP = "all ranks"


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSteps:
    """The newest steps of one rank, ascending: one value for each."""

    rank: int
    steps: tuple[int, ...]
    done_s: tuple[float, ...]
    """When each ended: seconds after some moment that is the same for all ranks of the node, or before it."""
    inside_s: tuple[float, ...]
    """Seconds of it inside collectives."""
    delays_s: tuple[tuple[float, ...], ...] = ()
    """Seconds of it in each of :data:`DELAYS`; empty if none is known."""
    elements: tuple[float, ...] = ()
    """Of its batches, or tokens; 0 where that is not known. Empty if none is."""

    def encode(self) -> str:
        """As text of at most 1,536 bytes; times and sizes are exact to a part in ten million, delays in a thousand."""
        rows = np.zeros(len(self.steps), dtype=_ROW)
        rows["step"], rows["done_s"], rows["inside_s"] = self.steps, self.done_s, self.inside_s
        if self.delays_s:
            rows["delays_s"] = np.minimum(self.delays_s, _LONGEST_DELAY_S)
        if self.elements:
            rows["elements"] = self.elements
        return base64.b64encode(rows[-MOST_STEPS:].tobytes()).decode()


def decode_steps(rank: int, text: str) -> RankSteps:
    """What :meth:`RankSteps.encode` wrote.

    Raises:
        DiagnosticsError: it is something else.
    """
    try:
        raw = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise DiagnosticsError(f"the steps of rank {rank} are unreadable: {error}") from error
    if len(raw) % _ROW.itemsize or len(raw) > MOST_STEPS * _ROW.itemsize:
        raise DiagnosticsError(f"the steps of rank {rank} have {len(raw)} bytes")
    rows = np.frombuffer(raw, dtype=_ROW)
    if not all(np.isfinite(rows[name]).all() for name in ("done_s", "inside_s", "elements", "delays_s")):
        raise DiagnosticsError(f"the steps of rank {rank} have times that are none")
    return RankSteps(
        rank=rank,
        steps=tuple(rows["step"].tolist()),
        done_s=tuple(rows["done_s"].tolist()),
        inside_s=tuple(rows["inside_s"].tolist()),
        delays_s=tuple(map(tuple, rows["delays_s"].tolist())) if rows["delays_s"].any() else (),
        elements=tuple(rows["elements"].tolist()) if rows["elements"].any() else (),
    )


@dataclass(frozen=True, kw_only=True)
class NodeSteps:
    """The steps of one node's ranks."""

    node: str
    """Its name, which no other node has."""
    now_s: float
    """When they were told, after the same moment."""
    ranks: Sequence[RankSteps]


def without_gaps(nodes: Sequence[NodeSteps]) -> list[NodeSteps]:
    """As if the steps that are told had come one right after the other.

    Between two of them may be others in which nobody looked at collectives. Those, and a step that only some ranks tell
    of, are taken out of the time, for all ranks alike: what is left between two steps is as much as one takes on
    average. The newest steps stay, which some ranks may not have told of yet, and the oldest.

    Args:
        nodes: of every node.
    """
    told = [dict(zip(one.steps, one.done_s, strict=True)) for node in nodes for one in node.ranks if one.steps]
    if not told:
        return list(nodes)
    oldest, newest = max(min(one) for one in told), min(max(one) for one in told)
    common = set(told[0]).intersection(*told)
    kept = sorted({step for one in told for step in one if step in common or step > newest or step < oldest})
    later_s = dict.fromkeys(kept, 0.0)
    shift_s = 0.0
    for before, after in reversed(list(itertools.pairwise(kept))):
        apart_s = [one[after] - one[before] for one in told if before in one and after in one]
        if after - before > 1 and apart_s:
            shift_s += float(np.median(apart_s)) * (1 - 1 / (after - before))
        later_s[before] = shift_s
    return [replace(node, ranks=[_only(one, later_s) for one in node.ranks]) for node in nodes]


def _only(one: RankSteps, later_s: Mapping[int, float]) -> RankSteps:
    """These steps of a rank, each later by so many seconds."""
    at = [place for place, step in enumerate(one.steps) if step in later_s]
    return RankSteps(
        rank=one.rank,
        steps=tuple(one.steps[place] for place in at),
        done_s=tuple(one.done_s[place] + later_s[one.steps[place]] for place in at),
        inside_s=tuple(one.inside_s[place] for place in at),
        delays_s=tuple(one.delays_s[place] for place in at) if one.delays_s else (),
        elements=tuple(one.elements[place] for place in at) if one.elements else (),
    )


def trace_of_steps(nodes: Sequence[NodeSteps], *, world_size: int) -> Trace | None:
    """The trace of a job from the steps of all its ranks; None while not all have told of a step.

    Args:
        nodes: of every node.
        world_size: how many ranks the job has. All are taken to do the same work.
    """
    told = {one.rank: (one, at) for at, node in enumerate(nodes) for one in node.ranks if one.steps}
    if sorted(told) != list(range(world_size)):
        return None
    ranks = [told[rank] for rank in range(world_size)]
    counts = [len(one.steps) for one, _ in ranks]
    rank = np.repeat(np.arange(world_size), counts)
    step = np.asarray([value for one, _ in ranks for value in one.steps], dtype=np.int64)
    done = np.asarray([value for one, _ in ranks for value in one.done_s])
    inside = np.maximum([value for one, _ in ranks for value in one.inside_s], _LEAST_INSIDE_S)
    # a rank is in none of its collectives before its step before has ended, whatever overlaps there
    before = np.append(-math.inf, done[:-1])
    before[np.cumsum([0, *counts[:-1]])] = -math.inf
    enter = np.minimum(np.maximum(done - inside, before), done - _LEAST_INSIDE_S)
    # the newest step counts once the next one has begun: here it has, as soon as it is told
    last = np.cumsum(counts) - 1
    rank, step = np.append(rank, rank[last]), np.append(step, step[last] + 1)
    enter, done = np.append(enter, done[last]), np.append(done, done[last])
    zero = np.zeros(len(rank), dtype=np.int64)
    return Trace(
        job=Job(
            nodes=tuple(node.node for node in nodes),
            node_of=np.asarray([at for _, at in ranks], dtype=np.int64),
            role_of=np.zeros(world_size, dtype=np.int64),
            groups=(_GROUP,),
            members=(np.arange(world_size),),
        ),
        calls=Calls(
            rank=rank,
            group=zero,
            seq=step,
            op=zero,
            nbytes=zero,
            dtype=zero,
            step=step,
            enter_s=enter,
            done_s=done,
            peer=zero - 1,
            ops=("all_reduce",),
        ),
        signs=Signs(
            state=np.full(world_size, RUNNING, dtype=np.int64),
            phase=np.full(world_size, "step"),
            step=np.asarray([one.steps[-1] for one, _ in ranks], dtype=np.int64),
            beat_s=np.asarray([one.done_s[-1] for one, _ in ranks]),
            idle_s=np.zeros(world_size),
        ),
        clocks=Clocks.alike([node.now_s for node in nodes]),
    )


def newest_common_step(nodes: Iterable[NodeSteps]) -> int:
    """The newest step that all of these ranks have told of; -1 if there is none."""
    return min((one.steps[-1] if one.steps else -1 for node in nodes for one in node.ranks), default=-1)


def behind_s(nodes: Iterable[NodeSteps], ranks: Iterable[int], newest: int = 10) -> dict[int, float]:
    """By rank, seconds a step that it comes later than the median of all others: in the median of the newest steps.

    Args:
        nodes: the steps of all ranks.
        ranks: of these.
        newest: how many of the steps that all have.
    """
    table = table_of(nodes, newest)
    if not len(table.steps) or len(table.ranks) < 2:
        return {}
    row = {rank: at for at, rank in enumerate(table.ranks)}
    behind = median_of_others(table.inside_s) - table.inside_s
    return {rank: float(np.median(behind[:, row[rank]])) for rank in ranks if rank in row}


def transfer_s(nodes: Iterable[NodeSteps], newest: int = 10) -> float:
    """Seconds a step that collectives take once all ranks are there, in the median of the newest steps; NaN of none."""
    table = table_of(nodes, newest)
    return float(np.median(table.inside_s.min(axis=1))) if table.inside_s.size else math.nan


@dataclass(frozen=True, kw_only=True, eq=False)
class StepTable:
    """The steps that all ranks have told of."""

    steps: Ints
    """[steps], ascending."""
    ranks: tuple[int, ...]
    nodes: tuple[str, ...]
    """By rank, where it is."""
    done_s: Floats
    """[steps, ranks], after the moment of the rank's node."""
    inside_s: Floats
    """[steps, ranks]."""
    delays_s: dict[FactKind, Floats]
    """[steps, ranks] each: of what was so at least once."""
    elements: Floats | None
    """[steps, ranks]; NaN where it is not known. None if it is nowhere."""


def table_of(nodes: Iterable[NodeSteps], newest: int = MOST_STEPS) -> StepTable:
    """What ranks told of the steps that all of them have, at most so many of the newest."""
    told = sorted(((one, node.node) for node in nodes for one in node.ranks), key=lambda item: item[0].rank)
    sets = [set(one.steps) for one, _ in told]
    common = np.asarray(sorted(set.intersection(*sets))[-newest:] if sets else [], dtype=np.int64)
    shape = len(common), len(told)
    done_s, inside_s, elements = np.empty(shape), np.empty(shape), np.zeros(shape)
    delays_s: dict[FactKind, Floats] = {}
    for column, (one, _) in enumerate(told):
        at = np.searchsorted(one.steps, common)
        done_s[:, column] = np.asarray(one.done_s)[at]
        inside_s[:, column] = np.asarray(one.inside_s)[at]
        if one.elements:
            elements[:, column] = np.asarray(one.elements)[at]
        if one.delays_s:
            for kind, seconds in zip(DELAYS, np.asarray(one.delays_s)[at].T, strict=True):
                if seconds.any():
                    delays_s.setdefault(kind, np.zeros(shape))[:, column] = seconds
    return StepTable(
        steps=common,
        ranks=tuple(one.rank for one, _ in told),
        nodes=tuple(node for _, node in told),
        done_s=done_s,
        inside_s=inside_s,
        delays_s=delays_s,
        elements=np.where(elements > 0, elements, np.nan) if elements.any() else None,
    )
