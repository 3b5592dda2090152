"""A notice: the wish that the job saves a checkpoint now and ends, to be resumed; how ranks learn of it and agree.

It comes as a signal, of a scheduler before it takes the machine away, or of a person. Under ``outlast launch`` the
launcher gets it and writes it into a file that its ranks look at; elsewhere each rank takes the signals itself. One
rank that knows of it is enough: :meth:`Notice.came` gives all ranks the same answer.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import ExitStack
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Self

from outlast.errors import CommError, LaunchError
from outlast.launch.failures import RESUME_STATUS
from outlast.launch.notice_signals import NOTICES, NoticeSignals, restore_in_children

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

NOTICE_FILE = "OUTLAST_NOTICE_FILE"
"""Environment variable with the path of the file in which the launcher writes a notice."""
_END_S = 5.0


class Notice:
    """Whether this job was told to save and to end; one per rank, which asks it after each step.

    Without a launcher of outlast's, it takes SIGTERM, SIGINT, SIGHUP, SIGUSR1 and SIGUSR2 while the ``with`` block
    lasts: the first is the notice; a second one that comes more than a second later, or the end of the grace, ends the
    process with status 128 + signal, whatever it is doing. Processes that it forks do not inherit these handlers.

    Args:
        grace_s: without a launcher of outlast's, seconds from the notice until the process is ended. Under one,
            ``launch.notice_grace_s`` counts.

    Raises:
        LaunchError: it is not made in the main thread, which alone can take signals.
    """

    status = RESUME_STATUS
    """The exit status that says: ended by a notice, nothing is lost, run me again to go on."""

    def __init__(self, grace_s: float = 25.0) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise LaunchError("Notice() was made outside the main thread", "make it in the main thread")
        self._stack = ExitStack()
        self.agreed = False
        """The newest answer of :meth:`came`."""
        self._pending: tuple[Any, torch.Tensor, ProcessGroup | None] | None = None
        self._signals: NoticeSignals | None = None
        path = os.environ.get(NOTICE_FILE)
        self._file = Path(path) if path else None
        if self._file is None:
            self._signals = self._stack.enter_context(
                NoticeSignals(grace_s, _END_S, obeyed=_always, end=_leave, last_resort=_leave)
            )
        else:
            # A scheduler sends these signals to all processes of a job, the launcher among them, which has the ranks of
            # outlast's trainer ignore them from the start. Handlers have the same effect, but are not inherited by
            # programs that this one starts. Where the process has handlers of its own, these stay.
            for one in NOTICES:
                before = signal.getsignal(one)
                if before in (signal.SIG_IGN, signal.default_int_handler) or not _is_caught(one):
                    signal.signal(one, _nothing)
                    self._stack.callback(signal.signal, one, before)
            restore_in_children(_nothing)
            asked_path(self._file).touch(mode=0o600)

    @property
    def name(self) -> str:
        """The notice's signal, e.g. ``SIGTERM``, if this rank knows of one; else empty. Local."""
        if self._file is not None:
            try:
                return self._file.read_text()
            except OSError:
                return ""
        return self._signals.first.name if self._signals is not None and self._signals.first is not None else ""

    def came(self, group: ProcessGroup | None = None, device: torch.device | None = None) -> bool:
        """Whether a notice came to any rank: the same answer on all, and once True always True.

        Collective over the group if there is one: an all-reduce of one number.

        Args:
            group: over all ranks; None takes the default group. Without any, only this process is asked.
            device: where the number is; None takes the CPU.
        """
        self.ask(group, device)
        return self.answer()

    def ask(self, group: ProcessGroup | None = None, device: torch.device | None = None) -> None:
        """Begin :meth:`came`; :meth:`answer` ends it, and what the rank does in between hides the time it takes."""
        import torch
        import torch.distributed as dist

        if self.agreed:
            return
        known = bool(self.name)
        if not dist.is_initialized() or dist.get_world_size(group) == 1:
            self.agreed = known
            return
        box = torch.tensor([int(known)], dtype=torch.int32, device=device)
        self._pending = dist.all_reduce(box, op=dist.ReduceOp.MAX, group=group, async_op=True), box, group

    def answer(self) -> bool:
        """The answer to :meth:`ask`.

        Raises:
            CommError: a peer is lost; after the group's timeout, at the latest.
        """
        if self._pending is not None:
            work, box, group = self._pending
            self._pending = None
            try:
                work.wait()
                self.agreed = bool(box.item())  # with NCCL the collective is over only now
            except RuntimeError as error:
                import torch.distributed as dist

                rank, world_size = dist.get_rank(group), dist.get_world_size(group)
                raise CommError.of_lost_peer("all_reduce of the notice", rank, world_size, error) from error
        return self.agreed

    def close(self) -> None:
        """Listen no longer."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def asked_path(notice_file: Path) -> Path:
    """The file that exists once a rank asks for notices, beside the one in which the launcher writes them."""
    return notice_file.with_name(f"{notice_file.name}_asked")


def _is_caught(one: signal.Signals) -> bool:
    """Whether there is a handler; also one of C's, such as faulthandler's, which Python does not know of."""
    lines = Path("/proc/self/status").read_text().splitlines()
    caught = next(line.split()[1] for line in lines if line.startswith("SigCgt:"))
    return bool(int(caught, 16) >> (one - 1) & 1)


def _always(signum: signal.Signals) -> bool:
    return True


def _nothing(signum: int, frame: FrameType | None) -> None:
    """The launcher has got this signal as well, or sends what is meant for the ranks another way."""


def _leave(signum: signal.Signals) -> None:
    os.write(sys.stderr.fileno() if sys.stderr is not None else 2, _last_words(signum))
    os._exit(128 + signum)


def _last_words(signum: signal.Signals) -> bytes:
    return f"outlast: process {os.getpid()} ends by {signum.name}: a second signal, or the grace is over\n".encode()
