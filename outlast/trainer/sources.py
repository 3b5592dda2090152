"""Where batches come from: files in our order, a dataset in our order, or an iterable in its own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch.utils.data import IterableDataset, default_collate

from outlast.checkpoint.rng import load_rng_state, rng_state
from outlast.errors import ConfigError, DataError
from outlast.trainer.batches import Batch
from outlast.trainer.config import Config
from outlast.trainer.data import Corpus, Loader, find_files, split_held_out
from outlast.trainer.factories import Factory
from outlast.trainer.rng import seed_all
from outlast.trainer.streams import StreamLoader
from outlast.trainer.token_files import token_type

_OFFERED = ("split", "rank", "world_size", "seed", "batch_size")


class Source(Protocol):
    """Batches of one rank, step by step."""

    def describe(self) -> str:
        """For the log."""
        ...

    def fresh(self) -> Source:
        """The same from its beginning on, for an evaluation."""
        ...

    def batches(self, step: int) -> list[Batch]:
        """The micro-batches of ``step``, from 1 on; asked for in order."""
        ...

    def state(self) -> dict[str, int | str]:
        """What all ranks have in common."""
        ...

    def local_state(self) -> dict[str, Any]:
        """What is this rank's own; empty if nothing is."""
        ...

    def resumed_from(self, saved: dict[str, int | str], step: int, local: Mapping[str, Any] | None = None) -> Source:
        """What goes on after ``step``, where these states were saved; ``local`` is None on another number of ranks.

        Raises:
            DataError: it cannot go on exactly.
        """
        ...


class Samples:
    """A part of a map-style dataset; stands where a Corpus does.

    Args:
        dataset: with ``__len__`` and ``__getitem__``.
        first, count: which samples.
    """

    def __init__(self, dataset: Any, first: int, count: int) -> None:
        self.dataset = dataset
        self._first, self._count = first, count
        own = getattr(dataset, "fingerprint", getattr(dataset, "_fingerprint", ""))  # datasets' has one
        told = f"{len(dataset)}:{first}:{count}:{own if isinstance(own, str) else ''}"
        self.fingerprint = hashlib.sha256(told.encode()).hexdigest()[:16]
        """A hash of what is known of the dataset: its length, and a fingerprint if it has one."""

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Any:
        return self.dataset[self._first + index]


@dataclass(frozen=True, slots=True)
class DatasetLoader(Loader):
    """Samples of a map-style dataset in the order of :class:`Loader`, in which a window is a sample."""

    samples: Samples | None = None
    collate: Callable[[list[Any]], Batch] = default_collate

    @property
    def what(self) -> str:
        """For messages."""
        return f"{type(self._samples.dataset).__name__} has {self.windows} samples for this"

    @property
    def remedy(self) -> str:
        """What helps where this is too little."""
        return "add data, lower data.batch_size, or change data.held_out_share"

    def describe(self) -> str:
        """For the log."""
        return f"data: {len(self._samples)} samples of a {type(self._samples.dataset).__name__}"

    @property
    def windows(self) -> int:
        """Samples in an epoch."""
        return len(self._samples)

    def batches(self, step: int) -> list[Batch]:
        """``accumulate`` batches of ``batch_size`` samples."""
        samples = [self._samples[index] for index in self.indices(step)]
        size = self.batch_size
        return [self.collate(samples[at : at + size]) for at in range(0, len(samples), size)]

    @property
    def _samples(self) -> Samples:
        assert self.samples is not None
        return self.samples


def check_data(config: Config) -> None:
    """Import what ``[data]`` names, and compare arguments; nothing is called.

    Raises:
        ConfigError: see :class:`Factory`.
    """
    if config.data.factory is not None:
        _factory(config, {})
        _factory(config, config.data.held_out_arguments)
    _collate(config)


def build_sources(config: Config, rank: int, world_size: int) -> tuple[Source, Source | None]:
    """For training, and for evaluation if there is anything to evaluate on.

    Raises:
        ConfigError: a factory does not fit its arguments, or returns no dataset.
        DataError: there are no data, or too few, or a file does not hold what ``data.format`` says.
    """
    data = config.data
    order: dict[str, Any] = {
        "batch_size": data.batch_size,
        "seed": config.run.seed,
        "rank": rank,
        "world_size": world_size,
    }
    accumulate = config.trainer.accumulate
    if data.factory is None:
        order["context"] = config.model.context
        order["vocabulary"] = config.model.vocabulary if config.model.factory is None else None
        training, held_out = _corpora(config)
        return Loader(training, accumulate=accumulate, **order), Loader(held_out, accumulate=1, **order)
    factory = _factory(config, {})
    collate = _collate(config)
    evaluated: Any = None
    models = rng_state()
    try:
        # A split or a loader's generator may be drawn from these. Alike on all ranks, since they share the dataset.
        seed_all(config.run.seed, 0)
        dataset = factory(split="train", **order)
        if data.held_out_arguments or "split" in factory.takes:
            evaluated = _factory(config, data.held_out_arguments)(split="held_out", **order)
    finally:
        load_rng_state(models)
    training_source: Source
    if _is_map(dataset):
        total = len(dataset)
        held = 0 if evaluated is not None else max(1, int(total * data.held_out_share))
        training_source = _of_samples(Samples(dataset, 0, total - held), collate, accumulate, order)
        if evaluated is None:
            return training_source, _of_samples(Samples(dataset, total - held, held), collate, 1, order)
    else:
        training_source = _stream(factory, dataset, collate, accumulate, order)
    if evaluated is None:
        return training_source, None
    if _is_map(evaluated):
        return training_source, _of_samples(Samples(evaluated, 0, len(evaluated)), collate, 1, order)
    return training_source, _stream(factory, evaluated, collate, 1, order)


def _corpora(config: Config) -> tuple[Corpus, Corpus]:
    data = config.data
    files = find_files(data)
    if data.held_out_files:
        held_out = find_files(data, data.held_out_files)
        training = [file for file in files if file not in set(held_out)]
        if not training:
            raise DataError("all files of data.files are held out", "name others in data.held_out_files")
    else:
        training, held_out = split_held_out(files, data.held_out_share)
    dtype = token_type([*training, *held_out], data.format)
    return Corpus(training, dtype), Corpus(held_out, dtype)


def _is_map(dataset: Any) -> bool:
    is_loader = hasattr(dataset, "dataset") and hasattr(dataset, "batch_size")  # has a length, in batches
    has_both = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    return has_both and not is_loader and not isinstance(dataset, IterableDataset)


def _of_samples(samples: Samples, collate: Callable[..., Batch], accumulate: int, order: dict[str, Any]) -> Source:
    unused: Any = samples  # stands where a Corpus does
    return DatasetLoader(unused, context=1, accumulate=accumulate, samples=samples, collate=collate, **order)


def _stream(
    factory: Factory, dataset: Any, collate: Callable[..., Batch], accumulate: int, order: dict[str, Any]
) -> StreamLoader:
    if not hasattr(dataset, "__iter__"):
        raise ConfigError(
            f"{factory} returned a {type(dataset).__name__}, which is no dataset",
            "return one with __len__ and __getitem__, a torch IterableDataset, or an iterable of batches",
        )
    by_sample = isinstance(dataset, IterableDataset)
    return StreamLoader(dataset, collate if by_sample else None, accumulate=accumulate, **order)


def _factory(config: Config, more: Mapping[str, Any]) -> Factory:
    data = config.data
    assert data.factory is not None
    return Factory("data.factory", data.factory, {**data.arguments, **more}, offered=_OFFERED)


def _collate(config: Config) -> Callable[[list[Any]], Batch]:
    path = config.data.collate
    return default_collate if path is None else Factory("data.collate", path, {}, positional=1).target
