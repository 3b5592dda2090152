"""How the starts of a run ended: which rank hung or failed, and which ranks waited in which collectives by then."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from outlast.diagnostics.live.kept import CollectivesKept, collectives_of
from outlast.diagnostics.live.recorder import Collective
from outlast.diagnostics.report.incidents import LOST_PEER, SAME_RESTART_S
from outlast.diagnostics.report.load import Loaded
from outlast.errors import DiagnosticsError
from outlast.events import HangFound, Record, RunStarted, WorkersFailed, WorkersStarted


@dataclass(slots=True, kw_only=True)
class Ending:
    """One failure of a start's ranks, as their launchers told it. Times are seconds since the epoch by node 0's clock;
    those of collectives are by the clock of their rank's node."""

    generation: int
    t: float
    """When the first word of it was written."""
    last_t: float
    culprit: int | None = None
    """The rank at fault; None while nothing tells it from the others."""
    hung_for_s: float | None = None
    """How long the culprit had made no progress, if it hung."""
    why: str = ""
    """How it is known that the culprit is at fault, or how it ended."""
    failed: dict[int, str] = field(default_factory=dict)
    """By rank, how its process ended, as far as that was told."""
    collectives: dict[int, tuple[Collective, ...]] = field(default_factory=dict)
    """By rank, the newest collectives that it had entered, oldest first."""
    written_t: list[float] = field(default_factory=list)
    """When each word of it was written, by the clock of who wrote it."""
    entered: dict[int, int] = field(default_factory=dict)
    """By rank, how many collectives it had entered in this start."""

    def waiting(self) -> dict[int, Collective]:
        """By rank, the oldest collective that it was in; without the culprit."""
        pending = {
            rank: next((one for one in kept if one.completed_s is None), None)
            for rank, kept in self.collectives.items()
            if rank != self.culprit
        }
        return {rank: one for rank, one in pending.items() if one is not None}


def find_endings(loaded: Loaded, ahead_s: Mapping[str, float]) -> list[Ending]:
    """The endings of all starts, oldest first.

    Args:
        loaded: the run's events.
        ahead_s: by host, how far its clock is ahead of node 0's.

    Raises:
        DiagnosticsError: collectives that were kept have a shape that this version of outlast does not know.
    """
    found: list[Ending] = []
    open_one: Ending | None = None
    for t, record in _in_order(loaded, ahead_s):
        if record.kind == WorkersStarted.kind:
            open_one = None
            continue
        if open_one is None or open_one.generation != record.generation or t - open_one.last_t > SAME_RESTART_S:
            open_one = Ending(generation=record.generation, t=t, last_t=t)
            found.append(open_one)
        open_one.last_t = t
        open_one.written_t.append(record.t)
        _add(open_one, record)
    for one in found:
        _settle(one)
    return found


def _in_order(loaded: Loaded, ahead_s: Mapping[str, float]) -> list[tuple[float, Record]]:
    """What launchers told of starts and failures, with node 0's time of it, oldest first."""
    kinds = (HangFound.kind, WorkersFailed.kind, WorkersStarted.kind)
    told = [record for _, record in loaded.others if record.kind in kinds and record.rank < 0]
    hosts = {
        (record.generation, record.rank): str(record.fields.get("host"))
        for _, record in loaded.others
        if record.kind == RunStarted.kind
    }

    def here_t(record: Record) -> float:
        rank = record.fields.get("of_rank", record.fields.get("culprit"))
        host = record.fields.get("host") or hosts.get((record.generation, -1 if rank is None else int(rank)), "")
        return record.t - ahead_s.get(str(host), 0.0)

    return sorted(((here_t(record), record) for record in (*told, *loaded.kept)), key=lambda one: one[0])


def _add(ending: Ending, record: Record) -> None:
    get = record.fields.get
    if record.kind == CollectivesKept.kind:
        try:
            rank, collectives = int(record["of_rank"]), collectives_of(record)
            ending.entered[rank] = int(record["entered"])
        except (KeyError, TypeError, ValueError) as error:
            raise DiagnosticsError(
                f"the kept collectives of {record.t:.3f} cannot be read: {error!r}",
                "a newer outlast may have written them",
            ) from error
        ending.collectives[rank] = collectives
    elif record.kind == HangFound.kind:
        if ending.hung_for_s is None and isinstance(get("culprit"), int):
            ending.culprit, ending.hung_for_s = get("culprit"), float(get("silent_s") or 0.0)
            ending.why = str(get("evidence"))
    else:
        ending.failed |= dict(zip(get("ranks") or (), map(str, get("reasons") or ()), strict=False))


def _settle(ending: Ending) -> None:
    """Of ranks that failed and did not hang, the first that does not merely say that it lost another one."""
    if ending.culprit is not None:
        return
    for rank, why in ending.failed.items():
        if not any(words in why for words in LOST_PEER):
            ending.culprit, ending.why = rank, why
            return
