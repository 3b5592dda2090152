"""Settings of the launcher: section ``[launch]``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from outlast.config import require


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """How often ranks are restarted, and when a rank that makes no progress is killed.

    A rank hangs when it has made no progress for ``max(hang_floor_s, hang_factor x median step)`` while its peers wait
    for it. The launcher checks every ``monitor_interval_s``, so with the defaults it finds a hang within
    ``max(10 s, 5 x median step)``. What all ranks do at once is a phase, which may take much longer. Time in which the
    launcher itself did not run (a suspended machine) does not count, and it looks again before it kills.
    """

    max_restarts: int = 3
    """How often this node's ranks are restarted after a failure or a hang before the launcher gives up."""
    backoff_s: float = 1.0
    """Seconds before the restart after a start that got no further than an earlier one, such as one that failed at an
    import; twice as long with each such start in a row. After one that got further there is no wait."""
    longest_backoff_s: float = 60.0
    """... but never longer than this."""
    monitor_interval_s: float = 0.5
    """Seconds between two checks of the ranks."""
    standby: Literal["auto", "on", "off"] = "off"
    """A process per rank that has imported what the program imports from installed packages, waits, and becomes the
    rank at a restart, in place of a new interpreter. ``auto``: for Python programs that are watched, while there is
    memory; ``on``: the same, and an error where it is not possible. Short: --standby, --no-standby."""
    standby_after_s: float = 10.0
    """Seconds after a rank's first steps before its standby is started, which takes at most a quarter of a core."""
    standby_modules: tuple[str, ...] = ()
    """More modules that a standby imports, such as your own, if importing them has no effect that you would miss."""
    node_sample_s: float = 1.0
    """Seconds between two looks at what this node does to its ranks: CPU quotas, other processes, memory, disks.
    Reports name the causes of slow steps from it. A look costs some milliseconds of CPU; 0 takes none."""
    tell_slow: bool = True
    """Tell while the job runs which rank or node is slow, since when and how it is known: one line, and an event
    ``verdict``. It is read from the events of all ranks every ``monitor_interval_s``. Nothing is done about it."""
    watch: bool = True
    """Detect hangs. If false, only the end of a process is noticed. Set it to false for a command that writes no
    heartbeats, because a rank without a first one counts as hung after ``startup_limit_s``."""
    look_every_s: float | Literal["auto"] = "auto"
    """How often the collectives of a program are looked at, which tells how late its ranks are. ``"auto"``: closely in
    every step for the first seconds of a start, then in as many steps as cost a thousandth of the time. A number: every
    so many seconds, in every step, each time for 50 to 200 us. 0: it starts without outlast's runner, and only its end
    is noticed."""
    told_after_s: float = 3.0
    """Seconds, but at least 3 median steps, after which a rank is named that its peers wait for inside a collective: it
    is stopped, or in the middle of a step, or does nothing. Nobody is ended for that."""
    hang_floor_s: float = 8.0
    """A rank may be silent for this many seconds, however short its steps are."""
    hang_factor: float = 4.0
    """... and for this many of its median steps."""
    startup_limit_s: float = 600.0
    """... and for this many seconds in set-up, evaluation, data wait, checkpoint and finish, and until there is a
    median of 3 steps (the first ones may compile). This does not apply to a stopped process."""
    alone_limit_s: float = 60.0
    """Seconds that its peers, inside a collective, wait for a rank that still evaluates or waits for data."""
    together_limit_s: float = 90.0
    """Seconds for which all ranks of this node may be silent in a step, if none is inside a collective: they do the
    same, such as wait for storage. It is also the limit of a hang on a node with one rank, where nobody is seen to
    wait for it; lower it if no step there ever waits so long."""
    recheck_s: float = 0.3
    """Seconds between the look that finds a rank hung and the one before it is killed; a rank that moved is spared."""
    patience: float = 3.0
    """If every rank of this node waits for others, so that none is known to be at fault, wait this many limits. With
    more than one node, wait ``startup_limit_s``: a rank on another node may be in one of those phases."""
    stop_grace_s: float = 10.0
    """Seconds that ranks have between SIGTERM and SIGKILL when the launcher ends them."""
    notice_grace_s: float = 25.0
    """Seconds that ranks have, after a notice (SIGTERM, SIGINT, SIGHUP, SIGUSR1 or SIGUSR2), to save a checkpoint and
    to end. A step and a save must fit in, and it should be less than what the scheduler gives (often 30 s)."""
    exit_barrier_s: float = 30.0
    """With more than one node: how long a node whose ranks have finished waits for the others."""

    def __post_init__(self) -> None:
        require(self.max_restarts >= 0, "launch.max_restarts", self.max_restarts, "0 or more")
        require(self.backoff_s >= 0, "launch.backoff_s", self.backoff_s, "0 or more seconds")
        longest_s = self.longest_backoff_s
        require(longest_s >= self.backoff_s, "launch.longest_backoff_s", longest_s, "launch.backoff_s or more seconds")
        ok = 0.05 <= self.monitor_interval_s <= 60
        require(ok, "launch.monitor_interval_s", self.monitor_interval_s, "0.05 to 60 seconds")
        ok = self.standby_after_s >= 0
        require(ok, "launch.standby_after_s", self.standby_after_s, "0 or more seconds")
        ok = self.node_sample_s == 0 or 0.05 <= self.node_sample_s <= 60
        require(ok, "launch.node_sample_s", self.node_sample_s, "0, or 0.05 to 60 seconds")
        every_s = self.look_every_s
        ok = every_s == 0 or every_s == "auto" or 0.001 <= every_s <= 1
        require(ok, "launch.look_every_s", every_s, '"auto", 0, or 0.001 to 1 seconds')
        ok = 0.5 <= self.told_after_s <= 3600
        require(ok, "launch.told_after_s", self.told_after_s, "0.5 to 3600 seconds")
        require(self.hang_floor_s > 0, "launch.hang_floor_s", self.hang_floor_s, "more than 0 seconds")
        require(self.hang_factor >= 1, "launch.hang_factor", self.hang_factor, "1 or more median steps")
        require(self.startup_limit_s > 0, "launch.startup_limit_s", self.startup_limit_s, "more than 0 seconds")
        require(self.alone_limit_s > 0, "launch.alone_limit_s", self.alone_limit_s, "more than 0 seconds")
        require(self.together_limit_s > 0, "launch.together_limit_s", self.together_limit_s, "more than 0 seconds")
        require(0 <= self.recheck_s <= 10, "launch.recheck_s", self.recheck_s, "0 to 10 seconds")
        require(self.patience >= 1, "launch.patience", self.patience, "1 or more limits")
        require(self.stop_grace_s >= 0, "launch.stop_grace_s", self.stop_grace_s, "0 or more seconds")
        require(self.notice_grace_s > 0, "launch.notice_grace_s", self.notice_grace_s, "more than 0 seconds")
        require(self.exit_barrier_s >= 0, "launch.exit_barrier_s", self.exit_barrier_s, "0 or more seconds")
