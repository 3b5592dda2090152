"""What to launch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from outlast.config import require
from outlast.launch.config import LaunchConfig
from outlast.launch.flags import LaunchFlags

if TYPE_CHECKING:
    from outlast.diagnostics.export.config import ExportConfig
    from outlast.diagnostics.page.config import PageConfig


@dataclass(frozen=True, kw_only=True)
class LaunchSpec:
    """A command to run as ranks, on this node and possibly on others."""

    command: tuple[str, ...]
    """What each rank runs, e.g. ``(sys.executable, "-m", "outlast.trainer", "run.toml")``. Its place is in torchrun's
    variables. If a rank exits with ``NO_RESTART_STATUS``, no rank is restarted."""
    run_dir: Path
    """The run's directory, created if it does not exist. It determines the shared memory of heartbeats; events and the
    ranks' output go to ``events/`` and ``launcher/`` in it."""
    config: LaunchConfig = field(default_factory=LaunchConfig)
    """Restarts and hang detection."""
    flags: LaunchFlags = field(default_factory=LaunchFlags)
    """How many ranks, and where they meet."""
    export: ExportConfig | None = None
    """To whom metrics of this node go; None exports none."""
    page: PageConfig | None = None
    """Where the first node's launcher serves the run's page; None serves none."""
    is_program: bool = False
    """Whether the command is somebody's program, so that the launcher, not the trainer, numbers its attempts and takes
    the run's directory."""

    obeys_notice: bool = False
    """Whether the command is known to ask for notices, as the trainer does: its ranks then ignore their signals from
    the start, and have ``notice_grace_s`` to save and to exit with ``Notice.status``. So have those of any command once
    one has made a :class:`~outlast.launch.Notice`. To others it is SIGTERM, and SIGKILL after ``stop_grace_s``."""

    def __post_init__(self) -> None:
        require(len(self.command) > 0, "command", self.command, "a command")

    def effective(self) -> LaunchConfig:
        """The settings, with the flags that override some of them."""
        config, flags = self.config, self.flags
        if flags.max_restarts is not None:
            config = replace(config, max_restarts=flags.max_restarts)
        if flags.monitor_interval is not None:
            config = replace(config, monitor_interval_s=flags.monitor_interval)
        if flags.shutdown_timeout is not None:
            config = replace(config, stop_grace_s=flags.shutdown_timeout)
        return config
