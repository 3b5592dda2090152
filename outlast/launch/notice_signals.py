"""Signals that tell a job to end, and the time within which the process that gets one ends, whatever it is stuck in."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Self

from outlast.launch.failures import RESUME_STATUS

NOTICES = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
SAME_S = 1.0
"""Signals that follow the first within this time are the same notice: schedulers send it by more than one way."""


class NoticeSignals:
    """Handles :data:`NOTICES` while its ``with`` block lasts; to be entered in the main thread.

    The first signal is a notice. Who obeys it has ``grace_s``; after that, or at a second signal, the process ends. A
    thread watches this, because Python runs handlers of signals only between two steps of the main thread's code: one
    that is inside a library's call would never see them.

    Args:
        grace_s: from the first signal to the end.
        bound_s: from the end of the grace, or the second signal, until ``last_resort``.
        obeyed: called with the first signal, by the handler or the thread, possibly by both; False ends at once. It
            must take no lock.
        end: called by the handler, in the main thread, when the process shall end; it may raise.
        last_resort: called by the thread when ``end`` was due for ``bound_s``; it must end the process.
        but: of these signals another handler takes care.
    """

    def __init__(
        self,
        grace_s: float,
        bound_s: float,
        *,
        obeyed: Callable[[signal.Signals], bool],
        end: Callable[[signal.Signals], None],
        last_resort: Callable[[signal.Signals], None],
        but: tuple[signal.Signals, ...] = (),
    ) -> None:
        self.first: signal.Signals | None = None
        """The notice, if there was one."""
        self.grace_is_over = False
        """Whether nobody obeyed in time; False also if a second signal came before."""
        self._grace_s = grace_s
        self._bound_s = bound_s
        self._obeyed = obeyed
        self._end = end
        self._last_resort = last_resort
        self._signals = tuple(one for one in NOTICES if one not in but)
        self._over = False
        self._ending = False
        self._before: dict[signal.Signals, object] = {}
        self._reader, self._writer = socket.socketpair()
        self._thread = threading.Thread(target=self._watch, name="outlast-notice", daemon=True)

    def __enter__(self) -> Self:
        for one in (self._reader, self._writer):
            one.setblocking(False)
        self._fd_before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        if self._fd_before != -1:  # an event loop's; then the handlers alone have to do
            signal.set_wakeup_fd(self._fd_before, warn_on_full_buffer=False)
        self.install()
        restore_in_children(self._handle, self._writer.fileno())
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for one, handler in self._before.items():
            if handler is not None:
                signal.signal(one, handler)  # type: ignore[arg-type]
        if self._fd_before == -1:
            signal.set_wakeup_fd(-1)
        _OURS.pop(self._handle, None)
        self._writer.close()  # ends the thread
        self._thread.join(5.0)  # at once, if it can run
        self._reader.close()

    def install(self) -> None:
        """Set the handlers; again, where something else has replaced them."""
        for one in self._signals:
            found = signal.signal(one, self._handle)
            self._before.setdefault(one, found)

    def learn(self, signum: signal.Signals) -> None:
        """As if the signal had come: the notice came another way, e.g. to another node."""
        if self.first is None:
            signal.pthread_kill(threading.main_thread().ident or 0, signum)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self._ending:
            return
        if self.first is None:
            self.first = signal.Signals(signum)
            if self._fd_before != -1:
                self._wake(signum)
            if self._obeyed(self.first):
                return
        elif not self._over:
            if self._fd_before != -1:
                self._wake(signum)
            return
        self._ending = True
        self._end(self.first)

    def _wake(self, signum: int) -> None:
        with contextlib.suppress(OSError):
            self._writer.send(bytes([signum]))

    def _watch(self) -> None:
        began_s: float | None = None
        grace_until_s: float | None = None
        end_until_s: float | None = None
        while True:
            now_s = time.monotonic()
            due_s = end_until_s if end_until_s is not None else grace_until_s
            if due_s is not None and now_s >= due_s:
                assert self.first is not None
                if end_until_s is not None:
                    self._last_resort(self.first)
                    return
                self.grace_is_over = True
                end_until_s = now_s + self._bound_s
                self._order_end()
                continue
            ready, _, _ = select.select([self._reader], [], [], None if due_s is None else due_s - now_s)
            if not ready:
                continue
            numbers = self._reader.recv(64)
            if not numbers:
                return
            came = [signal.Signals(number) for number in numbers if number in self._signals]
            now_s = time.monotonic()
            if not came:
                continue
            if began_s is None:
                began_s = now_s
                self.first = self.first or came[0]
                if self._obeyed(self.first):
                    grace_until_s = now_s + self._grace_s
                else:
                    end_until_s = now_s + self._bound_s
                    self._order_end()
            elif end_until_s is None and now_s - began_s > SAME_S:
                end_until_s = now_s + self._bound_s
                self._order_end()

    def _order_end(self) -> None:
        """Have the main thread's handler call ``end``, and wake it if it sleeps."""
        self._over = True
        assert self.first is not None
        signal.pthread_kill(threading.main_thread().ident or 0, self.first)


_OURS: dict[Callable[[int, FrameType | None], None], int] = {}
"""Handlers that forked processes do not keep, and the descriptor that each one's thread is woken by, or -1."""
_hook_set = False


def restore_in_children(handler: Callable[[int, FrameType | None], None], wakeup_fd: int = -1) -> None:
    """Have processes that are forked from here end by signals with this handler, as programs started anew do."""
    global _hook_set  # a hook of this kind cannot be removed
    _OURS[handler] = wakeup_fd
    if not _hook_set:
        os.register_at_fork(before=_hold, after_in_parent=_let_go, after_in_child=_restore)
        _hook_set = True


_held = threading.local()


def _hold() -> None:
    """A signal that reaches the new process before its handlers are restored waits until they are."""
    _held.mask = signal.pthread_sigmask(signal.SIG_BLOCK, NOTICES)


def _let_go() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _held.mask)


def _restore() -> None:
    for one in NOTICES:
        if signal.getsignal(one) in _OURS:
            signal.signal(one, signal.SIG_DFL)
    found = signal.set_wakeup_fd(-1)
    if found != -1 and found not in _OURS.values():
        signal.set_wakeup_fd(found)
    _OURS.clear()
    _let_go()


@contextlib.contextmanager
def early_notices() -> Iterator[None]:
    """Before there is anybody to pass a notice on to: it ends this process, with the status that says so.

    Raises:
        SystemExit: a notice came; nothing is lost.
    """

    def end(signum: int, frame: FrameType | None) -> None:
        print(f"outlast: {signal.Signals(signum).name} came before the ranks were started", file=sys.stderr, flush=True)
        raise SystemExit(RESUME_STATUS)

    before = {one: signal.signal(one, end) for one in NOTICES}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler if handler is not None else signal.SIG_DFL)
