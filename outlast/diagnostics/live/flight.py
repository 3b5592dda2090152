"""What torch's own flight recorder knows of this process's collectives, whoever issued them.

The flight recorder of torch.distributed sees every collective of every process group in C++: those of DDP's reducer, of
FSDP2, DeepSpeed and functional collectives, and the program's own calls. It records if :func:`buffer_variable` is set
before the first group is made, and costs about 3 µs a collective. Point-to-point operations are recorded by NCCL's
groups, not by gloo's: see :mod:`outlast.diagnostics.live.point_to_point`.

Nothing here imports torch: until the program has, there is nothing to read.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

DTYPE_BYTES: Mapping[str, int] = {
    "Byte": 1,
    "Char": 1,
    "Bool": 1,
    "Short": 2,
    "Half": 2,
    "BFloat16": 2,
    "Int": 4,
    "Float": 4,
    "Long": 8,
    "Double": 8,
    "ComplexFloat": 8,
    "ComplexDouble": 16,
}
"""Bytes an element, by the flight recorder's names; types that are not listed here have one byte (the 8-bit floats)."""

POINT_TO_POINT = "p2p "
_MODULE = "torch._C._distributed_c10d"


def buffer_variable() -> str:
    """The environment variable that says how many collectives torch keeps; versions differ in its name."""
    try:
        major, minor = (int(part) for part in version("torch").split(".")[:2])
    except (PackageNotFoundError, ValueError):  # the ranks may have a torch of their own
        return "TORCH_FR_BUFFER_SIZE"
    return "TORCH_FR_BUFFER_SIZE" if (major, minor) >= (2, 9) else "TORCH_NCCL_TRACE_BUFFER_SIZE"


@dataclass(frozen=True, slots=True)
class FlightCount:
    """How far one process group has come."""

    enqueued: int
    completed: int

    @property
    def pending(self) -> bool:
        return self.enqueued > self.completed


@dataclass(frozen=True, slots=True)
class FlightEntry:
    """One collective as torch recorded it. Times are CLOCK_MONOTONIC nanoseconds."""

    record: int
    """How many the process recorded before."""
    group: str
    """Name of the process group; the same on all of its ranks. For point-to-point operations, which are numbered by
    themselves, and not alike on all ranks, with :data:`POINT_TO_POINT` before it."""
    group_seq: int
    """Position in the group, from 1; the same on all of its ranks."""
    op: str
    nbytes: int
    """Of the inputs."""
    entered_ns: int
    completed_ns: int
    """0 while it is in progress. With gloo, whose completion torch does not time, the time of entry."""


def flight_status() -> bytes:
    """What :func:`flight_counts` reads. Of equal ones only the first need be read: that takes half of the time."""
    dump = _dump()
    return b"" if dump is None else dump(includeCollectives=False)


def flight_counts(status_json: bytes | None = None) -> dict[str, FlightCount]:
    """By the ids of process groups, how far each has come; empty while there are none. Takes about 10 µs.

    Args:
        status_json: of :func:`flight_status`; None takes the one of now.
    """
    if status_json is None:
        status_json = flight_status()
    status = json.loads(status_json).get("pg_status", {}) if status_json else {}
    return {
        group: FlightCount(_number(one["last_enqueued_collective"]), _number(one["last_completed_collective"]))
        for group, one in status.items()
    }


def flight_entries(newest: int) -> list[FlightEntry]:
    """The newest entries, oldest first. Takes about 20 µs for each that torch keeps, so call it when all is quiet."""
    dump = _dump()
    if dump is None:
        return []
    raw = json.loads(dump()).get("entries", [])
    behind_ns = time.time_ns() - time.monotonic_ns()
    return [_entry(one, behind_ns) for one in raw[-newest:]]


def _dump() -> Callable[..., bytes] | None:
    return getattr(sys.modules.get(_MODULE), "_dump_fr_trace_json", None)


def _entry(raw: Mapping[str, Any], behind_ns: int) -> FlightEntry:
    name, description = (*raw["process_group"], "", "")[:2]
    p2p = bool(raw.get("is_p2p"))
    if p2p:
        name = f"{POINT_TO_POINT}{name}"
    entered_ns = _number(raw["time_created_ns"]) - behind_ns
    discovered_ns = _number(raw.get("time_discovered_completed_ns") or 0)
    done = bool(raw.get("retired")) or raw.get("state") == "completed"
    return FlightEntry(
        record=_number(raw["record_id"]),
        group=f"{name} {description}" if description not in ("", "undefined") else str(name),
        group_seq=_number(raw["p2p_seq_id" if p2p else "collective_seq_id"]),
        op=str(raw["profiling_name"]).partition(":")[2] or str(raw["profiling_name"]),
        nbytes=_nbytes(raw.get("input_sizes", ()), raw.get("input_dtypes", ())),
        entered_ns=entered_ns,
        completed_ns=(max(discovered_ns - behind_ns, entered_ns) if discovered_ns else entered_ns) if done else 0,
    )


def _nbytes(sizes: Any, dtypes: Any) -> int:
    total = 0
    for index, size in enumerate(sizes):
        elements = 1
        for length in size:
            elements *= int(length)
        total += elements * DTYPE_BYTES.get(str(dtypes[index]) if index < len(dtypes) else "", 1)
    return total


def _number(value: Any) -> int:
    """The flight recorder writes some numbers as text."""
    return int(value)
