"""Who runs: where a process stands among the ranks of its job, and a launcher that keeps ranks running.

:func:`find_place` tells a process its rank under torchrun, srun, mpirun or alone. :func:`launch` starts a command as
ranks on torchelastic's own agent, restarts them after a failure, and finds, kills and restarts ranks that hang.
"""

from outlast.launch.config import LaunchConfig
from outlast.launch.flags import LaunchFlags
from outlast.launch.launcher import dry_run, launch
from outlast.launch.place import Place, find_place
from outlast.launch.spec import LaunchSpec

__all__ = ["LaunchConfig", "LaunchFlags", "LaunchSpec", "Place", "dry_run", "find_place", "launch"]
