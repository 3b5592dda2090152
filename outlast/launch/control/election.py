"""When a launcher takes the lead. Pure: time, and what stands in the journal's place, come in."""

from __future__ import annotations

from outlast.launch.control.journal import Journal
from outlast.launch.control.records import Member
from outlast.launch.control.settings import ControlSettings

GONE = b"gone"
"""The sign of one that has stepped back: the next may lead at once."""
_TURN_S = 0.1
"""Between the turns of two nodes, so that not all of them write at once."""
_TURNS = 20


class Election:
    """Watches the signs of the launcher that leads.

    Only changes of the sign count, by this launcher's own clock: nodes' clocks need not agree.

    Args:
        settings: how long it waits for what.
        now_s: by a clock that does not jump; likewise in all methods.
    """

    def __init__(self, settings: ControlSettings, now_s: float) -> None:
        self._settings = settings
        self._sign: bytes | None = None
        self._epoch = 0
        self._changed_s = now_s
        self._looked_s = now_s

    @property
    def changed_s(self) -> float:
        """When the sign was last seen to change."""
        return self._changed_s

    def look(self, sign: bytes | None, epoch: int, now_s: float) -> None:
        """Take the newest sign, and the epoch in the journal."""
        # A launcher that did not look for long was stopped, as the one that leads may have been with it.
        slept = now_s - self._looked_s > self._settings.lead_s
        self._looked_s = now_s
        if sign != self._sign or epoch != self._epoch or slept:
            self._sign, self._epoch, self._changed_s = sign, epoch, now_s

    def may_claim(self, journal: Journal, member: Member, now_s: float, *, broken: bool) -> bool:
        """Whether this launcher may take the lead.

        Args:
            journal: as it stands.
            member: this launcher.
            now_s: see the class.
            broken: whether connections to the one that leads are refused or break.
        """
        if journal.lead is None or self._sign == GONE:
            return True
        limit_s = self._settings.lead_broken_s if broken else self._settings.lead_s
        rank = journal.rank_of(member)
        turn = _TURNS if rank == -1 else min(rank, _TURNS)  # spares last
        return now_s - self._changed_s > limit_s + turn * _TURN_S
