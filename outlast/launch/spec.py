"""What is to be launched, and the rendezvous that follows from it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from outlast.config import require
from outlast.launch.config import LaunchConfig
from outlast.launch.flags import LaunchFlags


@dataclass(frozen=True, kw_only=True)
class LaunchSpec:
    """A command to be run as ranks, on this node and maybe on others."""

    command: tuple[str, ...]
    """What each rank runs, e.g. ``(sys.executable, "-m", "outlast.trainer", "run.toml")``. Each is given its place in
    torchrun's variables. A rank that exits with ``NO_RESTART_STATUS`` is not started again."""
    run_dir: Path
    """The run's directory: heartbeats are looked for in its shared memory, events and ranks' output go to ``events/``
    and ``launcher/`` in it. It is made if it does not exist."""
    config: LaunchConfig = field(default_factory=LaunchConfig)
    """Restarts and hang detection."""
    flags: LaunchFlags = field(default_factory=LaunchFlags)
    """How many ranks, and where they meet."""

    def __post_init__(self) -> None:
        require(len(self.command) > 0, "command", self.command, "a command")

    def effective(self) -> LaunchConfig:
        """The settings, with the flags that stand for one of them."""
        config, flags = self.config, self.flags
        if flags.max_restarts is not None:
            config = replace(config, max_restarts=flags.max_restarts)
        if flags.monitor_interval is not None:
            config = replace(config, monitor_interval_s=flags.monitor_interval)
        return config
