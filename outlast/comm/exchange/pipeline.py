"""Several exchanges under way at once, in two threads, with collectives in one order on every rank.

When a stage becomes ready depends on how fast this rank computes, so collectives must not be issued as they become
ready. Their order follows from the number of exchanges and stages alone: with exchanges a, b, c in the order in which
they began, ::

    a1  b1 a2  c1 b2 a3  c2 b3  c3

so that b's messages are on the wire while a's are decoded.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

from outlast.comm.exchange.item import Stage
from outlast.comm.transport.worker import OrderedWorker, outcome


class PipelinedExchange:
    """One exchange under way.

    Args:
        stages: the work, in order.
        codec: the thread that runs the codec's stages.
        limit_s: how long the codec may get nothing done while a collective waits for it.
    """

    def __init__(self, stages: list[Stage], codec: OrderedWorker, limit_s: float) -> None:
        self._stages = stages
        self._codec = codec
        self._limit_s = limit_s
        self._ready: list[Future[None]] = [Future() for _ in stages]
        """One for each stage, completed once those before it are done, or with the error that keeps it from running."""
        self.done: Future[None] = Future()
        """Completed when all stages are done, or with the first error."""
        self._reach(0)

    def on_wire(self) -> list[Callable[[], None]]:
        """The communicator's jobs, in order; each waits until its stage is ready."""
        return [self._job(index) for index, stage in enumerate(self._stages) if stage.thread == "wire"]

    def fail(self, error: BaseException) -> None:
        """End with an error, which everyone who waits for a stage gets."""
        for future in (*self._ready, self.done):
            if not future.done():
                future.set_exception(error)

    def _job(self, index: int) -> Callable[[], None]:
        def job() -> None:
            outcome(self._ready[index], [self._codec], self._limit_s, "compression of a bucket")
            self._stages[index].work()
            self._reach(index + 1)

        return job

    def _reach(self, index: int) -> None:
        """All stages before ``index`` are done."""
        if self.done.done():
            return  # it was given up meanwhile
        if index == len(self._stages):
            self.done.set_result(None)
            return
        self._ready[index].set_result(None)
        if self._stages[index].thread == "codec":

            def work() -> None:
                self._stages[index].work()
                self._reach(index + 1)

            self._codec.submit(work).add_done_callback(self._fail_with)

    def _fail_with(self, source: Future[None]) -> None:
        error = source.exception()
        if error is not None:
            self.fail(error)


class Pipeline:
    """The order of collectives of one step's exchanges.

    Args:
        codec: the thread that runs the codec's stages.
        submit: queues a job for the communicator's thread.
        limit_s: see :class:`PipelinedExchange`.
    """

    def __init__(
        self, codec: OrderedWorker, submit: Callable[[Callable[[], None]], Future[None]], limit_s: float
    ) -> None:
        self._codec = codec
        self._submit = submit
        self._limit_s = limit_s
        self._exchanges: list[tuple[PipelinedExchange, list[Callable[[], None]]]] = []

    def start(self, stages: list[Stage]) -> PipelinedExchange:
        """Begin an exchange; every rank begins the same ones in the same order."""
        exchange = PipelinedExchange(stages, self._codec, self._limit_s)
        self._exchanges.append((exchange, exchange.on_wire()))
        self._diagonal(len(self._exchanges) - 1)
        return exchange

    def flush(self) -> None:
        """No more exchanges come: issue the remaining collectives of those under way."""
        deepest = max((len(jobs) for _, jobs in self._exchanges), default=0)
        for number in range(len(self._exchanges), len(self._exchanges) + deepest):
            self._diagonal(number)
        self._exchanges = []

    def abort(self, error: BaseException) -> None:
        """Give up the exchanges whose collectives have not all been issued; issues none of them."""
        exchanges, self._exchanges = self._exchanges, []
        for exchange, _ in exchanges:
            exchange.fail(error)

    def _diagonal(self, number: int) -> None:
        for stage in range(number + 1):
            index = number - stage
            if index < len(self._exchanges) and stage < len(self._exchanges[index][1]):
                exchange, jobs = self._exchanges[index]
                self._submit(jobs[stage]).add_done_callback(exchange._fail_with)
