"""Settings of diagnostics: section ``[diagnostics]``."""

from __future__ import annotations

from dataclasses import dataclass

from outlast.config import require


@dataclass(frozen=True, kw_only=True)
class DiagnosticsConfig:
    """How much is recorded, and when a rank counts as a straggler.

    The lateness of a rank in a step is the longest time any rank spent inside collectives minus the time this rank
    spent there: the rank that arrives last waits least. A straggler meets all of the conditions below.
    """

    ring_capacity: int = 4096
    """Collectives kept in a rank's shared-memory ring, 128 bytes each. The oldest are overwritten."""

    straggler_min_s: float = 0.010
    """A straggler is later than its median peer by at least this many seconds, in the median step."""

    straggler_share: float = 0.05
    """... and by at least this share of the median step's duration."""

    straggler_latest_share: float = 0.7
    """... and is the latest rank, or within its own noise of the latest, in at least this share of the steps."""

    straggler_noise: float = 1.0
    """... and by at least this many times its noise, the standard deviation of its lateness from step to step
    (1.4826 x the median absolute deviation). A rank that is early as often as late is no straggler."""

    straggler_always_share: float = 0.9
    """A rank that is the latest in at least this share of the steps, not counting its noise, needs to meet neither the
    condition above nor that below: a rank that is slow for a part of the run has a large spread."""

    straggler_sigmas: float = 3.0
    """... and its median lateness is this many standard errors above zero. The standard error of a median over n steps
    is estimated as 1.2533 x 1.4826 x MAD / sqrt(n)."""

    straggler_min_steps: int = 10
    """There is no verdict with fewer steps than this, not counting warm-up."""

    straggler_warmup_steps: int = 3
    """Steps ignored at the start of every attempt and after every restart."""

    stall_factor: float = 3.0
    """A step that takes this many median steps has stalled. Stalls that heal are incidents of the report."""

    stall_min_s: float = 1.0
    """... if it also takes this many seconds more than the median step."""

    def __post_init__(self) -> None:
        require(
            16 <= self.ring_capacity <= 2**20,
            "diagnostics.ring_capacity",
            self.ring_capacity,
            "16 to 1048576 collectives",
        )
        require(self.stall_factor > 1, "diagnostics.stall_factor", self.stall_factor, "more than 1 median step")
        require(self.stall_min_s > 0, "diagnostics.stall_min_s", self.stall_min_s, "more than 0 seconds")
        require(self.straggler_min_s > 0, "diagnostics.straggler_min_s", self.straggler_min_s, "more than 0 seconds")
        require(0 < self.straggler_share < 1, "diagnostics.straggler_share", self.straggler_share, "between 0 and 1")
        require(
            0.5 <= self.straggler_latest_share <= 1,
            "diagnostics.straggler_latest_share",
            self.straggler_latest_share,
            "0.5 to 1",
        )
        require(
            self.straggler_latest_share <= self.straggler_always_share <= 1,
            "diagnostics.straggler_always_share",
            self.straggler_always_share,
            f"straggler_latest_share = {self.straggler_latest_share:g} to 1",
        )
        require(self.straggler_noise >= 0, "diagnostics.straggler_noise", self.straggler_noise, "at least 0")
        require(self.straggler_sigmas > 0, "diagnostics.straggler_sigmas", self.straggler_sigmas, "more than 0")
        require(
            self.straggler_min_steps >= 3, "diagnostics.straggler_min_steps", self.straggler_min_steps, "at least 3"
        )
        require(
            self.straggler_warmup_steps >= 0,
            "diagnostics.straggler_warmup_steps",
            self.straggler_warmup_steps,
            "at least 0",
        )
