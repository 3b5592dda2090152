"""A notice that one node's launcher got, in the rendezvous store, where those of the other nodes hear of it."""

from __future__ import annotations

import contextlib
import signal

import torch.distributed as dist

from outlast.launch.notice_signals import NOTICES

NOTICE = "outlast/notice"
"""Key, with the start's number behind it: a store may outlive a job, and a notice ends one start."""


class NoticeStore:
    """The notice of one start of a job on several nodes. A store that is lost is not found here, but by torchelastic.

    Args:
        store: of all launchers; it outlives rendezvous rounds.
        generation: of the start.
    """

    def __init__(self, store: dist.Store, generation: int) -> None:  # type: ignore[name-defined]
        self._store = store
        self._key = f"{NOTICE}/{generation}"

    def put(self, notice: signal.Signals) -> None:
        """Tell the other nodes' launchers."""
        with contextlib.suppress(dist.DistError):
            self._store.set(self._key, notice.name)

    def get(self) -> signal.Signals | None:
        """The notice that another node's launcher got, if there is one."""
        with contextlib.suppress(dist.DistError):
            if self._store.check([self._key]):
                name = self._store.get(self._key).decode(errors="replace")
                # Whoever reaches the store's port may write there.
                return next((one for one in NOTICES if one.name == name), None)
        return None
