"""Data that is taken in the order in which it comes: a rank's own iterable, and how it goes on exactly.

Whatever the iterable draws from Python's, NumPy's and PyTorch's generators it draws from a state of its own, seeded by
(seed, epoch, rank), so that it does not depend on what the model draws. With ``state_dict`` and ``load_state_dict``
(torchdata's StatefulDataLoader) it goes on from there; otherwise the epoch's batches are taken again and dropped, and
the last of them must be the one that it was.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from outlast.checkpoint.rng import load_rng_state, rng_state
from outlast.errors import DataError
from outlast.trainer.batches import Batch
from outlast.trainer.rng import seed_all


class StreamLoader:
    """Micro-batches of one rank, from an iterable of batches or of samples.

    Args:
        source: what can be iterated over again for each epoch.
        collate: makes a batch of samples; None: ``source`` has batches.
        batch_size: samples in a batch, with ``collate``.
        accumulate: micro-batches per step.
        seed, rank: seed the source's generators.
        world_size: the number of ranks.
    """

    def __init__(
        self,
        source: Iterable[Any],
        collate: Callable[[list[Any]], Batch] | None,
        *,
        batch_size: int,
        accumulate: int,
        seed: int,
        rank: int,
        world_size: int,
    ) -> None:
        self._source: Any = source
        self._collate = collate
        self._batch_size = batch_size
        self._accumulate = accumulate
        self._seed, self._rank, self._world_size = seed, rank, world_size
        self._epoch = 0
        self._taken = 0  # batches of this epoch
        self._last: Batch = None
        self._iterator: Iterator[Batch] | None = None
        self._rng: dict[str, Any] = {}
        self._keeps_state = callable(getattr(source, "state_dict", None)) and hasattr(source, "load_state_dict")

    def describe(self) -> str:
        """For the log."""
        return f"data: a {type(self._source).__name__} on each rank"

    def fresh(self) -> StreamLoader:
        """The same from its beginning on."""
        return StreamLoader(
            self._source,
            self._collate,
            batch_size=self._batch_size,
            accumulate=self._accumulate,
            seed=self._seed,
            rank=self._rank,
            world_size=self._world_size,
        )

    def batches(self, step: int) -> list[Batch]:
        """The next ``accumulate`` batches.

        Raises:
            DataError: an epoch has none.
        """
        return [self._next() for _ in range(self._accumulate)]

    def state(self) -> dict[str, int | str]:
        """What all ranks have in common."""
        return {"stream": type(self._source).__name__, "seed": self._seed, "world_size": self._world_size}

    def local_state(self) -> dict[str, Any]:
        """Where this rank is."""
        state = {"epoch": self._epoch, "taken": self._taken, "rng": self._rng, "digest": _digest(self._last)}
        if self._keeps_state and self._iterator is not None:
            state["source"] = self._source.state_dict()
        return state

    def resumed_from(
        self, saved: Mapping[str, int | str], step: int, local: Mapping[str, Any] | None = None
    ) -> StreamLoader:
        """The stream that goes on after the one of ``saved`` and ``local``, its two states.

        Raises:
            DataError: other data or another number of ranks saved them, or the iterable does not give the same again.
        """
        if local is None or saved.get("world_size") != self._world_size or "taken" not in local:
            raise DataError(
                f"the checkpoint's data stood at {dict(saved)}; a stream is each rank's own, and goes on with "
                f"{self._world_size} ranks only if as many saved it",
                "resume with the same ranks and data.factory; a map-style dataset goes on with any number of ranks",
            )
        if saved.get("seed") != self._seed:
            raise DataError(f"the checkpoint has data seed = {saved.get('seed')}, this run {self._seed}")
        self._epoch = int(local["epoch"])
        taken = int(local["taken"])
        if taken == 0:
            return self
        if self._keeps_state and "source" in local:
            self._source.load_state_dict(local["source"])
            self._begin()
            self._taken = taken
            self._rng = local["rng"]
            return self
        self._begin()
        for _ in range(taken):
            self._last = self._take()
        self._taken = taken
        if _digest(self._last) != local["digest"]:
            raise DataError(
                f"rank {self._rank}: batch {taken} of epoch {self._epoch} is not the one that it was: "
                f"the {type(self._source).__name__} does not give the same again",
                "give it state_dict and load_state_dict, as torchdata's StatefulDataLoader has them, or a fixed order",
            )
        return self

    def _next(self) -> Batch:
        if self._iterator is None:
            self._begin()
        batch = self._take()
        if batch is _END:
            self._epoch, self._taken = self._epoch + 1, 0
            self._begin()
            batch = self._take()
        if batch is _END:
            raise DataError(
                f"rank {self._rank}: the {type(self._source).__name__} has no batch in epoch {self._epoch}",
                "an iterable begins anew with each iter(); a generator does not: wrap it in a class",
            )
        self._taken += 1
        self._last = batch
        return batch

    def _begin(self) -> None:
        with self._own_generators(anew=True):
            for holder in (self._source, getattr(self._source, "sampler", None)):
                if callable(getattr(holder, "set_epoch", None)):
                    holder.set_epoch(self._epoch)  # type: ignore[union-attr]
            self._iterator = self._collated(iter(self._source)) if self._collate else iter(self._source)

    def _take(self) -> Batch:
        assert self._iterator is not None
        with self._own_generators():
            return next(self._iterator, _END)

    def _collated(self, samples: Iterator[Any]) -> Iterator[Batch]:
        assert self._collate is not None
        batch: list[Any] = []
        for sample in samples:
            batch.append(sample)
            if len(batch) == self._batch_size:
                yield self._collate(batch)
                batch = []

    @contextmanager
    def _own_generators(self, *, anew: bool = False) -> Iterator[None]:
        models = rng_state()
        if anew:
            seed_all(zlib.crc32(f"{self._seed}:{self._epoch}".encode()), self._rank)
        else:
            load_rng_state(self._rng)
        try:
            yield
        finally:
            self._rng = rng_state()
            load_rng_state(models)


_END = object()


def _digest(batch: Batch) -> int:
    """CRC-32 of the tensors in a batch."""
    if isinstance(batch, Tensor):
        content = batch.detach().cpu().contiguous().reshape(-1)
        return zlib.crc32(content.view(torch.uint8).numpy().data) if content.numel() else 0
    inside = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else ()
    return zlib.crc32(repr([_digest(each) for each in inside]).encode()) if inside else 0
