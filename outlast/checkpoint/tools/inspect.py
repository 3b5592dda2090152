"""Listing, describing and verifying steps: no process group is needed, and nothing is changed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal

from outlast.checkpoint.format.dtypes import dtype_name
from outlast.checkpoint.format.names import (
    parse_aside,
    parse_replaced,
    parse_step,
    rank_name,
    readable,
    step_name,
)
from outlast.checkpoint.format.records import Fault
from outlast.checkpoint.ownership import find_holder
from outlast.checkpoint.steps.catalog import scan
from outlast.checkpoint.steps.commit import read_commit
from outlast.checkpoint.steps.reader import Progress, StepReader
from outlast.checkpoint.storage.base import Store
from outlast.checkpoint.storage.io_threads import IoThreads
from outlast.checkpoint.tools.open_step import THREADS, OpenedStep, choose, storage
from outlast.errors import IncompleteCheckpoint, UnknownFormatVersion


@dataclass(frozen=True)
class StepInfo:
    """One step as ``outlast ckpt ls`` shows it."""

    step: int
    folder: str
    """Its name below the URL."""
    status: Literal["committed", "in progress", "uncommitted", "damaged", "unknown version", "aside"]
    """Judged by its commit record alone; :func:`verify` checks the other files."""
    reason: str
    """Why it is not ``committed``; empty if it is."""
    world_size: int | None
    """Of the job that saved it; None without a readable commit record, as the next two."""
    saved_at: float | None
    """Unix time of the commit, in seconds."""
    size_bytes: int | None
    """Total size of all files that the votes list."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint."""

    name: str
    """Keys joined by ``/``; for local state without the rank."""
    rank: int | None
    """The rank whose local state it is part of; None for replicated state."""
    shape: tuple[int, ...]
    dtype: str
    """E.g. ``bfloat16``."""
    size_bytes: int


@dataclass(frozen=True)
class StepDescription:
    """One step as ``outlast ckpt show`` shows it."""

    url: str
    """Of the step: ``zarr.open_group`` opens it."""
    step: int
    world_size: int
    epoch: str
    format_version: int
    saved_at: float
    """Unix time of the commit, in seconds."""
    size_bytes: int
    tensors: tuple[TensorInfo, ...]
    values: dict[str, Any]
    """JSON values of the state by name (keys joined by ``/``, those of local state below ``rank_XXXXX``)."""


@dataclass(frozen=True)
class Problem:
    """What is wrong with one file."""

    file: str
    """Relative to the step's folder."""
    kind: str
    """Name of the error, e.g. ``CorruptCheckpoint``."""
    reason: str


@dataclass(frozen=True)
class Verification:
    """The result of reading every file of a step and comparing it with the checksums taken when it was saved."""

    url: str
    """Of the step."""
    step: int
    files: int
    size_bytes: int
    problems: tuple[Problem, ...]
    not_judged: str = ""
    """Why it is neither good nor damaged: a run is saving it, or has removed it while it was read."""

    @property
    def ok(self) -> bool:
        """Whether it can be restored."""
        return not self.problems and not self.not_judged


def list_steps(url: str | os.PathLike[str]) -> list[StepInfo]:
    """All steps at a URL, oldest first; empty if there are none.

    Raises:
        CheckpointError: the storage cannot be read.
    """
    with storage(url) as store:
        steps = []
        for name in store.names(""):
            step = parse_step(name)
            if step is not None:
                steps.append(_info(store, step))
            elif (aside := parse_aside(name)) is not None:
                reason = "kept under another name, as damaged, cut off or superseded; never read"
                steps.append(StepInfo(aside, name, "aside", reason, None, None, None))
            elif (replaced := parse_replaced(name)) is not None:
                reason = "was being overwritten; if that was interrupted, a restore makes it the step again"
                steps.append(StepInfo(replaced, name, "aside", reason, None, None, None))
        return sorted(steps, key=lambda info: (info.step, info.folder))


def describe(url: str | os.PathLike[str], step: int | None = None) -> StepDescription:
    """The contents of a step (None: the newest committed one); metadata is verified, tensors are not read.

    Raises:
        CheckpointNotFound: the step does not exist.
        CorruptCheckpoint, IncompleteCheckpoint, UnknownFormatVersion: names the file.
    """
    with OpenedStep(url, step) as opened:
        commit = opened.commit
        tensors: list[TensorInfo] = []
        values: dict[str, Any] = {}
        for rank in (None, *range(opened.world_size)):
            arrays, attributes = opened.describe(rank)
            prefix = "" if rank is None else f"{rank_name(rank)}/"
            tensors += [
                TensorInfo(readable(path.removeprefix(prefix)), rank, a.shape, dtype_name(a.dtype), a.payload_bytes)
                for path, a in sorted(arrays.items())
            ]
            for path, items in sorted(attributes.items()):
                for key, value in items.items():
                    values[f"{readable(path)}/{key}" if path else key] = value
        return StepDescription(
            opened.url,
            opened.step,
            commit.world_size,
            commit.attempt_id,
            commit.format_version,
            commit.saved_at,
            commit.size_bytes,
            tuple(tensors),
            values,
        )


def verify(url: str | os.PathLike[str], step: int | None = None, progress: Progress | None = None) -> Verification:
    """Read every file of a step, compare it with its checksum, and check that it can be loaded.

    Args:
        url: of the checkpoints.
        step: its number; None takes the newest committed one.
        progress: called with the bytes verified so far and in total.

    Returns:
        All problems, not just the first. Where the commit record or a vote is damaged, the files that it lists are not
        read.

    Raises:
        CheckpointNotFound: the step does not exist.
        CheckpointError: the storage cannot be read.
    """
    with storage(url) as store, IoThreads(THREADS) as io:
        step = choose(store, step)
        where = f"{store.url}/{step_name(step)}"
        try:
            reader = StepReader(store, step, io)
        except Fault as fault:
            why = _not_judged(store, step)
            return Verification(where, step, 0, 0, () if why else (_problem(fault),), why)
        entries = [entry for vote in reader.votes for entry in vote.files]
        faults = reader.check(reader.states, progress)
        size_bytes = sum(entry.size_bytes for entry in entries)
        why = _not_judged(store, step) if faults else ""
        problems = () if why else tuple(_problem(fault) for fault in faults)
        return Verification(where, step, len(entries), size_bytes, problems, why)


def _info(store: Store, step: int) -> StepInfo:
    name = step_name(step)
    try:
        commit = read_commit(store, step)
    except Fault as fault:
        if fault.kind is IncompleteCheckpoint and (holder := find_holder(store)) is not None:
            return StepInfo(step, name, "in progress", f"being saved by {holder}", None, None, None)
        status: Literal["uncommitted", "damaged", "unknown version"] = (
            "uncommitted"
            if fault.kind is IncompleteCheckpoint
            else "unknown version"
            if fault.kind is UnknownFormatVersion
            else "damaged"
        )
        return StepInfo(step, name, status, str(fault), None, None, None)
    return StepInfo(step, name, "committed", "", commit.world_size, commit.saved_at, commit.size_bytes)


def _not_judged(store: Store, step: int) -> str:
    """Why what is wrong with a step is no damage, if so."""
    found = scan(store)
    if step in found.committed:
        return ""
    if step not in found.uncommitted:
        return "removed while it was read"
    holder = find_holder(store)
    return f"being saved by {holder}" if holder is not None else ""


def _problem(fault: Fault) -> Problem:
    return Problem(fault.file, fault.kind.__name__, fault.reason)
