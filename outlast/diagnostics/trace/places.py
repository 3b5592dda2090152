"""Where things stand in a trace: a process for each node, a thread for each rank, and more where slices overlap."""

from __future__ import annotations

from outlast.diagnostics.trace.trace_file import Place, TraceFile

RUN = Place(1, 1)
"""What concerns no rank alone: a process of its own, before those of the nodes."""
THREADS_PER_RANK = 100
"""Threads of a rank stand together; this is how far the places of two ranks are apart."""


class Places:
    """Gives out processes and threads, and names them in the trace when they are first used.

    Args:
        trace: where they are named.
        name: of the run.
    """

    def __init__(self, trace: TraceFile, name: str) -> None:
        self._trace = trace
        self._nodes: dict[str, int] = {}
        self._threads: dict[tuple[str, int, str, int], Place] = {}
        self._ends: dict[tuple[str, int, str], list[int]] = {}
        trace.process(RUN.pid, f"run {name}")
        trace.thread(RUN, "incidents", 0)

    def node(self, host: str) -> int:
        """The id of a node's process."""
        if host not in self._nodes:
            self._nodes[host] = RUN.pid + 1 + len(self._nodes)
            self._trace.process(self._nodes[host], f"node {host}")
        return self._nodes[host]

    def rank(self, host: str, rank: int) -> Place:
        """The thread of a rank, with its steps."""
        return self._thread(host, rank, "", 0)

    def lane(self, host: str, rank: int, what: str, begin_us: int, end_us: int) -> Place:
        """A thread for a slice that may overlap others of its kind: the first on which there is room at that time."""
        ends = self._ends.setdefault((host, rank, what), [])
        for number, last_us in enumerate(ends):
            if last_us <= begin_us:
                ends[number] = end_us
                return self._thread(host, rank, what, number)
        ends.append(end_us)
        return self._thread(host, rank, what, len(ends) - 1)

    def _thread(self, host: str, rank: int, what: str, number: int) -> Place:
        key = (host, rank, what, number)
        if key not in self._threads:
            # ids are unique in the whole trace: a viewer may take the same one for the same thread
            place = Place(self.node(host), 1000 + len(self._threads))
            shown = f"rank {rank}" + (f" {what}" if what else "") + (f" ({number + 1})" if number else "")
            order = rank * THREADS_PER_RANK + (0 if not what else 1 + min(number, THREADS_PER_RANK - 2))
            self._trace.thread(place, shown, order)
            self._threads[key] = place
        return self._threads[key]
