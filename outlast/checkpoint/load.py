"""Reading a checkpoint without being the run that saves it: nothing at the URL is changed."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections import Counter
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any, Literal, SupportsIndex

import torch
import torch.distributed as dist

from outlast.checkpoint.format.names import COMMIT, parse_step, step_name
from outlast.checkpoint.format.records import Fault
from outlast.checkpoint.format.step_number import as_step
from outlast.checkpoint.peers.collectives import Agreement
from outlast.checkpoint.restore.candidates import Candidate
from outlast.checkpoint.restore.housekeeping import find_steps
from outlast.checkpoint.restore.load import Loader, Restored, read_local_of
from outlast.checkpoint.restore.messages import Failure, all_gather_messages
from outlast.checkpoint.restore.request import RestoreContext, agree_on_request
from outlast.checkpoint.state.selection import Rename, make_selection
from outlast.checkpoint.steps.reader import StepReader, as_error
from outlast.checkpoint.storage.base import Store
from outlast.checkpoint.storage.io_threads import IoThreads
from outlast.checkpoint.storage.local import LocalStore
from outlast.checkpoint.storage.open import open_store
from outlast.errors import CheckpointError, CheckpointNotFound, CorruptCheckpoint
from outlast.events import Event

_THREADS = 4
_LOOKS = 50
"""How often the steps are listed, at most, while a run removes the ones that were found."""
_TRIES = 2
"""How often a damaged step is read: it may have been saved again meanwhile."""


def load(
    url: str | os.PathLike[str],
    step: Literal["newest"] | SupportsIndex = "newest",
    *,
    parts: Collection[str] | None = None,
    like: Mapping[str, Any] | None = None,
    into: Mapping[str, Any] | None = None,
    strict: bool | Collection[str] = True,
    rename: Rename | None = None,
    cast: bool | torch.dtype = False,
    group: dist.ProcessGroup | None = None,
    alone: bool = False,
) -> Restored:
    """Read a checkpoint, or parts of one, from storage: for evaluation, conversion, fine-tuning, or a look at it.

    ::

        url = "runs/mine/checkpoints"
        restored = outlast.checkpoint.load(url, parts=("model",), into={"model": model.state_dict()})

    Nothing at the URL is changed, so this may run beside the run that saves there. What is read is verified. It does
    not matter how many ranks saved the step: ``Restored.local`` is empty if they are not as many as now, and
    ``Restored.read_local(rank)`` reads the own state of any of them, after this has returned, too.

    In a process group, all its ranks call this with the same arguments, and read the same step.

    Args:
        url: where the steps are: a path, or any fsspec URL.
        step: its number; ``"newest"``: the newest one that is complete and undamaged. Newer damaged ones are named in
            the log.
        parts: see :meth:`Checkpointer.restore`, as for the next five.
        like: in a running state's sharding.
        into: into a running state's tensors.
        strict: what must fit.
        rename: what is called otherwise.
        cast: what is converted.
        group: whose ranks read together; None takes the default group, or this process alone if there is none.
        alone: this process reads for itself, whatever groups there are; without DTensors.

    Raises:
        CheckpointNotFound: there is no such step; says what was looked for, and what is there.
        CorruptCheckpoint, IncompleteCheckpoint: the step asked for is damaged, or none is undamaged; names the files.
        UnknownFormatVersion, StateMismatch, CheckpointError: see :meth:`Checkpointer.restore`.
        MissingDependency, ConfigError: see :class:`Checkpointer`.
    """
    wanted = None if isinstance(step, str) and step == "newest" else as_step(step, "load", "newest")
    store = open_store(url)
    rank, world_size = 0, 1
    if dist.is_initialized() and not alone:
        rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    agreement = Agreement(group, rank, world_size)
    with IoThreads(_THREADS) as io:
        context = RestoreContext(store, rank, world_size, agreement, _discard, io)
        running = like is not None or into is not None
        select = partial(make_selection, parts, strict, rename, cast, running=running)
        request = agree_on_request(like, into, group, context, any_world_size=True, select=select)
        request = dataclasses.replace(request, verify_other_ranks=False)
        restored, found_in = _Search(context, Loader(context, request, None), wanted).run()
    read_local = partial(_read_local, found_in, restored.step, restored.world_size)
    return dataclasses.replace(restored, read_local=read_local)


class _Search:
    """For the step that is loaded; collective."""

    def __init__(self, context: RestoreContext, loader: Loader, wanted: int | None) -> None:
        self._context = context
        self._loader = loader
        self._wanted = wanted
        self._tries: Counter[int] = Counter()
        self._damaged: dict[int, list[Fault]] = {}

    def run(self) -> tuple[Restored, Store]:
        """The state, and the store that has it."""
        for _ in range(_LOOKS):
            committed, reading = _find(self._context, self._wanted)
            step = self._choose(committed)
            outcome = dataclasses.replace(self._loader, context=reading).load(Candidate(step, None))
            if isinstance(outcome, Restored):
                return outcome, reading.store
            self._tries[step] += 1
            if self._tries[step] == _TRIES:
                self._damaged[step] = outcome
                self._context.report_faults(step, outcome)
        raise CheckpointError(
            f"the steps at {self._context.store.url} are removed faster than they can be read ({_LOOKS} tries)",
            "let the run that saves there keep more of them (checkpoint.keep_last)",
        )

    def _choose(self, committed: tuple[int, ...]) -> int:
        """The step to read next, of those that are there now."""
        url = self._context.store.url
        if self._wanted is not None:
            if self._wanted not in committed:
                raise CheckpointNotFound(f"step {self._wanted} at {url} was removed while it was read")
            if self._wanted in self._damaged:
                raise as_error(self._damaged[self._wanted][0], self._context.store, self._wanted)
            return self._wanted
        left = [step for step in committed if step not in self._damaged]
        if not left:
            lines = [f"step {step}: {fault}" for step, faults in self._damaged.items() for fault in faults]
            raise CorruptCheckpoint(f"{url}: there are checkpoints, but none is valid:\n  " + "\n  ".join(lines))
        return left[-1]


def _find(context: RestoreContext, wanted: int | None) -> tuple[tuple[int, ...], RestoreContext]:
    """The committed steps, oldest first, with the one that is wanted among them; and what reads them. Collective.

    Raises:
        CheckpointNotFound: there is none, or not the one that is wanted.
        CheckpointError: the storage cannot be read.
    """
    found, reading = find_steps(context)
    failures: list[Failure] = []
    if context.rank == 0 and (not found.committed or wanted not in (None, *found.committed)):
        try:
            failures = [Failure.of(_not_found(context.store, wanted, found.committed))]
        except OSError as error:
            what = f"{context.store.url} cannot be read: {error}"
            failures = [Failure(CheckpointError.__name__, what, "check the storage and its permissions")]
    for _, failure in all_gather_messages(context.agreement, Failure, failures):
        raise failure.as_error()
    return found.committed, reading


def _not_found(store: Store, wanted: int | None, committed: tuple[int, ...]) -> CheckpointNotFound:
    """Says what was looked for, and what is there instead."""
    looked_for = f"looked for {step_name(wanted) if wanted is not None else 'step_*'}/{COMMIT}"
    if committed:
        what = f"no checkpoint of step {wanted} at {store.url}"
        return CheckpointNotFound(f"{what}: {looked_for}", f"committed steps: {', '.join(map(str, committed))}")
    names = store.names("")
    above, _, last = store.url.rstrip("/").rpartition("/")
    fix = "pass the folder that holds the step_* folders"
    if isinstance(store, LocalStore) and not os.path.isdir(store.root):
        there = "there is no such folder"
        while above and not os.path.isdir(above):
            above, _, last = above.rpartition("/")
        near = difflib.get_close_matches(last, os.listdir(above or "/"), n=1)
        fix = f"{above or '/'} has no {last!r}" + (f"; did you mean {near[0]!r}?" if near else "")
    elif COMMIT in names and parse_step(last) is not None:
        there, fix = "this is a step itself", f"pass {above} and step={parse_step(last)}"
    elif "checkpoints" in names:
        there, fix = "this looks like a run's directory", f"pass {store.url}/checkpoints"
    elif not names:
        there = "nothing is there"
    else:
        steps = sum(parse_step(name) is not None for name in names)
        there = f"{steps} saves that were not committed are there" if steps else f"{len(names)} other files are there"
    return CheckpointNotFound(f"no checkpoint at {store.url}: {looked_for}, and {there}", fix)


def _read_local(store: Store, step: int, world_size: int, rank: int) -> dict[str, Any]:
    if not 0 <= rank < world_size:
        raise CheckpointError(f"step {step} has no rank {rank}", f"it was saved by {world_size} ranks, from 0")
    with IoThreads(_THREADS) as io:
        return read_local_of(StepReader(store, step, io), store, rank)


def _discard(event: Event) -> None:
    """Discard events: nothing is told of a read but what the log says."""
