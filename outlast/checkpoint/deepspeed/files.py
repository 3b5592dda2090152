"""What DeepSpeed would have written into files, in a step: found by tag and by the file's name."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch

from outlast.checkpoint.deepspeed.containers import Kind, kind_of_fields, put_together
from outlast.checkpoint.format.names import decode_key, encode_key, rank_name, step_name
from outlast.checkpoint.steps.catalog import scan
from outlast.checkpoint.tools.open_step import OpenedStep, storage
from outlast.errors import CheckpointError, CheckpointNotFound

HEADER = "deepspeed"
"""Key of the replicated state: the tag, and which rank has which of DeepSpeed's files."""
CHANGING = "changing"
"""Key of the local state: tensors that the next forward may change, by DeepSpeed's file."""

_log = logging.getLogger("outlast.checkpoint")


class Files:
    """DeepSpeed's files of one step.

    Args:
        folder: where checkpoints lie.
        step: which.
        replicated: its replicated state.
        local: gives the local state of a rank.
        kinds: as they were saved with.

    Raises:
        CheckpointError: the step was not saved by DeepSpeed.
    """

    def __init__(
        self,
        folder: str,
        step: int,
        replicated: Mapping[str, Any],
        local: Callable[[int], dict[str, Any]],
        kinds: tuple[Kind, ...],
    ) -> None:
        self._where = os.path.join(folder, step_name(step))
        if HEADER not in replicated:
            raise CheckpointError(f"{self._where} was not saved by DeepSpeed", "give a folder to which DeepSpeed saved")
        self.tag: str = replicated[HEADER]["tag"]
        self.owners: dict[str, int] = replicated[HEADER]["files"]
        """Which rank has which file."""
        self._local = local
        self._kinds = kinds
        self._last: tuple[int, dict[str, Any]] | None = None  # DeepSpeed reads the module's file twice

    def place(self, file: str) -> str:
        """Where its state lies; a folder's path."""
        return os.path.join(self._where, rank_name(self.owners[file]), encode_key(file))

    def read(self, name: str, device: torch.device) -> Any:
        """The state of a file, or of the last part of its place.

        Raises:
            CheckpointNotFound: there is no such file; names those there are.
        """
        file = name if name in self.owners else decode_key(name)
        if file not in self.owners:
            there = ", ".join(sorted(self.owners))
            raise CheckpointNotFound(f"{self._where} (tag {self.tag!r}) has no {name}", f"it has {there}")
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


def step_of(folder: str, tag: str) -> int:
    """The newest committed step of a tag.

    Raises:
        CheckpointNotFound: there is none; names the tags there are.
        CheckpointError: the place cannot be read.
    """
    tags, unread = [], []
    with storage(folder) as store:
        committed = scan(store).committed
    for step in reversed(committed):
        try:
            with OpenedStep(folder, step) as opened:
                header = opened.describe(None)[1].get(HEADER, {})
        except CheckpointError as error:
            _log.warning("%s is passed over: its tag cannot be read: %s", step_name(step), error)
            unread.append(step_name(step))
            continue
        if header.get("tag") == tag:
            return step
        tags.append(str(header.get("tag")))
    there = f"tags there are: {', '.join(tags)}" if tags else "there is none that can be read"
    damaged = f"; of these the tag cannot be read: {', '.join(unread)}" if unread else ""
    raise CheckpointNotFound(f"no committed checkpoint of tag {tag!r} in {folder}", there + damaged)


def kinds_of_deepspeed() -> tuple[Kind, ...]:
    """The objects that DeepSpeed itself puts into a checkpoint."""
    scaler = import_module("deepspeed.runtime.fp16.loss_scaler")
    fragment = import_module("deepspeed.utils.tensor_fragment").fragment_address
    stage = import_module("deepspeed.runtime.zero.config").ZeroStageEnum
    return (
        kind_of_fields("deepspeed.LossScaler", scaler.LossScaler),
        kind_of_fields("deepspeed.DynamicLossScaler", scaler.DynamicLossScaler),
        kind_of_fields("deepspeed.fragment_address", fragment),
        Kind("deepspeed.ZeroStageEnum", stage, int, stage),
    )
