"""What passes between an engine and its checkpoint engine: DeepSpeed's own collecting and putting back of state."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist

from outlast.checkpoint.deepspeed.containers import take_apart
from outlast.checkpoint.deepspeed.files import CHANGING, HEADER, Files, kinds_of_deepspeed
from outlast.checkpoint.peers.collectives import Agreement
from outlast.checkpoint.restore.messages import Failure, Message, all_gather_messages
from outlast.checkpoint.state.tensors import address_of_storage
from outlast.errors import CheckpointError

_CHANGED_BY_UPDATES_ONLY = ("optimizer_state_dict", "optimizer", "frozen_param_fragments")
"""Top-level keys of DeepSpeed's files whose tensors only an update changes."""
SEAMS = {
    "save_checkpoint": ("save_dir", "tag", "client_state", "save_latest", "exclude_frozen_parameters"),
    "load_checkpoint": (
        "load_dir",
        "tag",
        "load_module_strict",
        "load_optimizer_states",
        "load_lr_scheduler_states",
        "load_module_only",
        "custom_load_fn",
    ),
    "_get_all_ckpt_names": ("checkpoints_path", "tag"),
    "_copy_recovery_script": ("save_path",),
}
"""The engine's methods that are replaced, and their arguments."""


@dataclass(frozen=True)
class _SavedFile(Message):
    """A rank saves one of DeepSpeed's files."""

    name: str


class Passing:
    """Runs an engine's own saving and loading; what it would write and read is handed over here.

    Args:
        engine: DeepSpeed's, before any of ``SEAMS`` is replaced.
    """

    def __init__(self, engine: Any) -> None:
        self.kinds = kinds_of_deepspeed()
        self.loading: Files | None = None
        """What DeepSpeed is reading now."""
        self._engine = engine
        self._originals = {name: getattr(engine, name) for name in SEAMS}
        self._agreement = Agreement(None, dist.get_rank(), dist.get_world_size())
        self._collected: dict[str, Any] | None = None

    @property
    def collecting(self) -> bool:
        """Whether what DeepSpeed saves now belongs to a checkpoint."""
        return self._collected is not None

    def take(self, state: Any, file: str) -> None:
        """Keep a file's state.

        Raises:
            CheckpointError: this file's state was passed before.
        """
        assert self._collected is not None
        if file in self._collected:
            raise CheckpointError(f"DeepSpeed saves {file} twice in one checkpoint")
        self._collected[file] = state

    def collect(
        self, name: str, client_state: Mapping[str, Any] | None, exclude_frozen_parameters: bool
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The engine's state, as ``replicated`` and ``local`` of a save; collective. The tensors are live.

        Raises:
            CheckpointError: names the rank, DeepSpeed's file and the key.
        """
        self._collected = {}
        try:
            # It is given no folder to write to, because it writes nothing.
            self._originals["save_checkpoint"](".", name, dict(client_state or {}), True, exclude_frozen_parameters)
            collected = self._collected
        finally:
            self._collected = None
        local: dict[str, Any] = {}
        failures: list[Failure] = []
        try:
            local = self._local(collected)
        except CheckpointError as error:
            failures = [Failure.of(error)]
        # No rank may raise before this: DeepSpeed's own part ends with a barrier.
        for rank, failure in all_gather_messages(self._agreement, Failure, failures):
            raise CheckpointError(f"rank {rank}: {failure.reason}", failure.fix)
        header = {
            "tag": name,
            "version": import_module("deepspeed").__version__,
            "files": self._owners_of_all(collected),
            "zero_stage": int(self._engine.zero_optimization_stage()),
        }
        return {HEADER: header}, local

    def put_back(self, folder: str, files: Files, *arguments: Any) -> tuple[str | None, dict[str, Any] | None]:
        """Have DeepSpeed load these files; collective.

        Args:
            folder: where it looks for them.
            files: the state.
            arguments: those of ``load_checkpoint`` after the tag. Its result is returned.
        """
        self.loading = files
        try:
            path, client_state = self._originals["load_checkpoint"](folder, files.tag, *arguments)
        finally:
            self.loading = None
        return path, client_state

    def names_for(self, checkpoints_path: str, tag: str) -> list[str]:
        """The paths of the files with the module's state, in place of DeepSpeed's glob."""
        if self.loading is None:
            return list(self._originals["_get_all_ckpt_names"](checkpoints_path, tag))
        pattern = os.path.basename(self._engine._get_ckpt_name(checkpoints_path, tag, mp_placeholder="*"))
        return [self.loading.place(file) for file in sorted(fnmatch.filter(self.loading.owners, pattern))]

    def copy_recovery_script(self, save_path: str) -> None:
        """Leave out the scripts that DeepSpeed puts beside its checkpoints: they do not read outlast's."""
        if not self.collecting:
            self._originals["_copy_recovery_script"](save_path)

    def _owners_of_all(self, collected: Mapping[str, Any]) -> dict[str, int]:
        """The rank that saves each of DeepSpeed's files; collective, raises on all ranks."""
        owners: dict[str, int] = {}
        own = [_SavedFile(file) for file in sorted(collected)]
        for rank, file in all_gather_messages(self._agreement, _SavedFile, own):
            if file.name in owners:
                raise CheckpointError(
                    f"rank {rank}: rank {owners[file.name]} saves {file.name} too",
                    "the files of one checkpoint need different names",
                )
            owners[file.name] = rank
        return owners

    def _local(self, collected: Mapping[str, Any]) -> dict[str, Any]:
        """This rank's local state: the files that DeepSpeed passed, taken apart."""
        weights = {address_of_storage(weight) for weight in self._engine.module.parameters()} - {0}

        def stays(path: tuple[str, ...], tensor: torch.Tensor) -> bool:
            if path[:1] == ("module",):  # the next forward may change buffers, and what get_extra_state returns
                return address_of_storage(tensor) in weights
            return bool(path) and path[0] in _CHANGED_BY_UPDATES_ONLY

        local: dict[str, Any] = {CHANGING: {}}
        for file, state in collected.items():
            parts = take_apart(state, file, self.kinds, stays)
            local[file] = {"state": parts.skeleton, "tensors": parts.tensors}
            local[CHANGING][file] = parts.changing
        return local
