"""Transport: messages become sums, in one order, over one process group, from one thread.

Every sum here is taken in rank order, entry by entry, in the type of the tensor (float32 or float64). So a mean is
bit-identical on every rank, from run to run, and for whatever neighbours a tensor has in its message: how DDP cuts
gradients into buckets never shows in a result.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from outlast.comm.transport.groups import agreed_name, open_group
from outlast.comm.transport.worker import MARGIN_S, OrderedWorker, outcome
from outlast.errors import CommError

T = TypeVar("T")


class CollectiveObserver(Protocol):
    """Notified of every collective of this package, in the communicator's thread, in the same order on every rank."""

    def enter(self, op: str, nbytes: int, label: str) -> int:
        """A collective is about to be issued; ``nbytes`` is what this rank contributes. Returns a token."""
        ...

    def complete(self, token: int) -> None:
        """The collective has completed on this rank. Never called for one that failed."""
        ...


@dataclass(slots=True)
class CollectiveTotals:
    """What a communicator's collectives have moved since the totals were last taken."""

    wire_bytes: int = 0
    """Bytes this rank sent: (n - 1) x its payload for an all-gather; 2 (n - 1) / n x the tensor for a mean."""
    collective_s: float = 0.0
    """Time inside collectives: transfer, and waiting for the last rank to arrive."""
    collectives: int = 0

    def plus(self, other: CollectiveTotals) -> CollectiveTotals:
        """The sum of both."""
        return CollectiveTotals(
            self.wire_bytes + other.wire_bytes,
            self.collective_s + other.collective_s,
            self.collectives + other.collectives,
        )


class Communicator:
    """A process group of its own and one thread that issues its collectives.

    **Making one is a collective call**: every rank of ``group`` makes its communicators in the same order. What other
    process groups a process has made does not matter. Every rank must submit the same jobs in the same order; they run
    one after the other. The collectives are methods to call inside a submitted job, and block until done. They do not
    retain their arguments.

    Failure: gloo raises within moments if a peer has died, and after ``timeout_s`` if it is silent. Either way the job
    ends in a :class:`CommError` that names the collective, the limit, and ranks that have said that they left
    (:meth:`leave`). All jobs behind it end in the same error: the order of collectives is lost, and the communicator
    must be closed.

    Args:
        group: the ranks that take part; None for all.
        ranks: which of them take part, ascending; None for all of the group. Needs ``beside``.
        timeout_s: limit of each collective, in seconds.
        observer: notified of every collective.
        stream: a context in which every job runs (a CUDA stream).
        beside: another communicator, whose thread issues this one's collectives too, so that both together have one
            order on every rank that is in both; close the other one first.

    Raises:
        CommError: no default process group, or a rank did not come within ``timeout_s``.
    """

    def __init__(
        self,
        *,
        group: dist.ProcessGroup | None = None,
        ranks: Sequence[int] | None = None,
        timeout_s: float = 600.0,
        observer: CollectiveObserver | None = None,
        stream: Callable[[], AbstractContextManager[object]] = nullcontext,
        beside: Communicator | None = None,
    ) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise CommError(
                "no process group to exchange gradients in",
                "call torch.distributed.init_process_group() first (for one rank too)",
            )
        self._made: int = 0
        """How many communicators were made beside this one."""
        if ranks is None:
            members = list(range(dist.get_world_size())) if group is None else dist.get_process_group_ranks(group)
            self._name = agreed_name(group, timeout_s)
        else:
            assert beside is not None
            members = list(ranks)
            # All ranks of the other communicator make the same ones beside it, so they count alike.
            beside._made += 1
            self._name = f"{beside._name}.{beside._made}.{members[0]}"
        self._group: dist.ProcessGroup | None
        self._group, self._farewells = open_group(
            self._name, members, dist.get_backend(beside.group if beside else group), timeout_s
        )
        self.rank = dist.get_rank(self._group)
        self.world_size = dist.get_world_size(self._group)
        self.timeout_s = timeout_s
        self.totals = CollectiveTotals()
        self._observer = observer
        self._stream = stream
        self._beside = beside
        self._left = False
        self._worker: OrderedWorker = beside._worker if beside else OrderedWorker("outlast-communicator")

    @property
    def group(self) -> dist.ProcessGroup:
        """The process group; issue nothing on it from elsewhere.

        Raises:
            CommError: after :meth:`close`.
        """
        if self._group is None:
            raise CommError("the communicator was closed")
        return self._group

    def submit(self, job: Callable[[], T]) -> Future[T]:
        """Queue a job; it runs in the communicator's thread, without autograd, after all that were queued before.

        Raises:
            CommError: after :meth:`close`.
        """

        def run() -> T:
            with torch.no_grad(), self._stream():
                return job()

        return self._worker.submit(run)

    def run(self, job: Callable[[], T], what: str) -> T:
        """:meth:`submit`, and wait for the result.

        Args:
            job: may issue any number of collectives.
            what: what it does, for errors.

        Raises:
            CommError: a peer died, the limit of a collective passed, or the thread is stuck.
        """
        return self.wait(self.submit(job), what)

    def wait(self, future: Future[T], what: str, *others: OrderedWorker) -> T:
        """The result of a job or of a chain of them, here and in ``others``; raises what they raised.

        Raises:
            CommError: nothing has moved for longer than the limit of a collective.
        """
        return outcome(future, [self._worker, *others], self.timeout_s + MARGIN_S, what)

    def all_gather(self, payload: Tensor, label: str, out: Tensor | None = None) -> Tensor:
        """All ranks' payloads, in rank order. Call it inside a job.

        Args:
            payload: (nbytes,) uint8, of the same size on every rank; may be reused on return.
            label: names the payload, for the observer and for errors.
            out: (world_size, nbytes) uint8, contiguous; None allocates it.

        Raises:
            CommError: a peer died or the limit passed.
        """
        n = self.world_size
        if out is None:
            out = payload.new_empty((n, payload.numel()))
        if n == 1:
            return out.copy_(payload.view(1, -1))
        rows = list(out.unbind())
        self._issue(
            "all_gather",
            payload.numel(),
            (n - 1) * payload.numel(),
            label,
            payload.device,
            lambda: dist.all_gather(rows, payload, group=self.group, async_op=True),
        )
        return out

    def all_to_all(self, payload: Tensor, sizes: Sequence[int], label: str, out: Tensor | None = None) -> Tensor:
        """Send a piece of the payload to each rank. Call it inside a job.

        Args:
            payload: (sum of sizes,) uint8: rank 0's piece, rank 1's, …; may be reused on return.
            sizes: bytes of each rank's piece, the same list on every rank.
            label: names the payload, for the observer and for errors.
            out: (world_size, sizes[rank]) uint8, contiguous; None allocates it.

        Returns:
            (world_size, sizes[rank]): what each rank sent to this one, in rank order.

        Raises:
            CommError: a peer died or the limit passed.
        """
        n, own = self.world_size, sizes[self.rank]
        if out is None:
            out = payload.new_empty((n, own))
        if n == 1:
            return out.copy_(payload.view(1, -1))
        received = out.view(-1)
        self._issue(
            "all_to_all",
            payload.numel(),
            payload.numel() - own,
            label,
            payload.device,
            lambda: dist.all_to_all_single(received, payload, [own] * n, list(sizes), group=self.group, async_op=True),
        )
        return out

    def mean(self, x: Tensor, label: str) -> Tensor:
        """The mean over ranks of ``x``, summed in rank order. Call it inside a job.

        Each rank sums one n-th of the tensor (all-to-all) and sends it to all (all-gather). That is as many bytes as a
        ring all-reduce, in an order of summation that depends on nothing but the ranks.

        Args:
            x: (numel,), contiguous, float32 or float64, of the same size on every rank; may be reused on return.
            label: names the payload, for the observer and for errors.

        Returns:
            A new tensor (numel,).

        Raises:
            CommError: a peer died or the limit passed.
        """
        n, numel = self.world_size, x.numel()
        if n == 1:
            return x.clone()
        share = -(-numel // n)
        nbytes = share * x.element_size()
        padded = x.new_empty(n * share)
        padded[:numel].copy_(x)
        padded[numel:].zero_()
        parts = torch.empty_like(padded)
        self._issue(
            "all_to_all",
            n * nbytes,
            (n - 1) * nbytes,
            label,
            x.device,
            lambda: dist.all_to_all_single(parts, padded, group=self.group, async_op=True),
        )
        own = mean_in_rank_order(parts.view(n, share))
        rows = list(padded.view(n, share).unbind())
        self._issue(
            "all_gather",
            nbytes,
            (n - 1) * nbytes,
            label,
            x.device,
            lambda: dist.all_gather(rows, own, group=self.group, async_op=True),
        )
        return padded[:numel]

    def take_totals(self) -> CollectiveTotals:
        """The totals since the last call; call it while no job runs."""
        taken, self.totals = self.totals, CollectiveTotals()
        return taken

    def leave(self, error: BaseException) -> None:
        """Give up after ``error``: issue nothing more, and let the peers know why. Returns at once; close it then.

        A peer that waits for this rank gets an error that says so, over gloo within moments.
        """
        if self._left or self._group is None:
            return
        self._left = True
        self._farewells.leave(f"{type(error).__name__}: {error}")
        self._worker.abort(error)
        self._drop()

    def close(self) -> None:
        """Let queued jobs finish, then drop the process group. Not a collective call; closing twice is harmless.

        Raises:
            CommError: a collective did not end within the limit; its thread is left behind.
        """
        limit_s = self.timeout_s + MARGIN_S
        if self._beside is None and not self._worker.close(limit_s):
            raise CommError(f"a collective still runs {limit_s:g} s after close()")
        if self._group is not None:
            error = sys.exception()
            after = "" if error is None else f" after {type(error).__name__}: {error}"
            self._farewells.leave(f"it closed its reducer{after}")
            self._drop()

    def _drop(self) -> None:
        """The group goes with its last reference, and gloo's connections with it: that is how peers learn of it."""
        group, self._group = self._group, None
        if group is not None and dist.is_initialized():
            dist.destroy_process_group(group)

    def _issue(
        self,
        op: str,
        nbytes: int,
        wire_bytes: int,
        label: str,
        device: torch.device,
        start: Callable[[], dist.Work | None],
    ) -> None:
        # What is to be sent may still be computed. The others wait for this rank from here on, not from when it queued.
        settle(device)
        token = self._observer.enter(op, nbytes, label) if self._observer else 0
        started = time.perf_counter()
        try:
            work = start()
            assert work is not None
            work.wait()
            settle(device)  # NCCL's wait() only orders streams; errors and times are true once the stream has passed
        except RuntimeError as error:
            elapsed_s = time.perf_counter() - started
            failed = (
                f"{op} of {label} failed on rank {self.rank} of {self.world_size} after {elapsed_s:.1f} s "
                f"(limit comm.timeout_s = {self.timeout_s:g})"
            )
            said = [f"rank {rank} left the exchange: {reason}" for rank, reason in self._farewells.heard().items()]
            if said:
                raise CommError(
                    f"{failed}: {'; '.join(said)}", "look at that rank's log for what went wrong there"
                ) from error
            raise CommError(
                f"{failed}: {error}",
                "a peer died or does not answer: look at its log; raise comm.timeout_s if it is only slow",
            ) from error
        self._worker.progress += 1
        self.totals.collective_s += time.perf_counter() - started
        self.totals.collectives += 1
        self.totals.wire_bytes += wire_bytes
        if self._observer:
            self._observer.complete(token)


def settle(device: torch.device) -> None:
    """Wait until all that the caller's stream was given is done; on a CPU it is."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def mean_in_rank_order(rows: Tensor) -> Tensor:
    """(n, numel) to a new (numel,): row 0 + row 1 + ..., in exactly that order, then divided by n."""
    total = rows[0].clone()
    for row in rows[1:]:
        total.add_(row)
    return total.div_(rows.shape[0])


def slowest(communicator: Communicator, seconds: float, device: torch.device) -> float:
    """The largest of all ranks' ``seconds``; a collective call."""
    own = torch.tensor([seconds], dtype=torch.float64).view(torch.uint8).to(device)
    figures = communicator.run(lambda: communicator.all_gather(own, "figures").cpu(), "the exchange of figures")
    return float(figures.view(torch.float64).max())
