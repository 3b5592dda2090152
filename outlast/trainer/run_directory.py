"""The directory of a run of the trainer's."""

from __future__ import annotations

from pathlib import Path

from outlast.launch.run_directory import RunDirectory
from outlast.trainer.config import Config


def run_directory(config: Config) -> RunDirectory:
    """``run.dir``, or ``runs/NAME``."""
    path = Path(config.run.dir if config.run.dir is not None else Path("runs") / config.run.name).absolute()
    if_used = "resume it: --resume auto; start elsewhere: --run.dir OTHER; or delete the directory to start over"
    return RunDirectory(path, "--run.dir OTHER", if_used, config.checkpoint.lease_s)
