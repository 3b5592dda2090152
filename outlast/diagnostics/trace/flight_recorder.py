"""The collectives that were kept when ranks failed, as dumps that torch's own analyser reads (``torchfrtrace DIR``).

The analyser takes pickles only. These are written for it when they are asked for, and hold plain values; see
:mod:`outlast.diagnostics.trace.plain_pickle`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outlast.diagnostics.live.flight import POINT_TO_POINT
from outlast.diagnostics.live.recorder import Collective
from outlast.diagnostics.report.endings import Ending, find_endings
from outlast.diagnostics.report.incidents import names_of
from outlast.diagnostics.report.load import Loaded, load
from outlast.diagnostics.trace.plain_pickle import plain_pickle
from outlast.errors import DiagnosticsError
from outlast.events import RunStarted, WorkersStarted

VERSION = "2.10"
"""Of the dumps, as torch 2.13 writes them."""
OPS = frozenset(
    (
        *("broadcast", "_broadcast_oop", "reduce", "_reduce_oop", "all_reduce", "all_reduce_barrier", "barrier"),
        *("allreduce_coalesced", "all_gather", "all_gather_single", "all_gather_v", "_all_gather_base"),
        *("all_gather_into_tensor_coalesced", "reduce_scatter", "reduce_scatter_single", "reduce_scatter_v"),
        *("_reduce_scatter_base", "reduce_scatter_tensor_coalesced", "gather", "scatter"),
        *("all_to_all", "all_to_all_single", "all_to_all_v_single"),
    )
)
"""What the analyser knows; it ends at anything else."""
WHOLE = ("", "default_pg")
"""Descriptions of groups that have all ranks."""
_GATHERS = ("all_gather", "_all_gather_base", "all_gather_single", "all_gather_into_tensor_coalesced")
_SCATTERS = ("reduce_scatter", "_reduce_scatter_base", "reduce_scatter_single", "reduce_scatter_tensor_coalesced")


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written."""

    ranks: tuple[int, ...]
    culprit: int | None
    """The rank that outlast holds at fault in the same failure."""
    notes: tuple[str, ...]
    """What is not in the dumps, and what follows from that, as text for people."""


def export_flight_recorder(run_dir: Path | str, folder: Path) -> Exported:
    """Write the collectives of the newest failure of the run, one file a rank: ``folder/rank_0`` and so on.

    Sizes are in bytes: that is what the recorder keeps. The members of a group are the ranks that entered something in
    it; of the default group, all ranks.

    Args:
        run_dir: the run's directory.
        folder: made if it does not exist; else it must be empty, for the analyser reads whatever is there.

    Raises:
        DiagnosticsError: no collectives were kept, or the folder holds something or cannot be written.
    """
    run_dir = Path(run_dir)
    loaded = load(run_dir)
    endings = [one for one in find_endings(loaded, {}) if any(one.collectives.values())]
    if not endings:
        raise DiagnosticsError(
            f"{run_dir} holds no collectives",
            "launchers keep them when ranks hang or fail under `outlast launch`; there was none, or an older "
            "version wrote the events",
        )
    ending = endings[-1]
    world = range(_world_size(loaded, ending))
    dumps, notes = _dumps(ending, world)
    _write(dumps, folder)
    silent = sorted(set(world) - dumps.keys())
    if silent:
        notes.append(f"{names_of(silent)} left no collectives, and no dump: give the analyser --allow-incomplete-ranks")
    return Exported(ranks=tuple(sorted(dumps)), culprit=ending.culprit, notes=tuple(notes))


def _world_size(loaded: Loaded, ending: Ending) -> int:
    told = [
        int(record.fields.get("world_size", 0))
        for _, record in loaded.others
        if record.kind == RunStarted.kind and record.generation == ending.generation and record.t < ending.last_t
    ]
    launched = [
        int(rank) + 1
        for _, record in loaded.others
        if record.kind == WorkersStarted.kind and record.t < ending.last_t
        for rank in record.fields.get("ranks") or ()
    ]
    return told[-1] if told else max((*launched, *(rank + 1 for rank in ending.collectives)), default=0)


def _dumps(ending: Ending, world: range) -> tuple[dict[int, dict[str, Any]], list[str]]:
    """By rank, its dump; and what is left out of them."""
    entries: dict[int, list[dict[str, Any]]] = {}
    members: dict[str, set[int]] = {}
    unknown: set[str] = set()
    for rank, collectives in sorted(ending.collectives.items()):
        for one in collectives:
            if one.op not in OPS or one.group.startswith(POINT_TO_POINT):
                unknown.add(one.op)
                continue
            members.setdefault(one.group, set()).add(rank)
            entries.setdefault(rank, []).append({})
    for group, ranks in members.items():
        if _named(group)[1] in WHOLE:
            ranks.update(world)
    for rank, mine in entries.items():
        kept = [one for one in ending.collectives[rank] if one.op in OPS and not one.group.startswith(POINT_TO_POINT)]
        mine[:] = [_entry(one, len(members[one.group])) for one in kept]
    dumps = {
        rank: {"version": VERSION, "entries": mine, "pg_config": _groups(rank, members), "pg_status": {}}
        for rank, mine in entries.items()
    }
    notes = [f"left out, for the analyser does not know them: {', '.join(sorted(unknown))}"] if unknown else []
    return dumps, notes


def _groups(rank: int, members: Mapping[str, set[int]]) -> dict[str, dict[str, str]]:
    found = {}
    for group, ranks in members.items():
        if rank in ranks:
            name, description = _named(group)
            found[name] = {"name": name, "desc": description, "ranks": str(sorted(ranks))}
    return found


def _named(group: str) -> tuple[str, str]:
    """Name and description of a group, as the recorder joins them; collectives without a group are of all ranks."""
    name, _, description = group.partition(" ")
    return (name, description or "undefined") if name else ("0", "default_pg")


def _entry(one: Collective, group_size: int) -> dict[str, Any]:
    """One collective as torch's flight recorder would have dumped it."""
    entered_ns = round(one.entered_s * 1e9)
    into, out = one.nbytes, one.nbytes
    if one.op in _GATHERS:
        out *= group_size
    elif one.op in _SCATTERS:
        out //= group_size
    number = one.number if one.group else one.seq + 1
    return {
        "record_id": one.seq,
        "pg_id": 0,
        "process_group": list(_named(one.group)),
        "collective_seq_id": number,
        "p2p_seq_id": 0,
        "op_id": number,
        "profiling_name": f"gloo:{one.op}",
        "is_p2p": False,
        "input_sizes": [[into]],
        "input_dtypes": ["Byte"],
        "output_sizes": [[out]],
        "output_dtypes": ["Byte"],
        "state": "scheduled" if one.completed_s is None else "completed",
        "retired": one.completed_s is not None,
        "time_created_ns": entered_ns,
        "time_discovered_started_ns": entered_ns,
        "time_discovered_completed_ns": None if one.completed_s is None else round(one.completed_s * 1e9),
        "timeout_ms": 0,
        "frames": [{"name": one.label or "not recorded", "filename": f"step {one.step}", "line": 0}],
    }


def _write(dumps: Mapping[int, dict[str, Any]], folder: Path) -> None:
    try:
        folder.mkdir(exist_ok=True)
        if any(folder.iterdir()):
            raise DiagnosticsError(
                f"{folder} is not empty; the analyser reads every file in it", "pass an empty folder, or a new one"
            )
        for rank, dump in dumps.items():
            (folder / f"rank_{rank}").write_bytes(plain_pickle(dump))
    except OSError as error:
        raise DiagnosticsError(f"{folder} cannot be written: {error.strerror}", "choose another folder") from error
