"""From when on something is a syndrome."""

from __future__ import annotations

from dataclasses import dataclass, field

from outlast.diagnostics.live.stall import StallRules


def _default_phases() -> StallRules:
    return StallRules(floor_s=5.0, factor=3.0, startup_limit_s=600.0)


@dataclass(frozen=True, kw_only=True)
class Rules:
    """The defaults hold for jobs of 2 to 4,096 ranks with steps of 50 ms to a minute."""

    phases: StallRules = field(default_factory=_default_phases)
    """How long a rank may keep its peers waiting, by what it does. A step has
    ``max(floor_s, factor x the 99th percentile of the steps seen)``."""
    node_silent_s: float = 8.0
    """A node that nothing was heard of for so long, and whose ranks are waited for, is at fault."""
    slow_share: float = 0.10
    """Time that is lost in each step, as a share of the median step, from which on something is slow."""
    slow_least_s: float = 0.010
    """... and at least so many seconds."""
    slow_steps: int = 5
    """Steps that must be slow before anything is said."""
    slow_persistence: float = 0.7
    """Share of the steps since the shift that must be slow; what is so less often comes and goes."""
    slow_noise: float = 5.0
    """A shift is at least this many standard errors of the difference of two medians."""
    recurring_share: float = 0.15
    """What comes and goes, such as garbage collection, counts if it is so in at least this share of the steps."""
    recurring_steps: int = 5
    """... and in at least so many steps."""
    slow_warmup_steps: int = 3
    """Steps of a start that are not judged: they compile, allocate, connect."""
    link_factor: float = 1.5
    """A link is hot if a byte takes this many times as long as over the median link of its kind."""
    explained_share: float = 0.5
    """A fact is the cause if it explains this share of the lost time."""
    covered_share: float = 0.3
    """... or, of what a node's monitor saw, if it held in this share of the time: it is found a sample or two late."""
    shared_share: float = 1 / 3
    """What more than this share of all ranks do at once, on several nodes, is a phase and no fault of theirs."""
