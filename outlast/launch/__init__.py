"""Who runs: where a process stands among the ranks of its job, and a launcher that keeps ranks running.

:func:`find_place` tells a process its rank under torchrun, srun, mpirun or alone. :func:`launch` starts a command as
ranks on torchelastic's own agent, restarts them after a failure, and finds, kills and restarts ranks that hang.
"""

from __future__ import annotations

from outlast.launch.config import LaunchConfig
from outlast.launch.failures import NO_RESTART_STATUS, WATCHED
from outlast.launch.flags import LaunchFlags
from outlast.launch.launcher import dry_run, launch
from outlast.launch.place import ENVIRONMENTS, Environment, Place, find_place
from outlast.launch.ports import check_port, free_port, who_listens
from outlast.launch.spec import LaunchSpec

__all__ = [
    "ENVIRONMENTS",
    "NO_RESTART_STATUS",
    "WATCHED",
    "Environment",
    "LaunchConfig",
    "LaunchFlags",
    "LaunchSpec",
    "Place",
    "check_port",
    "dry_run",
    "find_place",
    "free_port",
    "launch",
    "who_listens",
]
