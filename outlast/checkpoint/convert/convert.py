"""Checkpoints from and to other formats: safetensors, PyTorch's distributed checkpoints, ``torch.save`` files."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from outlast.checkpoint.checkpointer import Checkpointer
from outlast.checkpoint.config import CheckpointConfig
from outlast.checkpoint.convert import dcp, safetensors, torch_save
from outlast.checkpoint.convert.target import check_target, new_target, size_of
from outlast.checkpoint.format.names import step_name
from outlast.checkpoint.state.nested import leaves
from outlast.checkpoint.steps.catalog import scan
from outlast.checkpoint.storage.open import open_store
from outlast.checkpoint.tools.open_step import OpenedStep
from outlast.errors import CheckpointError, CheckpointNotFound, ConfigError
from outlast.events import CheckpointFailed, CheckpointSaved, Event

ForeignFormat = Literal["safetensors", "dcp", "torch"]


@dataclass(frozen=True)
class Exported:
    """What an export wrote."""

    url: str
    """Of the step it was read from."""
    step: int
    target: str
    format: ForeignFormat
    part: str | None
    tensors: int
    values: int
    """JSON values, as many as there are lines of them in ``outlast ckpt diff``."""
    size_bytes: int
    """Of all files of the target."""
    left_out: tuple[str, ...]
    """What the format cannot hold: empty dictionaries in ``dcp``."""


@dataclass(frozen=True)
class Imported:
    """What an import wrote."""

    source: str
    format: ForeignFormat
    url: str
    """Where checkpoints lie."""
    step: int
    part: str | None
    tensors: int
    values: int
    size_bytes: int
    """Of all files that the step's votes list."""


@dataclass(frozen=True)
class _Foreign:
    write: Callable[[dict[str, Any], str, int], list[str]]
    read: Callable[[str], dict[str, Any]]
    folder: bool
    """Whether the target is a folder."""


_FORMATS: dict[str, _Foreign] = {
    "safetensors": _Foreign(safetensors.write, safetensors.read, folder=False),
    "dcp": _Foreign(dcp.write, dcp.read, folder=True),
    "torch": _Foreign(torch_save.write, torch_save.read, folder=False),
}


def export_step(
    url: str | os.PathLike[str],
    target: str | os.PathLike[str],
    format: ForeignFormat,
    *,
    step: int | None = None,
    part: str | None = None,
    force: bool = False,
) -> Exported:
    """Write a step's replicated state in another format; every byte is verified as it is read.

    The target appears whole or not at all: it is written under another name beside it, then renamed.

    Args:
        url: where checkpoints lie.
        target: a local path; a folder for ``dcp``, else a file.
        format: of the target.
        step: which; None takes the newest committed one.
        part: only this top-level dictionary of the state, e.g. ``model``; its keys are then at the top of the target.
        force: replace the target if there is one. A folder is replaced only if it is a ``dcp`` checkpoint.

    Raises:
        CheckpointNotFound: no such step.
        CorruptCheckpoint, IncompleteCheckpoint, UnknownFormatVersion: the step is damaged; names the file.
        CheckpointError: there is a target already, no such part, something the format cannot hold, or the target cannot
            be written; nothing is left of it.
        MissingDependency: the package for this format is not installed.
        ConfigError: no such format, or a target that is no local path.
    """
    foreign, path = _foreign(format), _local(target, "target")
    check_target(path, folder=foreign.folder, force=force)
    with OpenedStep(url, step) as opened:
        state = _part(opened.load(None), part, opened.url)
    with new_target(path, folder=foreign.folder, force=force) as temporary:
        left_out = foreign.write(state, temporary, opened.step)
        size_bytes = size_of(temporary)
    tensors, values = _counts(state)
    return Exported(opened.url, opened.step, path, format, part, tensors, values, size_bytes, tuple(left_out))


def import_step(
    source: str | os.PathLike[str],
    url: str | os.PathLike[str],
    format: ForeignFormat,
    *,
    step: int = 0,
    part: str | None = None,
) -> Imported:
    """Save what another format holds as a committed step of one rank, with no local state.

    Pickles are read without running anything they name.

    Args:
        source: a local path; a folder for ``dcp``, else a file.
        url: where checkpoints lie, or will.
        format: of the source.
        step: the number the step gets.
        part: the top-level key of the state below which the source's keys are put, e.g. ``model``; None puts them at
            the top.

    Raises:
        CheckpointNotFound: no such source.
        CorruptCheckpoint: the source is damaged.
        CheckpointError: the source is of another format, holds what cannot be stored, or names classes that are
            refused; the step is there already, or a save that was not completed; or it cannot be written. There is no
            such step then.
        MissingDependency: the package for this format is not installed.
        ConfigError: no such format, a source that is no local path, or a negative step.
    """
    foreign, path = _foreign(format), _local(source, "source")
    if step < 0:
        raise ConfigError(f"step = {step}", "step >= 0")
    _check_free(url, step)
    if not os.path.exists(path):
        raise CheckpointNotFound(f"there is no {path}", "give a file or folder to import")
    try:
        state = foreign.read(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}", f"is it of the format {format}?") from error
    replicated = state if part is None else {part: state}
    saved = _save(url, step, replicated)
    return Imported(path, format, os.fspath(url), step, part, *_counts(state), saved.size_bytes)


def _foreign(format: str) -> _Foreign:
    if format not in _FORMATS:
        raise ConfigError(f"there is no format {format!r}", f"formats are: {', '.join(_FORMATS)}")
    if format == "safetensors":
        safetensors.check_installed()
    return _FORMATS[format]


def _local(path: str | os.PathLike[str], what: str) -> str:
    text = os.fspath(path)
    if "://" in text:
        raise ConfigError(f"the {what} {text} is a URL", f"the {what} is a local path; copy it there with other tools")
    return os.path.realpath(os.path.expanduser(text))


def _part(state: dict[str, Any], part: str | None, where: str) -> dict[str, Any]:
    if part is None:
        return state
    if not isinstance(state.get(part), dict):
        parts = ", ".join(key for key, value in state.items() if isinstance(value, dict))
        raise CheckpointError(f"{where} has no part {part!r}", f"its parts are: {parts or 'none'}")
    return dict(state[part])


def _counts(state: dict[str, Any]) -> tuple[int, int]:
    kinds = [isinstance(value, torch.Tensor) for _, value in leaves(state)]
    return sum(kinds), len(kinds) - sum(kinds)


def _check_free(url: str | os.PathLike[str], step: int) -> None:
    store = open_store(url)
    try:
        found = scan(store)
    except OSError as error:
        raise CheckpointError(f"{store.url} cannot be read: {error}") from error
    if step in found.committed:
        raise CheckpointError(f"step {step} is at {store.url} already", "give another --step, or another URL")
    if found.uncommitted:
        # A save clears away what was cut off, and cannot tell it from a save that another process has under way.
        steps = ", ".join(map(str, found.uncommitted))
        raise CheckpointError(
            f"at {store.url} there are saves that were not completed, of step {steps}",
            "if no training saves there, remove their folders (`outlast ckpt prune --aside` does, beside a good step), "
            "or give another URL",
        )


def _save(url: str | os.PathLike[str], step: int, replicated: dict[str, Any]) -> CheckpointSaved:
    events: list[Event] = []
    config = CheckpointConfig(keep_last=0)
    attempt_id = f"import-{uuid.uuid4().hex}"
    with Checkpointer(url, config, rank=0, world_size=1, attempt_id=attempt_id, on_event=events.append) as saver:
        saver.save(step, replicated=replicated)
    for event in events:
        if isinstance(event, CheckpointFailed):
            with contextlib.suppress(OSError):  # an empty folder would be in the way of the next try
                open_store(url).remove_tree(step_name(step))
            raise CheckpointError(f"step {step} was not saved at {saver.url}: {event.reason}", "nothing is left of it")
    return next(event for event in events if isinstance(event, CheckpointSaved))
