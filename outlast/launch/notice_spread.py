"""A notice to one launcher reaches those of the other nodes, and is told once."""

from __future__ import annotations

import logging
import signal
from collections.abc import Mapping
from typing import Literal

from outlast.events import EventLog, NoticeCame
from outlast.launch.failures import RESUME_STATUS
from outlast.launch.notice_relay import NoticeRelay
from outlast.launch.notice_store import NoticeStore

log = logging.getLogger("outlast.launch")


class NoticeSpread:
    """Passes notices on between this launcher and those of other nodes.

    Args:
        relay: passes them on to this node's ranks.
        events: where notices are written.
        host: this node's name in events.
    """

    def __init__(self, relay: NoticeRelay, events: EventLog, host: str) -> None:
        self._relay = relay
        self._events = events
        self._host = host
        self._told = False
        self.store: NoticeStore | None = None
        """Of this round; None on a single node."""

    def look(self) -> None:
        """Of a notice, one line and one event; the other nodes' launchers hear of it through the store, and this one of
        theirs."""
        if self._relay.notice is None and self.store is not None and self._relay.obeyed:
            elsewhere = self.store.get()
            if elsewhere is not None:
                log.warning("outlast: another node's launcher got %s", elsewhere.name)
                self._relay.learn(elsewhere)
        notice = self._relay.notice
        if notice is None or self._told:
            return
        self._told = True
        if self.store is not None:
            self.store.put(notice)
        grace_s = self._relay.grace_s
        log.warning(
            "outlast: %s: the ranks have %g s to save a checkpoint and to end; a second signal ends them at once",
            notice.name,
            grace_s,
        )
        self._events.write(NoticeCame(host=self._host, signal=notice.name, grace_s=grace_s))

    def outcome(self, statuses: Mapping[int, int | None]) -> Literal["ending", "saved"] | None:
        """Whether ranks end, or all have ended, because of a notice, and none has failed; None in any other case.

        Args:
            statuses: exit status of every rank; None while it runs.
        """
        if not self._relay.obeyed:
            return None
        found = set(statuses.values())
        if RESUME_STATUS not in found or found - {None, 0, RESUME_STATUS}:
            return None
        if None in found:  # the others follow, within the grace
            self._relay.learn(signal.SIGTERM)
            return "ending"
        return "saved"
