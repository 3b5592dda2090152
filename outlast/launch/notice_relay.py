"""The launcher's side of a notice: it tells its ranks, and ends when they have saved or the grace is over."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from torch.distributed.elastic.multiprocessing.api import SignalException

from outlast.diagnostics.live import shm_directory
from outlast.errors import DiagnosticsError
from outlast.events import CheckpointSaved, RunStarted, StepDone, read_events
from outlast.launch.config import LaunchConfig
from outlast.launch.notice import asked_path
from outlast.launch.notice_signals import NOTICES, NoticeSignals
from outlast.launch.spec import LaunchSpec

_END_S = 10.0
"""Beyond what the ranks get to end, how long the launcher may take to end, before it is ended."""

log = logging.getLogger("outlast.launch")


class NoticeRelay:
    """Takes the launcher's signals while its ``with`` block lasts.

    Args:
        spec: says whether the ranks obey notices, and in which time.
    """

    def __init__(self, spec: LaunchSpec) -> None:
        config: LaunchConfig = spec.effective()
        self.grace_s = config.notice_grace_s
        self.expected = spec.obeys_notice
        """Whether every rank is known to ask for notices, from the start."""
        self.file: Path | None = None
        """Where the ranks look for one."""
        self.kill: Callable[[], None] | None = None
        """Kills this node's ranks; set while there are any."""
        self.loses = False
        """Whether the end of these ranks loses what they did: they have been told, and have begun a step."""
        self._run_dir = spec.run_dir
        self._stack = ExitStack()
        self._signals = NoticeSignals(
            self.grace_s,
            _END_S + (0 if self.expected else 2 * config.stop_grace_s),
            obeyed=self._tell,
            end=_end,
            last_resort=self._leave,
        )

    def __enter__(self) -> Self:
        try:
            folder = shm_directory(self._run_dir)
        except DiagnosticsError:
            if self.expected:
                raise
        else:
            self.file = folder / f"notice_{os.getpid()}"
            self._stack.callback(_remove_folder, folder)
            for path in (self.file, asked_path(self.file)):
                path.unlink(missing_ok=True)  # of an earlier process with this number
                self._stack.callback(path.unlink, missing_ok=True)
        self._stack.enter_context(self._signals)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()

    @property
    def obeyed(self) -> bool:
        """Whether ranks ask for notices: a program's own loop may, or may not."""
        return self.expected or (self.file is not None and asked_path(self.file).exists())

    @property
    def ignored(self) -> str:
        """The signals that a rank ignores until it sets handlers, as ``parent_death.py`` takes them."""
        return ",".join(str(int(one)) for one in NOTICES) if self.expected else "-"

    @property
    def notice(self) -> signal.Signals | None:
        """The signal that came, if one did."""
        return self._signals.first

    @property
    def grace_is_over(self) -> bool:
        """Whether the ranks did not obey in time."""
        return self._signals.grace_is_over

    def install(self) -> None:
        """Take the signals again: torchelastic takes them whenever it starts ranks."""
        self._signals.install()

    def learn(self, signum: signal.Signals) -> None:
        """The notice came another way."""
        self._signals.learn(signum)

    def _tell(self, signum: signal.Signals) -> bool:
        """Tell the ranks. Called by a handler of signals: no locks, no logging."""
        if self.kill is None or self.file is None or not self.obeyed:
            return False
        temporary = f"{self.file}_{signum.name}"
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        os.write(handle, signum.name.encode())
        os.close(handle)
        with suppress(FileNotFoundError):  # the handler and the thread both do this
            os.replace(temporary, self.file)
        return True

    def _leave(self, signum: signal.Signals) -> None:
        """The main thread is stuck, and does not end this launcher."""
        if self.kill is not None:
            self.kill()
        os.write(2, f"outlast: {signum.name}: the launcher does not end by itself, and is ended\n".encode())
        sys.stderr.flush()
        os._exit(128 + signum)


def _end(signum: signal.Signals) -> None:
    raise SignalException(f"the launcher got {signum.name}", sigval=signum)


def _remove_folder(folder: Path) -> None:
    """Unless something else is in it."""
    with suppress(OSError):
        folder.rmdir()


def describe_progress(run_dir: Path) -> str:
    """Which step of a run's newest start is durable, and which was done last, by rank 0's events; one line."""
    path = run_dir / "attempts" / "latest" / "events" / "rank_00000.jsonl"
    durable = done = None
    try:
        for record in read_events(path) if path.exists() else ():
            if record.kind == RunStarted.kind and record["first_step"] > 1:
                durable = record["first_step"] - 1
            elif record.kind == StepDone.kind:
                done = record["step"]
            elif record.kind == CheckpointSaved.kind and record["tier"] == "storage":
                durable = record["step"]
    except (OSError, DiagnosticsError, KeyError) as error:
        return f"what is durable is not known, because {path} cannot be read: {error}"
    saved = "no step of this run is durable" if durable is None else f"the newest durable step is {durable}"
    if done is None:
        return f"{saved}; no step was done since the start"
    lost = done - (durable or 0)
    return f"{saved}, the last one done {done}: {lost} step{'s' if lost != 1 else ''} will be repeated"
