"""Process groups of outlast's own, under a name that all members agree on, and what a rank says when it leaves one.

Torch names a group by how many groups a process has made before, so ranks that have made different ones would look for
each other under different names until the limit passes. Here the first member draws a name, and tells the others over
the group that they all know.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from outlast.errors import CommError

T = TypeVar("T")

_STORE_LIMIT_S = 5.0
"""How long the store may take to answer when an error is put into words."""


def agreed_name(group: dist.ProcessGroup | None, timeout_s: float) -> str:
    """A name that no group had before, the same on every rank of ``group``; a collective call.

    Raises:
        CommError: a rank did not answer within ``timeout_s`` seconds.
    """
    drawn = torch.tensor([secrets.randbits(62)], dtype=torch.int64, device=_device(group))
    first = 0 if group is None else dist.get_process_group_ranks(group)[0]
    try:
        work = dist.broadcast(drawn, src=first, group=group, async_op=True)
        assert work is not None
        work.wait(timedelta(seconds=timeout_s))
        return f"outlast-{int(drawn):016x}"
    except RuntimeError as error:
        ranks = list(range(dist.get_world_size())) if group is None else dist.get_process_group_ranks(group)
        raise CommError(
            f"ranks {_short(ranks)} could not agree on a process group for compressed gradients (rank "
            f"{dist.get_rank()}, limit comm.timeout_s = {timeout_s:g}): {error}",
            "attach() is a collective call: all ranks of the model's group make it, in the same order",
        ) from error


def _device(group: dist.ProcessGroup | None) -> torch.device:
    """Where the group's backend takes tensors."""
    if str(dist.get_backend(group)) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def open_group(name: str, ranks: Sequence[int], backend: str, timeout_s: float) -> tuple[dist.ProcessGroup, Farewells]:
    """A process group of ``ranks``, under ``name``; a collective call of these ranks alone.

    Args:
        name: the same on every rank, and never used before.
        ranks: of the default group, ascending; the calling one is among them.
        backend: torch's name of it.
        timeout_s: limit of each collective, and for all to come.

    Raises:
        CommError: a rank did not come; names those that are missing. Or torch is built differently.
    """
    from torch.distributed import distributed_c10d as c10d

    rank = dist.get_rank()
    try:
        store = c10d._get_default_store()
        make, world = c10d._new_process_group_helper, c10d._world
    except AttributeError as error:
        raise _unknown_torch(error) from error
    farewells = Farewells(store, name, ranks)
    try:
        store.set(farewells.here(rank), "here")
        group, _ = make(
            len(ranks),
            list(ranks).index(rank),
            list(ranks),
            backend,
            store,
            name,  # type: ignore[arg-type]  # a str, up to torch 2.11
            timeout=timedelta(seconds=timeout_s),
        )
        world.pg_group_ranks[group] = {member: place for place, member in enumerate(ranks)}
        if str(dist.get_backend(group)) == "gloo":
            # Gloo connects the pairs of ranks one after another: a rank that is done and closes at once breaks the
            # others.
            dist.barrier(group)
    except TypeError as error:
        raise _unknown_torch(error) from error
    except RuntimeError as error:
        missing = farewells.missing()
        who = f"ranks {_short(missing)} did not come" if missing else "all ranks came, but could not connect"
        raise CommError(
            f"no process group of ranks {_short(ranks)} for compressed gradients on rank {rank}: {who} within "
            f"comm.timeout_s = {timeout_s:g}: {error}",
            "attach() is a collective call: all ranks of the model's group make it, in the same order",
        ) from error
    return group, farewells


class Farewells:
    """What members of a group say when they leave it, kept in the store, where the others find it.

    Args:
        store: the default group's.
        name: of the group.
        ranks: its members.
    """

    def __init__(self, store: Any, name: str, ranks: Sequence[int]) -> None:
        self._store = store
        self._name = name
        self._ranks = ranks

    def here(self, rank: int) -> str:
        """The key under which ``rank`` says that it has come."""
        return f"{self._name}/here/{rank}"

    def leave(self, reason: str) -> None:
        """Say why this rank leaves. Never raises: who leaves because something broke may find the store gone too."""
        key = f"{self._name}/left/{dist.get_rank()}"
        _within(lambda: self._store.set(key, reason[:2000]), None)

    def heard(self) -> dict[int, str]:
        """What others have said, by rank; empty where the store does not answer."""

        def read() -> dict[int, str]:
            keys = {rank: f"{self._name}/left/{rank}" for rank in self._ranks if rank != dist.get_rank()}
            return {
                rank: self._store.get(key).decode(errors="replace")
                for rank, key in keys.items()
                if self._store.check([key])
            }

        return _within(read, {})

    def missing(self) -> list[int]:
        """Ranks that have not come; empty where the store does not answer."""
        return _within(lambda: [rank for rank in self._ranks if not self._store.check([self.here(rank)])], [])


def _within(call: Callable[[], T], otherwise: T) -> T:
    """What ``call`` returns, or ``otherwise`` if the store fails or does not answer for some seconds."""
    found: list[T] = []

    def run() -> None:
        try:
            found.append(call())
        except RuntimeError:
            return  # the store is gone: all that is lost is a word about the error that is told anyway

    thread = threading.Thread(target=run, name="outlast-store", daemon=True)
    thread.start()
    thread.join(_STORE_LIMIT_S)
    return found[0] if found else otherwise


def _short(ranks: Sequence[int]) -> str:
    """``0, 1, 2``; of many, the first and the last."""
    if len(ranks) > 16:
        return f"{', '.join(map(str, ranks[:8]))}, ..., {ranks[-1]} ({len(ranks)} in all)"
    return ", ".join(map(str, ranks))


def _unknown_torch(error: Exception) -> CommError:
    return CommError(
        f"torch {torch.__version__}: process groups are not built as outlast knows them ({error})",
        "use a torch that outlast is tested with, 2.11 or 2.13",
    )
