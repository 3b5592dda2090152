"""A run's directory: whether it may be used, and one numbered folder per attempt.

::

    runs/NAME/
      config.toml             as resolved at the first start
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
from pathlib import Path

from outlast.checkpoint.ownership import Lease
from outlast.config import to_toml
from outlast.errors import RunDirectoryError
from outlast.launch.attempt import Attempt, next_attempt
from outlast.launch.run_lease import is_used, run_lease, take_run
from outlast.trainer.config import Config

_WAYS_OUT = "--run.dir OTHER"


def run_path(config: Config) -> Path:
    """The absolute path of the run's directory."""
    return Path(config.run.dir if config.run.dir is not None else Path("runs") / config.run.name).absolute()


def check_usable(config: Config, *, resuming: bool) -> Path:
    """The run's directory, after checking that it is writable, and unused unless ``resuming``.

    Raises:
        RunDirectoryError: it is in use, or cannot be written.
    """
    run = run_path(config)
    if is_used(run) and not resuming:
        raise RunDirectoryError(
            f"{run} already contains a run",
            "resume it: --resume auto; start elsewhere: --run.dir OTHER; or delete the directory to start over",
        )
    probe = run / f".writable-{os.getpid()}"
    try:
        run.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise RunDirectoryError(
            f"the run directory {run} cannot be written: {error.strerror} ({error.filename})",
            "choose another: --run.dir OTHER",
        ) from error
    return run


def lease_of(config: Config) -> Lease:
    """The lease on the run's directory, not taken yet."""
    return run_lease(run_path(config), _WAYS_OUT, config.checkpoint.lease_s)


def begin_attempt(config: Config, lease: Lease, *, resuming: bool) -> Attempt:
    """Take the run's directory and the next attempt's folder; called on one rank, which broadcasts the number.

    Raises:
        RunDirectoryError: see :func:`check_usable`; or another job trains in it, which is named.
    """
    if run_path(config).is_dir():
        take_run(lease, _WAYS_OUT)  # before anything is changed
    run = check_usable(config, resuming=resuming)
    take_run(lease, _WAYS_OUT)
    attempt = next_attempt(run)
    attempt.make_folders()
    (attempt.path / "config.toml").write_text(to_toml(config), encoding="utf-8")
    if not (run / "config.toml").exists():
        (run / "config.toml").write_text(to_toml(config), encoding="utf-8")
    attempt.link_as_latest()
    return attempt
