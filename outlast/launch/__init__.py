"""The place of a process among the ranks of its job, and a launcher that keeps ranks running.

:func:`find_place` returns the rank of a process under torchrun, srun, mpirun or alone. :func:`launch` runs a command as
ranks on torchelastic's own agent. It restarts them after a failure, and kills and restarts ranks that hang.
:class:`Notice` says whether the job was told to save and to end.
"""

from outlast.launch.config import LaunchConfig
from outlast.launch.flags import LaunchFlags
from outlast.launch.launcher import launch
from outlast.launch.notice import Notice
from outlast.launch.place import Place, find_place
from outlast.launch.plan import dry_run
from outlast.launch.spec import LaunchSpec

__all__ = ["LaunchConfig", "LaunchFlags", "LaunchSpec", "Notice", "Place", "dry_run", "find_place", "launch"]
