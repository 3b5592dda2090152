"""Export and import of steps: which formats there are, and what is checked before and after."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal, SupportsIndex

import torch

from outlast.checkpoint.checkpointer import Checkpointer
from outlast.checkpoint.config import CheckpointConfig
from outlast.checkpoint.convert import dcp, safetensors, torch_save
from outlast.checkpoint.convert.bounds import check_size
from outlast.checkpoint.convert.hugging_face import is_index
from outlast.checkpoint.convert.loadable import is_loadable
from outlast.checkpoint.convert.selected import check_parts, fitting, select, storable
from outlast.checkpoint.convert.source_files import source_bytes
from outlast.checkpoint.convert.target import check_link, check_target, new_target, size_of
from outlast.checkpoint.format.names import step_name
from outlast.checkpoint.format.step_number import as_step
from outlast.checkpoint.state.nested import leaves
from outlast.checkpoint.state.selection import Rename, make_selection
from outlast.checkpoint.steps.catalog import scan
from outlast.checkpoint.storage.open import open_store
from outlast.checkpoint.tools.open_step import OpenedStep
from outlast.errors import CheckpointError, CheckpointNotFound, ConfigError, NotDurable
from outlast.events import CheckpointFailed, CheckpointSaved, Event

ForeignFormat = Literal["safetensors", "dcp", "torch"]


@dataclass(frozen=True)
class Exported:
    """What an export wrote."""

    url: str
    """Of the exported step."""
    step: int
    target: str
    format: ForeignFormat
    part: str | None
    tensors: int
    values: int
    """Number of JSON values, counted as in ``outlast ckpt diff``."""
    size_bytes: int
    """Total size of the target's files."""
    left_out: tuple[str, ...]
    """Names of what the format cannot hold: empty dictionaries in ``dcp``; with ``strict=False`` also other values."""


@dataclass(frozen=True)
class Imported:
    """What an import wrote."""

    source: str
    format: ForeignFormat
    url: str
    """Of the checkpoints."""
    step: int
    part: str | None
    tensors: int
    values: int
    size_bytes: int
    """Total size of all files that the step's votes list."""
    left_out: tuple[str, ...] = ()
    """Names of what was left out, because a step cannot hold it."""


@dataclass(frozen=True)
class _Foreign:
    write: Callable[[dict[str, Any], str, int], list[str]]
    read: Callable[[str], dict[str, Any]]
    holds: Callable[[Any], bool]
    folder: bool
    """Whether the target is a folder."""


_FORMATS: dict[str, _Foreign] = {
    "safetensors": _Foreign(safetensors.write, safetensors.read, safetensors.holds, folder=False),
    "dcp": _Foreign(dcp.write, dcp.read, is_loadable, folder=True),
    "torch": _Foreign(torch_save.write, torch_save.read, is_loadable, folder=False),
}


def export_step(
    url: str | os.PathLike[str],
    target: str | os.PathLike[str],
    format: ForeignFormat,
    *,
    step: int | None = None,
    part: str | None = None,
    parts: Collection[str] | None = None,
    strict: bool = True,
    rename: Rename | None = None,
    cast: torch.dtype | None = None,
    force: bool = False,
) -> Exported:
    """Write a step's replicated state in another format; every byte is verified as it is read.

    ``parts``, ``rename`` and ``cast`` mean the same as in :func:`outlast.checkpoint.load`.

    The target appears whole or not at all: it is written under a temporary name beside it, then renamed.

    Args:
        url: of the checkpoints.
        target: a local path; a folder for ``dcp``, a file otherwise.
        format: of the target.
        step: its number; None takes the newest committed one.
        part: export only this top-level dictionary of the state, e.g. ``model``, as the target's top level. It is
            called so after ``rename``.
        parts: read only these top-level keys of the step; None: all.
        strict: False leaves out what the format cannot hold, and names it in ``left_out``.
        rename: names as in the step (keys joined by ``/``), and what they become.
        cast: a floating-point type that all floating-point tensors are converted to; None: none is.
        force: replace an existing target. A folder is replaced only if it is a ``dcp`` checkpoint.

    Raises:
        CheckpointNotFound: the step does not exist.
        CorruptCheckpoint, IncompleteCheckpoint, UnknownFormatVersion: the step cannot be read; names the file.
        CheckpointError: the target exists, the state does not have the part, the format cannot hold it, or the target
            cannot be written; nothing is left of it.
        StateMismatch: two tensors would have one name, or an element is too large for ``cast``.
        MissingDependency: the package for this format is not installed.
        ConfigError: the format does not exist, or the target is not a local path.
    """
    foreign, path = _foreign(format), _local(target, "target")
    check_link(os.path.expanduser(os.fspath(target)))
    check_target(path, folder=foreign.folder, force=force)
    selection = make_selection(parts, True, rename, cast or False, running=False)
    with OpenedStep(url, step) as opened:
        state = opened.load(None, selection)
        check_parts({*state, *opened.parts()}, selection, opened.url)
        state = _part(state, part, opened.url)
    state, left = (state, []) if strict else fitting(state, foreign.holds)
    with new_target(path, folder=foreign.folder, force=force) as temporary:
        left_out = [*left, *foreign.write(state, temporary, opened.step)]
        size_bytes = size_of(temporary)
    tensors, values = _counts(state)
    return Exported(opened.url, opened.step, path, format, part, tensors, values, size_bytes, tuple(left_out))


def import_step(
    source: str | os.PathLike[str],
    url: str | os.PathLike[str],
    format: ForeignFormat,
    *,
    step: SupportsIndex = 0,
    part: str | None = None,
    parts: Collection[str] | None = None,
    strict: bool = True,
    rename: Rename | None = None,
    cast: torch.dtype | None = None,
) -> Imported:
    """Save the contents of another format as a committed step of one rank, without local state.

    Pickles are read without running anything that they name. ``parts``, ``rename`` and ``cast`` mean the same as in
    :func:`outlast.checkpoint.load`.

    Args:
        source: a local path; a folder for ``dcp``, otherwise a file, or a folder as Hugging Face's ``save_pretrained``
            writes it: one file, or shards and their index.
        url: of the checkpoints, existing or new.
        format: of the source.
        step: the number that the step gets.
        part: the top-level key of the state under which the source's keys go, e.g. ``model``; None: the top level.
        parts: take only these top-level keys of the source; None: all.
        strict: False leaves out what a step cannot hold, and names it in ``left_out``.
        rename: names as in the source (keys joined by ``/``), and what they become.
        cast: a floating-point type that all floating-point tensors are converted to; None: none is.

    Raises:
        CheckpointNotFound: the source does not exist.
        CorruptCheckpoint: the source is damaged.
        CheckpointError: the source is in another format, holds what cannot be stored, or names classes that are
            refused; the step exists, or an incomplete save; or the step cannot be written. Then there is no such step.
        StateMismatch: two tensors would have one name, or an element is too large for ``cast``.
        MissingDependency: the package for this format is not installed.
        ConfigError: the format does not exist, or the source is not a local path.
    """
    foreign, path = _foreign(format), _local(source, "source")
    step = as_step(step, "import_step")
    selection = make_selection(parts, True, rename, cast or False, running=False)
    _check_free(url, step)
    if not os.path.exists(path):
        raise CheckpointNotFound(f"{path} does not exist", "pass a file or folder to import")
    try:
        state = foreign.read(path)
        check_size(state, source_bytes(os.path.dirname(path) if is_index(path) else path), path)
    except (OSError, MemoryError) as error:
        what = str(error) or "there is too little memory"
        raise CheckpointError(f"{path} cannot be read: {what}", f"check that its format is {format}") from error
    state = select(state, selection, path)
    state, left = (state, []) if strict else fitting(state, storable)
    replicated = state if part is None else {part: state}
    saved = _save(url, step, replicated)
    return Imported(path, format, os.fspath(url), step, part, *_counts(state), saved.size_bytes, tuple(left))


def _foreign(format: str) -> _Foreign:
    if format not in _FORMATS:
        raise ConfigError(f"unknown format {format!r}", f"formats: {', '.join(_FORMATS)}")
    if format == "safetensors":
        safetensors.check_installed()
    return _FORMATS[format]


def _local(path: str | os.PathLike[str], what: str) -> str:
    text = os.fspath(path)
    if "://" in text:
        raise ConfigError(f"the {what} {text} is a URL", f"pass a local path, and copy the {what} with other tools")
    return os.path.realpath(os.path.expanduser(text))


def _part(state: dict[str, Any], part: str | None, where: str) -> dict[str, Any]:
    if part is None:
        return state
    if not isinstance(state.get(part), dict):
        parts = ", ".join(key for key, value in state.items() if isinstance(value, dict))
        raise CheckpointError(f"{where} has no part {part!r}", f"its parts: {parts or 'none'}")
    return dict(state[part])


def _counts(state: dict[str, Any]) -> tuple[int, int]:
    kinds = [isinstance(value, torch.Tensor) for _, value in leaves(state)]
    return sum(kinds), len(kinds) - sum(kinds)


def _check_free(url: str | os.PathLike[str], step: int) -> None:
    store = open_store(url)
    try:
        scanned = scan(store)
    except OSError as error:
        raise CheckpointError(f"{store.url} cannot be read: {error}") from error
    if step in scanned.committed:
        raise CheckpointError(f"step {step} already exists at {store.url}", "pass another --step, or another URL")
    if scanned.uncommitted:
        # A save removes what was cut off, and cannot distinguish it from a save that another process is running.
        steps = ", ".join(map(str, scanned.uncommitted))
        raise CheckpointError(
            f"{store.url} has incomplete saves of step {steps}",
            "if no training saves there, remove their folders (`outlast ckpt prune --aside` does if there is a valid "
            "step), or pass another URL",
        )


def _save(url: str | os.PathLike[str], step: int, replicated: dict[str, Any]) -> CheckpointSaved:
    events: list[Event] = []
    config = CheckpointConfig(keep_last=0, old_steps="keep")
    attempt_id = f"import-{uuid.uuid4().hex}"
    with (
        contextlib.suppress(NotDurable),  # told below, in an import's own words
        Checkpointer(url, config, rank=0, world_size=1, attempt_id=attempt_id, on_event=events.append) as saver,
    ):
        saver.save(step, replicated=replicated)
    for event in events:
        if isinstance(event, CheckpointFailed):
            with contextlib.suppress(OSError):  # an empty folder would block the next try
                open_store(url).remove_tree(step_name(step))
            raise CheckpointError(
                f"step {step} cannot be saved at {saver.url}: {event.reason}", "nothing is left of the attempt"
            )
    return next(event for event in events if isinstance(event, CheckpointSaved))
