"""How long the control plane waits for what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from outlast.config import nearest, require
from outlast.errors import ConfigError, UnknownKey


@dataclass(frozen=True, kw_only=True)
class ControlSettings:
    """The options of ``--rdzv-conf`` for ``--rdzv-backend outlast``, but for the numbers of nodes."""

    least: int = 1
    """Nodes that the job needs at least (``--nnodes``)."""
    most: int = 1
    """Nodes that it has if it can; further ones are spares."""
    join_s: float = 600.0
    """A launcher waits this long for a place, while the job has too few nodes to run."""
    last_call_s: float = 30.0
    """The job waits this long for further nodes once it has enough of them."""
    beat_s: float = 0.5
    """Between two reports of a launcher."""
    silent_s: float = 6.0
    """A node that is silent for this long is lost."""
    redial_s: float = 1.5
    """... and one whose launcher's connection broke, after this long without a new one."""
    start_s: float = 30.0
    """A launcher takes its place in a generation within this time, or is lost."""
    stop_s: float = 60.0
    """A launcher stops its ranks within this time after its generation ended, or is lost."""
    sign_s: float = 1.0
    """Between two signs of life of the one that leads, in the journal's place."""
    lead_s: float = 5.0
    """Another one takes over when these do not come for so long."""
    lead_broken_s: float = 2.5
    """... or for so long, if connections to it break too."""
    cut_off_s: float = 30.0
    """A launcher that reaches neither the one that leads nor the journal for this long stops its ranks."""
    stale_s: float = 60.0
    """What is read in the journal's place may be this old: NFS caches names for up to 60 s."""
    grow_after_s: float = 60.0
    """A job with fewer nodes than it may have takes in further ones once they have been there for this long."""
    evictions_per_hour: int = 4
    """At most so many nodes are excluded in an hour, unless a person says so."""

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if one.name == "evictions_per_hour":
                require(value >= 0, f"--rdzv-conf {one.name}", value, "0 or more")
            elif one.name.endswith("_s"):
                require(0 < value <= 1e6, f"--rdzv-conf {one.name}", value, "more than 0 seconds")
        require(self.silent_s > 2 * self.beat_s, "--rdzv-conf silent_s", self.silent_s, "more than 2 x beat_s")
        require(self.lead_s > 2 * self.sign_s, "--rdzv-conf lead_s", self.lead_s, "more than 2 x sign_s")

    @property
    def fence_s(self) -> float:
        """So long after it was ordered, a generation has ended even if none of its launchers can be asked.

        By then each has read the order, or was cut off from it and has stopped its ranks by itself.
        """
        return max(self.cut_off_s + self.lead_s, self.stale_s) + self.stop_s


OPTIONS = tuple(one.name for one in fields(ControlSettings) if one.name not in ("least", "most"))
ALIASES = {
    "join_timeout": "join_s",
    "timeout": "join_s",
    "last_call_timeout": "last_call_s",
    "keep_alive_interval": "beat_s",
}
"""torchrun's names for the same."""


def settings_from(conf: Mapping[str, object], *, least: int, most: int) -> ControlSettings:
    """The settings in ``--rdzv-conf``.

    Raises:
        ConfigError: an option does not exist, is given twice, or is no number in its range.
    """
    found: dict[str, float] = {}
    for key, value in conf.items():
        name = ALIASES.get(key, key)
        if name not in OPTIONS:
            raise UnknownKey(f"--rdzv-conf: rendezvous outlast has no option {key!r}", nearest(key, OPTIONS))
        if name in found:
            raise ConfigError(f"--rdzv-conf gives {name} twice, once as {key}", "give it once")
        try:
            found[name] = int(str(value)) if name == "evictions_per_hour" else float(str(value))
        except ValueError as error:
            raise ConfigError(f"--rdzv-conf {key}={value!r} is no number", f"e.g. {key}=60") from error
    return ControlSettings(least=least, most=most, **found)  # type: ignore[arg-type]
