"""A run's directory: whether it may be used, by one job at a time whoever started it, and its attempts.

::

    runs/NAME/
      config.toml             the trainer's, as resolved at the first start
      attempts/0001/          one per start; ``latest`` links to the newest
        config.toml           as resolved at this start
        logs/rank_00000.log
        events/rank_00000.jsonl
      events/agent_HOST.jsonl the launcher's events
      checkpoints/
      report.html
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from outlast.checkpoint.ownership import Lease
from outlast.checkpoint.storage.local import LocalStore
from outlast.errors import PlaceInUse, RunDirectoryError
from outlast.launch.attempt import Attempt, next_attempt

LEASE_S = 60.0
"""After so long without a renewal another job may take the directory of a job whose machine is gone."""


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """A run's directory, and what to do for those who are refused it."""

    path: Path
    """Absolute."""
    other: str
    """How another one is chosen, e.g. ``--run-dir OTHER``."""
    if_used: str = ""
    """What to do if a run that is in it is not to be resumed."""
    lease_s: float = LEASE_S
    """See :class:`~outlast.checkpoint.CheckpointConfig`."""

    def check_usable(self, *, resuming: bool) -> None:
        """Check that it is writable, and unused unless ``resuming``; it is made if need be.

        Raises:
            RunDirectoryError: it is used, or cannot be written.
        """
        if is_used(self.path) and not resuming:
            raise RunDirectoryError(f"{self.path} already contains a run", self.if_used)
        probe = self.path / f".writable-{os.getpid()}"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise self._unwritable(error) from error

    def claim(self, stack: ExitStack, *, resuming: bool, settings: str = "") -> Attempt:
        """Take it and the next attempt's folder; to be called on one rank, which tells the others the number.

        Args:
            stack: gives it back.
            resuming: a directory with earlier attempts may be used.
            settings: of this start, as TOML.

        Raises:
            RunDirectoryError: see :meth:`check_usable`; or another job has it, which is named.
        """
        exists = self.path.is_dir()
        if exists:
            self.take(stack)  # before anything is changed
        self.check_usable(resuming=resuming)
        if not exists:
            self.take(stack)
        return self.begin(settings=settings)

    def begin(self, attempt: Attempt | None = None, settings: str = "") -> Attempt:
        """Make the folder of an attempt, by default of the next one, and let ``latest`` lead there; returns it.

        Raises:
            RunDirectoryError: it cannot be written.
        """
        try:
            attempt = attempt or next_attempt(self.path)
            attempt.make_folders()
            if settings:
                (attempt.path / "config.toml").write_text(settings, encoding="utf-8")
                if not (self.path / "config.toml").exists():
                    (self.path / "config.toml").write_text(settings, encoding="utf-8")
            attempt.link_as_latest()
        except OSError as error:
            raise self._unwritable(error) from error
        return attempt

    def take(self, stack: ExitStack) -> None:
        """Take it for this job, until ``stack`` gives it back.

        Raises:
            RunDirectoryError: another job has it, which is named; or it cannot be written.
        """
        what = f"the run directory {self.path}"
        lease = Lease(LocalStore(str(self.path)), self.lease_s, what=what, ways_out=self.other)
        stack.callback(lease.close)
        try:
            lease.take()
        except PlaceInUse as error:
            raise RunDirectoryError(error.what, error.fix) from error
        except OSError as error:
            what = f"the run directory cannot be taken: {error}"
            raise RunDirectoryError(what, f"choose another: {self.other}") from error

    def _unwritable(self, error: OSError) -> RunDirectoryError:
        return RunDirectoryError(
            f"the run directory {self.path} cannot be written: {error.strerror} ({error.filename})",
            f"choose another: {self.other}",
        )


def is_used(run: Path) -> bool:
    """Whether a run was started in this directory."""
    return any((run / name).exists() for name in ("config.toml", "attempts", "checkpoints"))
