"""Reads the events of every attempt of a run, and lists what is missing or cannot be read."""

from __future__ import annotations

import json
import re
from array import array
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from outlast.diagnostics.live.kept import CollectivesKept
from outlast.diagnostics.live.step_delays import RankDelay
from outlast.diagnostics.monitor import NodeClock, NodeCondition, NodeMonitored
from outlast.diagnostics.syndromes.told import VerdictGiven
from outlast.errors import DiagnosticsError, NoEvents
from outlast.events import GoodputMeasured, ProgramStep, Record, StepDone, parse_event

Floats = npt.NDArray[np.float64]

STEP_FIELDS = (
    "loss",
    "lr",
    "tokens",
    "step_s",
    "data_s",
    "comm_s",
    "checkpoint_s",
    "collective_s",
    "codec_s",
    "wire_bytes",
    "dense_bytes",
)
OPTIONAL_FIELDS = ("grad_norm", "update_norm", "alpha", "residual", "batch_elements")
"""Measured in some runs or steps only; NaN in the others."""
UNTOLD: dict[str, float] = {"loss": np.nan, "lr": np.nan} | dict.fromkeys(
    ("tokens", "data_s", "comm_s", "checkpoint_s", "codec_s", "wire_bytes", "dense_bytes"), 0.0
)
"""Columns of a step of a program that tells nothing of itself."""
DELAYS = ("garbage_collection", "data_wait", "compile")
"""What kept a rank from its work, as the events call it."""
NODE_KINDS = (NodeClock.kind, NodeCondition.kind, NodeMonitored.kind, VerdictGiven.kind)
"""What launchers tell beside the ranks' own course."""
COLUMNS = ("attempt", "generation", "rank", "step", "t", *STEP_FIELDS, *OPTIONAL_FIELDS)
"""Of :attr:`Loaded.rows`."""


@dataclass(slots=True)
class Loaded:
    """The events of a run: steps as one table, everything else as records."""

    rows: Floats
    """[n, len(COLUMNS)]: attempt, generation, rank, step, t, then the fields; in the order they were read."""
    others: list[tuple[int, Record]]
    """(attempt, record) of all other events, oldest first; attempt 0 for the launchers' events."""
    missing: list[str]
    """What could not be read, as text for people."""
    spans: dict[int, tuple[float, float]]
    """The first and last ``t`` of each attempt's ranks."""
    nodes: list[Record] = field(default_factory=list)
    """What the nodes' monitors told, and the verdicts of node 0's launcher, oldest first."""
    kept: list[Record] = field(default_factory=list)
    """The collectives that ranks had entered last when some of them failed."""
    delays: array[float] = field(default_factory=lambda: array("d"))
    """[n, 8], flat: attempt, generation, rank, step, place in DELAYS, seconds, count, highest generation collected."""


@dataclass(slots=True)
class Steps:
    """The last execution of every step, as arrays of [steps, ranks]; NaN where a rank has no event of it."""

    steps: list[int]
    ranks: list[int]
    attempt: list[int]
    """The attempt whose execution of each step counts."""
    generation: list[int]
    values: dict[str, Floats] = field(default_factory=dict)
    """By STEP_FIELDS and OPTIONAL_FIELDS, and ``t``."""
    redone: int = 0
    """Executions that do not count because the step was executed again later."""


def load(run_dir: Path) -> Loaded:
    """Load all events of the run at ``run_dir``.

    Raises:
        DiagnosticsError: the directory does not exist or has no events, or their schema version is unknown.
    """
    if not run_dir.is_dir():
        raise DiagnosticsError(f"no run directory at {run_dir}", "give the path of a run, e.g. runs/NAME")
    files: list[tuple[int, Path]] = []
    for folder in sorted(run_dir.glob("attempts/[0-9]*")):
        if folder.name.isdecimal():
            files += [(int(folder.name), path) for path in sorted(folder.glob("events/rank_*.jsonl"))]
    launchers = sorted(run_dir.glob("events/agent_*.jsonl"))
    if not files and not launchers:
        raise NoEvents(
            f"{run_dir} contains no events", "give the directory of a run; its events are in attempts/NNNN/events/"
        )
    table = array("d")
    loaded = Loaded(np.empty((0, len(COLUMNS))), [], [], {})
    for attempt, path in [*files, *((0, path) for path in launchers)]:
        _read(path, attempt, table, loaded, path.relative_to(run_dir))
    loaded.rows = np.frombuffer(table, dtype=np.float64).reshape(-1, len(COLUMNS)) if table else loaded.rows
    loaded.others.sort(key=lambda item: item[1].t)
    loaded.nodes.sort(key=lambda record: record.t)
    _note_absent(loaded, files)
    return loaded


def _read(path: Path, attempt: int, table: array[float], loaded: Loaded, name: Path) -> None:
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        loaded.missing.append(f"{name} cannot be read: {error.strerror}")
        return
    if lines.pop():
        loaded.missing.append(
            f"{name}: the last line is incomplete and was skipped; its writer was killed while writing it"
        )
    torn = 0
    times = []
    for number, line in enumerate(lines, 1):
        try:
            record = parse_event(line, f"{path}:{number}")
        except DiagnosticsError:
            if _is_json(line):
                raise
            torn += 1
            continue
        if record.kind == GoodputMeasured.kind:
            continue  # it is computed from the others, at some later time
        times.append(record.t)
        if record.kind in NODE_KINDS:  # they tell of nodes, whatever becomes of the ranks
            loaded.nodes.append(record)
            continue
        if record.kind == CollectivesKept.kind:
            loaded.kept.append(record)
            continue
        if record.kind == RankDelay.kind:
            loaded.delays.extend(_delay_of(attempt, record))
            continue
        if record.kind in (StepDone.kind, ProgramStep.kind):
            try:
                row = row_of(attempt, record)
            except (KeyError, TypeError, ValueError) as error:
                raise DiagnosticsError(f"{path}:{number}: a step event without a valid {error}") from error
            table.extend(row)
        else:
            loaded.others.append((attempt, record))
    if torn:
        loaded.missing.append(f"{name}: {torn} unreadable line{'s' if torn > 1 else ''} skipped")
    if not times:
        loaded.missing.append(f"{name} contains no events")
    elif attempt:
        first, last = loaded.spans.get(attempt, (times[0], times[0]))
        loaded.spans[attempt] = (min(first, *times), max(last, *times))


def row_of(attempt: int, record: Record) -> list[float]:
    """A step's event as a row of :attr:`Loaded.rows`.

    Raises:
        KeyError, TypeError, ValueError: it lacks a value, or has one that is no number.
    """
    untold = UNTOLD if record.kind == ProgramStep.kind else {}
    told = [(untold | record.fields)[key] for key in STEP_FIELDS]
    told += [record.fields.get(key) for key in OPTIONAL_FIELDS]
    fields = [np.nan if value is None else float(value) for value in told]
    return [attempt, record.generation, record.rank, record.fields["step"], record.t, *fields]


def _delay_of(attempt: int, record: Record) -> list[float]:
    """A delay as a row of :attr:`Loaded.delays`; empty where the event is one of a version to come."""
    get = record.fields.get
    told = (get("step"), get("seconds"), get("count"), get("generation_collected") or 0)
    numbers = [float(one) for one in told if isinstance(one, (int, float))]
    if get("what") not in DELAYS or len(numbers) < len(told):
        return []
    step, *rest = numbers
    return [attempt, record.generation, record.rank, step, DELAYS.index(str(get("what"))), *rest]


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _note_absent(loaded: Loaded, files: list[tuple[int, Path]]) -> None:
    """Note the ranks of each attempt that have no event file."""
    worlds = {attempt: int(one["world_size"]) for attempt, one in loaded.others if one.kind == "run_started"}
    for attempt, world_size in sorted(worlds.items()):
        found = set()
        for owner, path in files:
            match = re.fullmatch(r"rank_(\d+)\.jsonl", path.name)
            if owner == attempt and match:
                found.add(int(match[1]))
        absent = sorted(set(range(world_size)) - found)
        if absent:
            names = ", ".join(map(str, absent[:8])) + (" ..." if len(absent) > 8 else "")
            loaded.missing.append(
                f"attempt {attempt}: no events of rank{'s' if len(absent) > 1 else ''} {names} (of {world_size})"
            )


def last_executions(rows: Floats) -> Steps:
    """The last execution of every step: that of the newest (attempt, generation) in which any rank finished it."""
    if len(rows) == 0:
        return Steps([], [], [], [])
    starts, start = np.unique(rows[:, :2], axis=0, return_inverse=True)
    start = start.reshape(-1)
    steps, step = np.unique(rows[:, 3], return_inverse=True)
    ranks, rank = np.unique(rows[:, 2], return_inverse=True)
    newest = np.zeros(len(steps), dtype=np.int64)
    np.maximum.at(newest, step, start)
    executed = np.unique(np.stack([step, start]), axis=1).shape[1]
    kept = start == newest[step]
    found = Steps(
        steps=[int(one) for one in steps],
        ranks=[int(one) for one in ranks],
        attempt=[int(starts[one, 0]) for one in newest],
        generation=[int(starts[one, 1]) for one in newest],
        redone=executed - len(steps),
    )
    for column, name in enumerate(COLUMNS[4:], 4):
        values = np.full((len(steps), len(ranks)), np.nan)
        values[step[kept], rank[kept]] = rows[kept, column]
        found.values[name] = values
    return found
