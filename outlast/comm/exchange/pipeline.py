"""Several exchanges under way at once, in two threads, with collectives in one order on every rank.

When a stage of one exchange becomes ready depends on how fast this rank computes, so collectives must not be issued as
they become ready. They are issued in an order that follows from the number of exchanges and stages alone: with a, b, c
the exchanges in the order in which they began, ::

    a1  b1 a2  c1 b2 a3  c2 b3  c3

so that while a's messages are decoded b's are on the wire.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

from outlast.comm.exchange.item import Stage
from outlast.comm.transport.worker import OrderedWorker


class PipelinedExchange:
    """One exchange under way.

    Args:
        stages: what is to be done.
        codec: the thread of the codec's stages.
    """

    def __init__(self, stages: list[Stage], codec: OrderedWorker) -> None:
        self._stages = stages
        self._codec = codec
        self._ready: list[Future[None]] = [Future() for _ in stages]
        """Of each stage: that those before it are done, or the error that keeps it from being run."""
        self.done: Future[None] = Future()
        """Completed when all stages are, or with the error of one."""
        self._reach(0)

    def on_wire(self) -> list[Callable[[], None]]:
        """The communicator's jobs, in order; each waits until it may run."""
        return [self._job(index) for index, stage in enumerate(self._stages) if stage.thread == "wire"]

    def fail(self, error: BaseException) -> None:
        """End with an error; whoever waits for a stage gets it."""
        for future in (*self._ready, self.done):
            if not future.done():
                future.set_exception(error)

    def _job(self, index: int) -> Callable[[], None]:
        def job() -> None:
            self._ready[index].result()
            self._stages[index].work()
            self._reach(index + 1)

        return job

    def _reach(self, index: int) -> None:
        """All stages before ``index`` are done."""
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
        codec: the thread of the codec's stages.
        submit: queues a job of the communicator's thread.
    """

    def __init__(self, codec: OrderedWorker, submit: Callable[[Callable[[], None]], Future[None]]) -> None:
        self._codec = codec
        self._submit = submit
        self._runs: list[tuple[PipelinedExchange, list[Callable[[], None]]]] = []

    def start(self, stages: list[Stage]) -> PipelinedExchange:
        """Begin an exchange; all ranks begin the same ones in the same order."""
        run = PipelinedExchange(stages, self._codec)
        self._runs.append((run, run.on_wire()))
        self._diagonal(len(self._runs) - 1)
        return run

    def flush(self) -> None:
        """No more exchanges come: issue what is left of those that were begun."""
        deepest = max((len(jobs) for _, jobs in self._runs), default=0)
        for number in range(len(self._runs), len(self._runs) + deepest):
            self._diagonal(number)
        self._runs = []

    def _diagonal(self, number: int) -> None:
        for stage in range(number + 1):
            index = number - stage
            if index < len(self._runs) and stage < len(self._runs[index][1]):
                run, jobs = self._runs[index]
                self._submit(jobs[stage]).add_done_callback(run._fail_with)
