"""What happened, as typed records: one JSON object per line.

Every line carries ``v`` (schema version), ``t`` (seconds since the epoch), ``rank``, ``generation`` (how often the
job's ranks had been restarted) and ``kind``; the other keys are the fields of the event's class. Each line is one
``write`` on a descriptor opened for appending. So a killed process leaves complete lines; only the line that is being
written when the *machine* dies can be torn. Readers skip a torn last line and raise on anything else.

Reports are computed from these files alone.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

from outlast.errors import DiagnosticsError
from outlast.plain_text import plain_value

VERSION = 1
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Base class of events; ``kind`` is the name of the class in the file."""

    kind: ClassVar[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStarted(Event):
    """A rank is about to take its first step of this attempt. What is not known then is empty, or 0."""

    kind: ClassVar[str] = "run_started"
    attempt: int
    world_size: int
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    device: str = ""
    first_step: int
    """1, or the restored step + 1."""
    last_step: int = 0
    parameters: int = 0
    """Number of trainable parameters."""
    comm: str = ""
    """Error feedback and compressor, e.g. ``ef21 topk 5%``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDone(Event):
    """One optimizer step of one rank. Times are wall-clock seconds of the training thread unless noted."""

    kind: ClassVar[str] = "step"
    step: int
    loss: float | None
    """Mean training loss of this rank's micro-batches, before the update; None where a program logs none."""
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
    """Tokens that this rank processed; 0 where a program does not say."""
    step_s: float
    """The whole step."""
    data_s: float
    comm_s: float
    """Communication not overlapped with backward: from the last gradient until the last bucket is reduced."""
    checkpoint_s: float
    """Blocked by checkpoints: the wait before the update, and the call that starts a snapshot."""
    collective_s: float | None
    """Inside collectives, overlapped or not: transfer, and the wait for the last rank; None where not measured."""
    codec_s: float
    """Time in compression and decompression, overlapped or not."""
    wire_bytes: int
    """Bytes of gradient messages that this rank sent, without transport headers."""
    dense_bytes: int
    """Bytes that a ring all-reduce of the same gradients in fp32 would have sent."""
    alpha: float | None = None
    """Measured contraction of this rank's compressor, 1 - ||C(x) - x||^2 / ||x||^2; None in steps in which it is not
    measured."""
    residual: float | None = None
    """Relative residual of this rank, ||e|| / ||g||; None in steps in which it is not measured."""
    batch_elements: int | None = None
    """Elements of the tensors that DataLoaders gave out for training; None if none did."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Logged(Event):
    """Numbers that a program has logged in a step."""

    kind: ClassVar[str] = "logged"
    step: int
    values: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramStep(Event):
    """One step of a program that tells nothing of itself: from one update of its optimizer to the next."""

    kind: ClassVar[str] = "program_step"
    step: int
    """Counted over all starts of the run."""
    step_s: float
    collective_s: float | None
    """With a collective under way, overlapped or not, as in :class:`StepDone`; None where not measured."""
    data_s: float = 0.0
    """Time in ``next()`` of DataLoaders."""
    batch_elements: int | None = None
    """Elements of the tensors that DataLoaders gave out for training; None if none did."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CommChosen(Event):
    """``comm.compressor = "auto"`` was resolved."""

    kind: ClassVar[str] = "comm_chosen"
    comm: str
    """Error feedback and compressor, e.g. ``ef14 topk 1% int8 of updates``."""
    why: str
    """The prediction and its inputs, in one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalDone(Event):
    """Loss on held-out text, the mean over all ranks."""

    kind: ClassVar[str] = "eval"
    step: int
    loss: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSaved(Event):
    """A checkpoint is committed (on the coordinator), or this rank's part is durable (on other ranks)."""

    kind: ClassVar[str] = "checkpoint_saved"
    step: int
    committed: bool
    tier: str = "storage"
    """``memory``: in the nodes' shared memory; ``partner``: also in a partner node's; ``local``: on the nodes' disks;
    ``storage``: at the URL."""
    size_bytes: int
    """Bytes that this rank wrote."""
    blocked_s: float
    """How long ``save`` and ``wait_copied`` blocked the training thread."""
    durable_s: float
    """From the call of ``save`` until the part is durable (on the coordinator: the checkpoint is committed)."""
    predicted_stall_s: float | None = None
    """How long the update was predicted to wait for the copy, from earlier saves: the part of ``blocked_s`` that is not
    the call of ``save``. None for the first save."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointInterval(Event):
    """``checkpoint.every_steps = "auto"`` was resolved on rank 0, or changed by a tenth or more."""

    kind: ClassVar[str] = "checkpoint_interval"
    step: int
    every_steps: int
    cost_s: float
    """Seconds of training that a save costs: time blocked, and the slowdown of steps during the save."""
    mtbf_s: float
    """Expected mean time between failures of the whole run, in seconds."""
    why: str
    """How the interval follows from cost and failures, in one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointFailed(Event):
    """A checkpoint was not committed. Training goes on, and earlier checkpoints are unchanged."""

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
    """Bytes that this rank read from each tier: ``memory`` (of this node), ``local`` (its disk), ``partner`` (memory or
    disks of other nodes), ``storage``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointRejected(Event):
    """A checkpoint is not used: it did not verify, or the run goes on from another one."""

    kind: ClassVar[str] = "checkpoint_rejected"
    step: int
    reason: str
    file: str = ""
    """The damaged file, relative to the checkpoint's directory; empty if it is not one file."""
    damaged: bool = True
    """Whether a checkpoint was lost. Not so if its save was cut off before it was one, if the run goes on from an older
    step, or if the step is saved again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEnded(Event):
    """A rank ended by itself, with success or with an error."""

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
    """The rank at fault."""
    pid: int
    step: int
    """The step it was in."""
    silent_s: float
    """Seconds since its last heartbeat."""
    limit_s: float
    evidence: str
    """What distinguishes it from ranks that wait for it: its process state, and its collectives."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkersFailed(Event):
    """Ranks of this node failed, and whether the launcher restarts them."""

    kind: ClassVar[str] = "workers_failed"
    host: str
    ranks: tuple[int, ...]
    reasons: tuple[str, ...]
    restarting: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class NoticeCame(Event):
    """The launcher of a node was told to end, or heard that another one was: the ranks save a checkpoint and end."""

    kind: ClassVar[str] = "notice"
    host: str
    signal: str
    """E.g. ``SIGTERM``."""
    grace_s: float
    """Seconds that the ranks have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GoodputMeasured(Event):
    """Where the run's wall time went, up to here and over all launches. It sums up other events; nothing is computed
    from it."""

    kind: ClassVar[str] = "goodput"
    wall_s: float
    seconds: dict[str, float]
    """By cause; they add up to ``wall_s``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EventsLost(Event):
    """Events before this line could not be written, e.g. because the disk was full."""

    kind: ClassVar[str] = "events_lost"
    count: int
    reason: str
    """The system's words for the first of them."""


@dataclass(frozen=True, slots=True)
class Record:
    """One line of a file: the common keys, and the event's own fields as a mapping."""

    t: float
    rank: int
    generation: int
    kind: str
    fields: dict[str, Any]

    def __getitem__(self, key: str) -> Any:
        return self.fields[key]


class EventLog:
    """Appends events to one JSONL file. Thread-safe.

    What the file system refuses ends nothing: the event is counted as lost, the cause is logged once, and as soon as
    there is room again an :class:`EventsLost` is written before the next event.

    Args:
        path: the file. Events are appended to an existing file. If it cannot be opened, each write tries again.
        rank: written into every line; -1 for a launcher.
        generation: written into every line.
    """

    def __init__(self, path: Path | str, *, rank: int, generation: int = 0) -> None:
        self.path = Path(path)
        self.rank = rank
        self.generation = generation
        self.lost = 0
        """Events that could not be written, and that no line in the file tells of yet."""
        self._reason = ""
        self._closed = False
        self._fd: int | None = None
        self._lock = threading.Lock()
        try:
            self._open()
        except OSError as error:
            self._warn(error)

    def write(self, event: Event) -> None:
        """Append one event. Unless it is counted as lost, it survives the death of this process.

        Raises:
            DiagnosticsError: the log is closed.
        """
        with self._lock:
            if self._closed:
                raise DiagnosticsError(f"{self.path}: event {event.kind!r} after the log was closed")
            data = self._line(event)
            try:
                self._append(self._line_of_lost() + data)
            except OSError as error:
                self.lost += 1
                self._warn(error)
            else:
                self._told()

    def close(self) -> None:
        """Close the file; closing twice is harmless. Events that were lost are told of, if there is room now."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if self.lost:
                try:
                    self._append(self._line_of_lost())
                except OSError as error:
                    _LOG.warning("%s: %d events were lost at the end: %s", self.path, self.lost, error)
                else:
                    self._told()
            if self._fd is not None:
                os.close(self._fd)
                self._fd = None

    def _line(self, event: Event) -> bytes:
        line = {"v": VERSION, "t": time.time(), "rank": self.rank, "generation": self.generation, "kind": event.kind}
        for one in fields(event):
            line[one.name] = getattr(event, one.name)
        return (json.dumps(line, allow_nan=True, separators=(",", ":")) + "\n").encode()

    def _line_of_lost(self) -> bytes:
        return self._line(EventsLost(count=self.lost, reason=self._reason)) if self.lost else b""

    def _open(self) -> int:
        if self._fd is not None and os.fstat(self._fd).st_nlink == 0:
            # The file was removed, perhaps with its folder: what is written to it now is nowhere.
            os.close(self._fd)
            self._fd = None
        if self._fd is None:
            self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        return self._fd

    def _append(self, data: bytes) -> None:
        fd = self._open()
        written = os.write(fd, data)
        if written != len(data):
            # A disk that fills up takes a part of the line. What is left would make the next line unreadable.
            os.ftruncate(fd, os.fstat(fd).st_size - written)
            raise OSError(f"wrote {written} of {len(data)} bytes; make sure the disk is not full")

    def _warn(self, error: OSError) -> None:
        if not self._reason:
            self._reason = str(error)
            _LOG.warning("%s: events are being lost, training goes on: %s", self.path, error)

    def _told(self) -> None:
        if self._reason:
            _LOG.warning("%s: events are written again; %d were lost: %s", self.path, self.lost, self._reason)
        self.lost, self._reason = 0, ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def read_events(path: Path | str) -> Iterator[Record]:
    """Yield the records of one file, oldest first; a torn last line is skipped.

    Raises:
        DiagnosticsError: a line is not an event, or has an unknown schema version.
    """
    lines = Path(path).read_bytes().split(b"\n")
    lines.pop()  # torn, or empty after a whole last line
    for number, line in enumerate(lines, 1):
        yield parse_event(line, f"{path}:{number}")


def parse_event(line: bytes, where: str) -> Record:
    """Parse one line; ``where`` (``file:line``) appears in the error message. Texts are made plain.

    Raises:
        DiagnosticsError: it is not an event, or has an unknown schema version.
    """
    try:
        raw = json.loads(line)
        if b"\\" in line or b"\x7f" in line or not line.isascii():
            raw = plain_value(raw)
        version = raw.pop("v")
        envelope = {key: raw.pop(key) for key in ("t", "rank", "generation", "kind")}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DiagnosticsError(f"{where}: not an event: {line[:80]!r} ({error})") from error
    if version != VERSION:
        raise DiagnosticsError(f"{where}: event schema {version}; this version of outlast reads {VERSION}")
    return Record(fields=raw, **envelope)
