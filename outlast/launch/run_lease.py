"""The lease on a run's directory: one job at a time trains in it, whoever started it."""

from __future__ import annotations

from pathlib import Path

from outlast.checkpoint.ownership import Lease
from outlast.checkpoint.storage.local import LocalStore
from outlast.errors import PlaceInUse, RunDirectoryError

LEASE_S = 60.0
"""After so long without a renewal another job may take the directory of a job whose machine is gone."""


def run_lease(run: Path, ways_out: str, lease_s: float = LEASE_S) -> Lease:
    """The lease on a run's directory, not taken yet.

    Args:
        run: the directory.
        ways_out: what to do if another job has it, e.g. ``--run-dir OTHER``.
        lease_s: see :class:`~outlast.checkpoint.CheckpointConfig`.
    """
    return Lease(LocalStore(str(run)), lease_s, what=f"the run directory {run}", ways_out=ways_out)


def take_run(lease: Lease, ways_out: str) -> None:
    """Take it.

    Raises:
        RunDirectoryError: another job has it, which is named; or the directory cannot be written.
    """
    try:
        lease.take()
    except PlaceInUse as error:
        raise RunDirectoryError(error.what, error.fix) from error
    except OSError as error:
        raise RunDirectoryError(f"the run directory cannot be taken: {error}", f"choose another: {ways_out}") from error


def is_used(run: Path) -> bool:
    """Whether a run was started in this directory."""
    return any((run / name).exists() for name in ("config.toml", "attempts", "checkpoints"))
