"""Where a session's ranks leave what they tell: the run's directory, one attempt a start, events and heartbeats."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from outlast.diagnostics import Recorder
from outlast.diagnostics.live.loop_watch import LoopWatch
from outlast.diagnostics.live.program_watch import ProgramWatch, watched
from outlast.errors import RunDirectoryError
from outlast.events import RunEnded, RunStarted
from outlast.launch import Place
from outlast.launch.attempt import Attempt
from outlast.launch.failures import WATCHED
from outlast.launch.rank_records import RING_CAPACITY, RankRecords
from outlast.launch.run_directory import RunDirectory
from outlast.launch.runner import ATTEMPT, RUN_DIR
from outlast.session.agreement import StepAgreement

_IF_USED = 'resume it: Session(..., resume="auto"); give another directory; or delete it to start over'
_LOG = logging.getLogger("outlast")
_open: set[Path] = set()


def run_path(run: str | os.PathLike[str] | None) -> Path:
    """A run's directory, absolute: the one that is given, the launcher's, or ``runs/NAME`` with the script's name."""
    return Path(run or os.environ.get(RUN_DIR) or Path("runs") / (Path(sys.argv[0]).stem or "session")).absolute()


class RunPlace:
    """A run's directory as one rank of a session has it. Making one is collective over the ranks of ``agreement``.

    Under ``outlast launch`` the launcher has taken the directory, and what watches the program is there already.
    Elsewhere rank 0 takes it, and numbers the attempt.

    Args:
        run: the directory; None takes the launcher's, or ``runs/NAME`` with the script's name. A
            :class:`RunDirectory` is taken as it is, whatever the launcher has chosen.
        place: of this rank.
        agreement: of all ranks.
        resuming: a directory with earlier attempts may be used, as it may after a restart in any case.
        settings: of this start, as TOML, for the attempt's folder.
        loop_tells: the loop that trains logs, enters its collectives in :attr:`recorder`, and calls
            :meth:`Session.ask_notice` in each step; nothing looks at the program.
        ring_capacity: how many collectives the recorder holds.

    Raises:
        RunDirectoryError: the directory is in use, by another job or another session of this process; it holds a run,
            and this one does not resume; it cannot be written; or the launcher has chosen another one.
        DiagnosticsError: shared memory cannot be used.
    """

    def __init__(
        self,
        run: RunDirectory | str | os.PathLike[str] | None,
        place: Place,
        agreement: StepAgreement,
        *,
        resuming: bool,
        settings: str = "",
        loop_tells: bool = False,
        ring_capacity: int = RING_CAPACITY,
    ) -> None:
        given = run if isinstance(run, RunDirectory) else None
        self.path = run.path if isinstance(run, RunDirectory) else run_path(run)
        self.place = place
        self.agreement = agreement
        self.loop_tells = loop_tells
        self.recorder: Recorder | None = None
        """For a loop that tells of its collectives; else None."""
        self._stack = ExitStack()
        launched = os.environ.get(RUN_DIR) if given is None else None
        if self.path in _open:
            raise RunDirectoryError(
                f"this process has a Session on {self.path} already",
                "close it first, or give this one a directory of its own",
            )
        if launched is not None and self.path != Path(launched):
            raise RunDirectoryError(
                f"outlast launch watches this run in {launched}, but Session was given {self.path}",
                f"start it with outlast launch --run-dir {self.path}, or leave the directory out of Session()",
            )
        _open.add(self.path)
        self._stack.callback(_open.discard, self.path)
        try:
            watch = watched() if launched is not None else None
            if watch is not None:
                self.attempt = Attempt(self.path, int(os.environ[ATTEMPT]))
                self.attempt.make_folders()
            else:
                directory = given or RunDirectory(self.path, "Session(OTHER, ...)", _IF_USED)
                self.attempt = self._claim(directory, resuming=resuming or place.generation > 0, settings=settings)
            self._own = watch is None
            self.watch: ProgramWatch | LoopWatch = watch if watch is not None else self._begin_watch(ring_capacity)
        except BaseException:
            self._stack.close()
            raise
        self.events = self.watch.events

    def say(self, line: str) -> None:
        """A line for whoever looks, of rank 0."""
        if self.place.rank == 0 and self.loop_tells:
            _LOG.warning("%s", line)
        elif self.place.rank == 0:
            print(f"outlast: {line}", file=sys.stderr, flush=True)

    def tell_start(self, *, device: str, first_step: int, last_step: int, parameters: int, comm: str) -> None:
        """Write the event of the start; under a launcher this adds what only the program knows."""
        self.events.write(
            RunStarted(
                attempt=self.attempt.number,
                world_size=self.place.world_size,
                device=device,
                first_step=first_step,
                last_step=last_step,
                parameters=parameters,
                comm=comm,
            )
        )

    def tell_end(self, step: int, *, ok: bool, reason: str) -> None:
        """Write the event of the end. Under a launcher the program has not ended yet, and its runner will write it."""
        if not ok and self.recorder is not None:
            step = self.recorder.step  # that it failed in
        if self._own:
            self.events.write(RunEnded(step=step, ok=ok, reason=reason))

    def close(self) -> None:
        """Give the directory back."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _claim(self, directory: RunDirectory, *, resuming: bool, settings: str) -> Attempt:
        """Rank 0 takes the directory, and the next attempt's folder; if it cannot, all ranks raise."""
        refusal: RunDirectoryError | None = None
        number = 0
        if self.place.rank == 0:
            try:
                number = directory.claim(self._stack, resuming=resuming, settings=settings).number
            except RunDirectoryError as error:
                refusal = error
        number = self.agreement.share(number)
        if refusal is not None:
            raise refusal
        if number == 0:
            raise RunDirectoryError(f"rank 0 cannot use the run directory {self.path}", "see the message of rank 0")
        attempt = Attempt(self.path, number)
        attempt.make_folders()
        return attempt

    def _begin_watch(self, ring_capacity: int) -> ProgramWatch | LoopWatch:
        records = RankRecords(self.attempt, self.place.rank, self.place.generation, ring_capacity=ring_capacity)
        self._stack.callback(records.close)
        if WATCHED not in os.environ:
            self._stack.callback(records.remove_shared)
        told = (records.heartbeat, records.recorder, records.events)
        watch: ProgramWatch | LoopWatch = LoopWatch(*told) if self.loop_tells else ProgramWatch(*told)
        if self.loop_tells:
            self.recorder = self.agreement.recorder = records.recorder
        self._stack.callback(watch.close)
        watch.start()
        return watch
