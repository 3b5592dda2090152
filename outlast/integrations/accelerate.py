"""A session for loops that use Hugging Face's Accelerate: compression, checkpoints, and exact resume inside an epoch.

An example is ``examples/accelerate_loop.py``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.scheduler import AcceleratedScheduler
from accelerate.utils import parse_flag_from_env, synchronize_rng_states
from torch import nn
from torch.optim import Optimizer

from outlast.checkpoint import CheckpointConfig
from outlast.checkpoint.rng import load_rng_state, rng_state
from outlast.errors import SessionError
from outlast.integrations.wrappers import bare_optimizer, refuse_sharding, without_compile
from outlast.session import Session
from outlast.session.compression import Comm


class AcceleratedSession(Session):
    """A :class:`Session` on what ``accelerator.prepare`` returned; every rank makes one, with the same arguments.

    The model is compressed as it was wrapped: DDP, FSDP2, or DeepSpeed's ZeRO 0 to 2 (ZeRO 3 needs ``comm=False``). The
    accelerator's gradient scaler is saved and followed. Loops over a loader's batches take :meth:`batches`; loops over
    steps take :meth:`steps`, as in any session. Clipping with ``accelerator.clip_grad_norm_`` needs gradients:
    ``comm={"target": "gradient", "feedback": "ef21"}``; on AdamW's updates, which are compressed by default, it is an
    error that says so. DeepSpeed clips by its own settings, and its gradients are compressed.

    Args:
        accelerator: that prepared the model and the optimizer.
        run, comm, checkpoint, resume, notice_grace_s: as for :class:`Session`.
        model: as ``accelerator.prepare`` returned it.
        optimizer: likewise.
        parts: further state to save, by name, such as ``scheduler=scheduler``; see :meth:`Session.add`.

    Raises:
        SessionError: the model is not prepared, or is shared out by what a session cannot serve (FSDP of version 1,
            Megatron); or Accelerate uses DDP where FSDP or DeepSpeed was asked for, as it does on CPUs.
        RunDirectoryError, ConfigError, CommError, CheckpointError: see :class:`Session`.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        run: str | os.PathLike[str] | None,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        comm: Comm = None,
        checkpoint: CheckpointConfig | Mapping[str, Any] | Literal[False] | None = None,
        resume: Literal["auto", "never"] | int = "auto",
        notice_grace_s: float | None = 25.0,
        **parts: Any,
    ) -> None:
        refuse_sharding(
            accelerator,
            "AcceleratedSession: the accelerator",
            fsdp=parse_flag_from_env("ACCELERATE_USE_FSDP"),
            deepspeed=parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"),
        )
        if not getattr(model, "_is_accelerate_prepared", False):
            raise SessionError(
                f"AcceleratedSession: the {type(model).__name__} is not prepared",
                "give what accelerator.prepare(model, optimizer, loader) returned",
            )
        bare = without_compile(model)
        super().__init__(
            run,
            bare,
            bare_optimizer(bare, optimizer),
            comm=comm,
            checkpoint=checkpoint,
            resume=resume,
            notice_grace_s=notice_grace_s,
        )
        self._accelerator = accelerator
        try:
            for name, part in parts.items():  # of what Accelerate has wrapped the session does not know the kind
                self.add(replicated=True if isinstance(part, AcceleratedScheduler) else None, **{name: part})
            if accelerator.scaler is not None:
                self.add(scaler=accelerator.scaler)
        except SessionError as error:
            self.close(error)
            raise

    def batches(self, loader: Any, last_step: int) -> Iterator[Any]:
        """A loader's batches, epoch after epoch, until ``last_step`` steps are done over all starts of the run.

        A step is what lies between two updates: with ``accelerator.accumulate``, several batches. After each it saves
        what is due, and after a notice there are no more batches. A resumed run goes on inside the epoch, with the
        batches and random numbers that a straight run has there; only what a data set or collator draws from global
        generators is drawn anew. On another number of ranks the place in the epoch is the same to within a batch.

        Args:
            loader: as ``accelerator.prepare`` returned it.
            last_step: number of the run's last step; the first is 1.

        Raises:
            SessionError: the loader is not prepared, or keeps its own position (``use_stateful_dataloader``); or it has
                no batches.
            EndedEarly, SnapshotMutated, StateMismatch, CheckpointError: see :meth:`steps`.
        """
        if not getattr(loader, "_is_accelerate_prepared", False):
            raise SessionError(
                f"session.batches(): the {type(loader).__name__} is not prepared",
                "give what accelerator.prepare(loader) returned",
            )
        if getattr(loader, "use_stateful_dataloader", False):
            raise SessionError(
                "session.batches(): the loader keeps its own position (use_stateful_dataloader)",
                "leave that off; or add it, session.add(loader=loader), and take session.steps()",
            )
        place = PlaceInData(1 if self._accelerator.split_batches else self.world_size)
        self.add(replicated=True, place_in_data=place)
        done = self.begin(last_step)
        return self._batches(loader, place, last_step, rng_state() if done else None)

    def _batches(
        self, loader: Any, place: PlaceInData, last_step: int, restored: dict[str, Any] | None
    ) -> Iterator[Any]:
        taken = place.batches  # of the epoch that it goes on in; what it draws at its start has been drawn
        inside = False
        while self.done_step < last_step and not self.ending:
            if taken:
                place.rewind(loader)
            else:
                if restored is not None:
                    load_rng_state(restored)
                    restored = None
                place.begin_epoch(loader, alone=self.world_size == 1)
            before = place.batches
            for batch in skip_first_batches(loader, taken) if taken else loader:
                if restored is not None:
                    load_rng_state(restored)
                    restored = None
                if not inside:
                    self.begin_step()
                    inside = True
                place.batches += 1
                yield batch
                if self._accelerator.sync_gradients:
                    inside = False
                    if self.end_step() or self.done_step == last_step:
                        return
            if place.batches == before and not taken:
                raise SessionError("session.batches(): the loader has no batches", "give one that is not empty")
            place.epoch, place.batches, taken = place.epoch + 1, 0, 0


class PlaceInData:
    """How far a loop is in its loader: the epoch, its batches that were taken, and what its order was drawn with.

    Args:
        sharers: the ranks that share out the loader's batches.
    """

    def __init__(self, sharers: int) -> None:
        self._sharers = sharers
        self.epoch = 0
        self.batches = 0
        self._drawn_with = torch.empty(0, dtype=torch.uint8)
        """The order's generator when the epoch began; empty where the order is a function of the epoch."""

    def state_dict(self) -> dict[str, Any]:
        """Equal on all ranks."""
        return {
            "epoch": self.epoch,
            "batches": self.batches,
            "sharers": self._sharers,
            "drawn_with": self._drawn_with,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As :meth:`state_dict` returned it; if others shared, the place is the same to within a batch of each."""
        self.epoch, self.batches = state["epoch"], state["batches"] * state["sharers"] // self._sharers
        self._drawn_with = state["drawn_with"].to(torch.uint8)

    def begin_epoch(self, loader: Any, *, alone: bool) -> None:
        """Remember what the order is about to be drawn with. Collective where ranks share a generator."""
        loader.set_epoch(self.epoch)
        generator = getattr(loader, "synchronized_generator", None)
        if generator is not None:
            if not alone:
                synchronize_rng_states(["generator"], generator)
            self._drawn_with = generator.get_state().clone()
        elif alone:  # it is the global one
            self._drawn_with = torch.get_rng_state()

    def rewind(self, loader: Any) -> None:
        """Have the epoch's order drawn again."""
        loader.set_epoch(self.epoch)
        generator = getattr(loader, "synchronized_generator", None)
        if not len(self._drawn_with):
            return
        if generator is not None:
            generator.set_state(self._drawn_with)
        else:
            torch.set_rng_state(self._drawn_with)
