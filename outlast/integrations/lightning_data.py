"""The place in the data: which batches of an epoch are done, and how the rest comes out as it would have."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer

from outlast.checkpoint.rng import load_rng_state, rng_state

_LOG = logging.getLogger("outlast")


class DataPosition:
    """A rank's place in the training data, as a part of a session.

    What an epoch's order depends on is remembered as it was when the epoch began: torch's random numbers and the
    generators of loaders and samplers. From there the batches that were done are gone through again, and then the
    random-number states are put back as they were after them.

    Args:
        trainer: while it fits.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._batches = 0
        self._epoch_rng: dict[str, Any] = {}
        self._epoch_generators: list[torch.Tensor] = []
        self._loader_states: list[Any] = []
        self._rng: dict[str, Any] | None = None  # to put back at the place where it was saved

    def begin(self, *, restored: bool) -> None:
        """The session has begun; if it restored a checkpoint, its random-number states are put back later again."""
        self._rng = rng_state() if restored else None

    def at(self, batches: int) -> None:
        """That many batches of this epoch are done."""
        self._batches = batches

    def begin_epoch(self) -> None:
        """An epoch begins, and nothing of it has been fetched."""
        if self._rng is not None:
            load_rng_state(self._rng)
            self._rng = None
            self._load_generators()
        self._batches = 0
        self._epoch_rng = rng_state()
        self._epoch_generators = [one.get_state() for one in self._generators()]

    def go_into_epoch(self) -> None:
        """If the checkpoint was saved inside an epoch: go to the batch after those that are done."""
        if self._rng is None or not self._batches:
            return
        fit = self._trainer.fit_loop
        fetcher, loaders = fit._data_fetcher, fit._combined_loader.flattened
        for loader in loaders:
            for sampler in (getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)):
                set_epoch = getattr(sampler, "set_epoch", None)
                if callable(set_epoch):
                    set_epoch(fit.epoch_progress.current.processed)
        load_rng_state(self._epoch_rng)
        self._load_generators()
        if self._resumable():
            for loader, state in zip(loaders, self._loader_states, strict=True):
                loader.load_state_dict(state)
            iter(fetcher)
        else:
            if self._trainer.current_epoch > 0:  # the first epoch's iterator was made before the epoch began
                iter(fetcher)
            if self._trainer.is_global_zero:
                _LOG.info("going through %d batches of the epoch that are done", self._batches)
            for _ in range(self._batches):
                next(fetcher)
        fetcher.fetched = 0  # Lightning adds the batches that are done
        load_rng_state(self._rng)
        self._rng = None

    def state_dict(self) -> dict[str, Any]:
        """Of this rank."""
        return {
            "batches": self._batches,
            "epoch_rng": self._epoch_rng,
            "epoch_generators": self._epoch_generators,
            "loaders": [loader.state_dict() for loader in self._loaders()] if self._resumable() else [],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Remember it; the loaders are not there yet."""
        self._batches = int(state["batches"])
        self._epoch_rng = dict(state["epoch_rng"])
        self._epoch_generators = list(state["epoch_generators"])
        self._loader_states = list(state["loaders"])

    def _loaders(self) -> list[Any]:
        combined = self._trainer.fit_loop._combined_loader
        return [] if combined is None else list(combined.flattened)

    def _resumable(self) -> bool:
        """Whether the loaders know their places. Without a length Lightning has fetched a batch more than it did."""
        loaders = self._loaders()
        return self._trainer.num_training_batches != float("inf") and all(
            callable(getattr(loader, name, None)) for loader in loaders for name in ("state_dict", "load_state_dict")
        )

    def _generators(self) -> list[torch.Generator]:
        found: dict[int, torch.Generator] = {}
        for loader in self._loaders():
            batches = getattr(loader, "batch_sampler", None)
            for holder in (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)):
                generator = getattr(holder, "generator", None)
                if isinstance(generator, torch.Generator):
                    found[id(generator)] = generator
        return list(found.values())

    def _load_generators(self) -> None:
        for generator, state in zip(self._generators(), self._epoch_generators, strict=False):
            generator.set_state(state)
