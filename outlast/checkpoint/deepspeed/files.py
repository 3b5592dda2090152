"""DeepSpeed's files, as they are stored in a step: found by tag and file name."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch

from outlast.checkpoint.deepspeed.containers import put_together
from outlast.checkpoint.format.kinds import Kind, kind_of_fields
from outlast.checkpoint.format.names import decode_key, encode_key, rank_name, step_name
from outlast.checkpoint.steps.catalog import scan
from outlast.checkpoint.tools.open_step import OpenedStep, storage
from outlast.errors import CheckpointError, CheckpointNotFound

HEADER = "deepspeed"
"""Key of the replicated state for the tag, and which rank has which of DeepSpeed's files."""
CHANGING = "changing"
"""Key of the local state for tensors that the next forward may change, by DeepSpeed's file."""

_log = logging.getLogger("outlast.checkpoint")


class Files:
    """DeepSpeed's files in one step.

    Args:
        folder: of the checkpoints.
        step: its number.
        replicated: its replicated state.
        local: returns the local state of a rank.
        kinds: that the files were taken apart with.

    Raises:
        CheckpointError: DeepSpeed did not save the step.
    """

    def __init__(
        self,
        folder: str,
        step: int,
        replicated: Mapping[str, Any],
        local: Callable[[int], Mapping[str, Any]],
        kinds: tuple[Kind, ...],
    ) -> None:
        self._folder = folder
        self._where = os.path.join(folder, step_name(step))
        if HEADER not in replicated:
            raise CheckpointError(f"DeepSpeed did not save {self._where}", "pass a folder that DeepSpeed saved to")
        self.tag: str = replicated[HEADER]["tag"]
        self.owners: dict[str, int] = replicated[HEADER]["files"]
        """Which rank has which file."""
        self._local = local
        self._kinds = kinds
        self._last: tuple[int, Mapping[str, Any]] | None = None  # DeepSpeed reads the module's file twice

    def place(self, file: str) -> str:
        """The path of the folder with a file's state."""
        return os.path.join(self._where, rank_name(self.owners[file]), encode_key(file))

    def read(self, name: str, device: torch.device) -> Any:
        """The state of a file.

        Args:
            name: of the file, or the last component of its :meth:`place`.
            device: of its tensors.

        Raises:
            CheckpointNotFound: the step does not have the file; names those it has.
        """
        file = name if name in self.owners else decode_key(name)
        if file not in self.owners:
            files = ", ".join(sorted(self.owners))
            raise CheckpointNotFound(f"{self._where} (tag {self.tag!r}) has no {name}", f"it has {files}")
        owner = self.owners[file]
        if self._last is None or self._last[0] != owner:
            self._last = owner, self._local(owner)
        local = self._last[1]
        return put_together(
            local[file]["state"],
            local[file]["tensors"],
            local[CHANGING][file],
            kinds=self._kinds,
            device=device,
            where=f"{self._where}: {file}",
        )


class FilesElsewhere(Files):
    """DeepSpeed's files of a step that is not in a folder: in memory, or behind a URL. Arguments are those of Files.

    DeepSpeed asks whether a file is there before it has it read, so an empty one of its name stands in ``folder``.
    """

    def place(self, file: str) -> str:
        """The path of a file that is there."""
        path = os.path.join(self._folder, file)
        with open(path, "ab"):
            return path


def step_of(folder: str, tag: str) -> int:
    """The newest committed step with a tag.

    Raises:
        CheckpointNotFound: there is none; names the tags in the folder.
        CheckpointError: the storage cannot be read.
    """
    tags, unreadable = [], []
    with storage(folder) as store:
        committed = scan(store).committed
    for step in reversed(committed):
        try:
            with OpenedStep(folder, step) as opened:
                header = opened.describe(None)[1].get(HEADER, {})
        except CheckpointError as error:
            _log.warning("%s is skipped, because its tag cannot be read: %s", step_name(step), error)
            unreadable.append(step_name(step))
            continue
        if header.get("tag") == tag:
            return step
        tags.append(str(header.get("tag")))
    readable = f"its tags: {', '.join(tags)}" if tags else "it has no tag that can be read"
    damaged = f"; the tags of these steps cannot be read: {', '.join(unreadable)}" if unreadable else ""
    raise CheckpointNotFound(f"{folder} has no committed checkpoint with the tag {tag!r}", readable + damaged)


def kinds_of_deepspeed() -> tuple[Kind, ...]:
    """The kinds of objects that DeepSpeed itself puts into a checkpoint."""
    scaler = import_module("deepspeed.runtime.fp16.loss_scaler")
    fragment = import_module("deepspeed.utils.tensor_fragment").fragment_address
    stage = import_module("deepspeed.runtime.zero.config").ZeroStageEnum
    return (
        kind_of_fields("deepspeed.LossScaler", scaler.LossScaler),
        kind_of_fields("deepspeed.DynamicLossScaler", scaler.DynamicLossScaler),
        kind_of_fields("deepspeed.fragment_address", fragment),
        Kind("deepspeed.ZeroStageEnum", stage, int, stage),
    )
