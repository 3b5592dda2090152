"""What happened, as typed records: one JSON object a line.

Every line carries ``v`` (schema version), ``t`` (seconds since the epoch), ``rank``, ``generation`` (how often the
job's ranks had been restarted) and ``kind``; the other keys are the fields of the event's class. A line is written with
one ``write`` on a descriptor opened for appending, so a process that is killed leaves whole lines, and at most the line
being written when the *machine* dies is torn. Readers skip a torn last line and raise on anything else.

Reports are computed from these files alone.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

from outlast.errors import DiagnosticsError

VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Base of all events; ``kind`` is the name under which a class is written."""

    kind: ClassVar[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStarted(Event):
    """A rank is about to take its first step of this attempt."""

    kind: ClassVar[str] = "run_started"
    attempt: int
    world_size: int
    host: str
    pid: int
    device: str
    first_step: int
    """The step that is taken first: 1, or the restored step + 1."""
    last_step: int
    parameters: int
    """Trainable numbers in the model."""
    comm: str
    """Compressor and feedback in words, e.g. ``ef21 topk 5%``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDone(Event):
    """One optimizer step of one rank. Times are wall-clock seconds of the training thread unless said otherwise."""

    kind: ClassVar[str] = "step"
    step: int
    loss: float
    """Mean training loss of this rank's micro-batches."""
    grad_norm: float | None = None
    """Norm of the averaged gradient before clipping; None with ``comm.target = "update"``, where ranks average updates
    and none of them knows the averaged gradient."""
    update_norm: float | None = None
    """With ``comm.target = "update"``, the norm of the averaged update before the learning rate; else None.

    The update is Adam's direction. Its elements are about 1, so the norm is of the order of the square root of the
    number of parameters.
    """
    lr: float
    tokens: int
    """Tokens this rank processed in this step."""
    step_s: float
    """The whole step."""
    data_s: float
    comm_s: float
    """Communication that the backward pass did not hide: last gradient ready until the last bucket is reduced."""
    checkpoint_s: float
    """Blocked by checkpointing: the wait before the update and the call that begins a snapshot."""
    collective_s: float
    """Time inside collectives, hidden or not: transfer plus waiting for the last rank to arrive."""
    codec_s: float
    """Time in compression and decompression, hidden or not."""
    wire_bytes: int
    """Bytes of gradient messages this rank sent, as the transport moves them, headers apart."""
    dense_bytes: int
    """Bytes a ring all-reduce of the same gradients in fp32 would have sent."""
    alpha: float | None = None
    """Measured contraction of what this rank compressed, 1 - ||C(x) - x||^2 / ||x||^2: the share of its square that
    arrives at once; None in steps in which it was not measured."""
    residual: float | None = None
    """What this rank holds back over what it was given, ||e|| / ||g||; None in steps in which it was not measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CommChosen(Event):
    """``comm.compressor = "auto"`` has become something."""

    kind: ClassVar[str] = "comm_chosen"
    comm: str
    """In words, e.g. ``ef14 topk 1% int8 of updates``."""
    why: str
    """The prediction, with what it was made from, in one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalDone(Event):
    """Loss on held-out text, the mean over all ranks."""

    kind: ClassVar[str] = "eval"
    step: int
    loss: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSaved(Event):
    """A checkpoint is durable and committed (coordinator), or this rank's part is durable (other ranks)."""

    kind: ClassVar[str] = "checkpoint_saved"
    step: int
    committed: bool
    tier: str = "storage"
    """``memory``: in shared memory of the nodes; ``partner``: in that of the next node too; ``local``: on the nodes'
    own disks; ``storage``: at the URL."""
    size_bytes: int
    """Bytes this rank wrote."""
    blocked_s: float
    """How long ``save`` and ``wait_copied`` held the training thread."""
    durable_s: float
    """From the call of ``save`` until durable (and, on the coordinator, committed)."""
    predicted_stall_s: float | None = None
    """How long the update was expected to wait for the copy, when the save began, from the saves before: what
    ``blocked_s`` is besides the call of ``save``. None for the first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointInterval(Event):
    """``checkpoint.every_steps = "auto"`` has become something (on rank 0), or something else by a tenth or more."""

    kind: ClassVar[str] = "checkpoint_interval"
    step: int
    every_steps: int
    cost_s: float
    """Seconds of training that a save costs: blocked, and steps beside it that were slower."""
    mtbf_s: float
    """Expected mean seconds between failures of the whole run."""
    why: str
    """How the one follows from the others, in one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointFailed(Event):
    """A checkpoint was not committed; training goes on, the checkpoints before it are untouched."""

    kind: ClassVar[str] = "checkpoint_failed"
    step: int
    reason: str
    tier: str = "storage"


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointRestored(Event):
    """State was restored from a checkpoint."""

    kind: ClassVar[str] = "checkpoint_restored"
    step: int
    url: str
    seconds: float
    tiers: dict[str, int]
    """Bytes this rank took from each tier: ``memory`` (this node's), ``local`` (its disk), ``partner`` (other nodes'
    memory or disks), ``storage``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointRejected(Event):
    """A checkpoint was found but not used, and why: it was set aside and a step before it was taken."""

    kind: ClassVar[str] = "checkpoint_rejected"
    step: int
    reason: str
    file: str = ""
    """The file at fault, relative to the checkpoint's directory; empty where none is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEnded(Event):
    """A rank ended of its own accord."""

    kind: ClassVar[str] = "run_ended"
    step: int
    ok: bool
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkersStarted(Event):
    """The launcher started (or restarted) this node's ranks."""

    kind: ClassVar[str] = "workers_started"
    host: str
    ranks: tuple[int, ...]
    pids: tuple[int, ...]
    restarts_left: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HangFound(Event):
    """The launcher found a rank that makes no progress, and kills it."""

    kind: ClassVar[str] = "hang_found"
    culprit: int
    """Its rank."""
    pid: int
    step: int
    """The step it was in."""
    silent_s: float
    """Seconds since its last sign of progress."""
    limit_s: float
    evidence: str
    """What told it apart from ranks that merely wait: its process state, and where its collectives stand."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkersFailed(Event):
    """Ranks of this node failed; what the launcher does next."""

    kind: ClassVar[str] = "workers_failed"
    host: str
    ranks: tuple[int, ...]
    reasons: tuple[str, ...]
    restarting: bool


@dataclass(frozen=True, slots=True)
class Record:
    """One line as read back: the envelope, and the event's own fields as a mapping."""

    t: float
    rank: int
    generation: int
    kind: str
    fields: dict[str, Any]

    def __getitem__(self, key: str) -> Any:
        return self.fields[key]


class EventLog:
    """Appends events to one JSONL file; safe to use from several threads.

    Args:
        path: the file; its folder must exist. An existing file is appended to.
        rank: written into every line; -1 for a launcher.
        generation: written into every line.
    """

    def __init__(self, path: Path | str, *, rank: int, generation: int = 0) -> None:
        self.path = Path(path)
        self.rank = rank
        self.generation = generation
        self._fd: int | None = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)

    def write(self, event: Event) -> None:
        """Append one event; it survives this process's death as soon as the call returns.

        Raises:
            DiagnosticsError: the log is closed, or the line could not be written whole.
        """
        if self._fd is None:
            raise DiagnosticsError(f"{self.path}: event {event.kind!r} written after the log was closed")
        line = {"v": VERSION, "t": time.time(), "rank": self.rank, "generation": self.generation, "kind": event.kind}
        for field in dataclasses.fields(event):
            line[field.name] = getattr(event, field.name)
        data = (json.dumps(line, allow_nan=True, separators=(",", ":")) + "\n").encode()
        written = os.write(self._fd, data)
        if written != len(data):
            raise DiagnosticsError(
                f"{self.path}: wrote {written} of {len(data)} bytes of an event", "is the disk full?"
            )

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def read_events(path: Path | str) -> Iterator[Record]:
    """Yield the records of one file, oldest first; a torn last line is skipped.

    Raises:
        DiagnosticsError: a line that is not an event, or of a schema version this outlast does not know.
    """
    lines = Path(path).read_bytes().split(b"\n")
    torn = lines.pop()  # empty after a whole last line
    del torn
    for number, line in enumerate(lines, 1):
        yield parse_event(line, f"{path}:{number}")


def parse_event(line: bytes, where: str) -> Record:
    """One line as a record; ``where`` (``file:line``) stands in the message of the error.

    Raises:
        DiagnosticsError: it is not an event, or of a schema version this outlast does not know.
    """
    try:
        raw = json.loads(line)
        version = raw.pop("v")
        envelope = {key: raw.pop(key) for key in ("t", "rank", "generation", "kind")}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DiagnosticsError(f"{where}: not an event: {line[:80]!r} ({error})") from error
    if version != VERSION:
        raise DiagnosticsError(f"{where}: event schema {version}, this outlast reads {VERSION}")
    return Record(fields=raw, **envelope)
