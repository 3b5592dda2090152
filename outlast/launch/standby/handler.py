"""torchelastic's handle on a rank's process, which may be a standby that was started before."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

from torch.distributed.elastic.multiprocessing import api
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

Take = Callable[[int, tuple[str, ...], dict[str, str], int, int], "subprocess.Popen[bytes] | None"]
"""``(local rank, command, environment, descriptor of stdout, of stderr)``: a process that becomes the rank, or None."""


class StandbyHandler(SubprocessHandler):
    """A SubprocessHandler that asks for a standby before it starts a process.

    The standby is a child of this process, and leads a session, as one that torchelastic starts. So everything that
    uses the process, its id or its status finds what it would have found.
    """

    def __init__(self, take: Take, *args: Any, **kwargs: Any) -> None:
        self._take = take
        super().__init__(*args, **kwargs)

    def _popen(self, args: tuple[str, ...], env: dict[str, str]) -> subprocess.Popen[bytes]:
        stdout = self._stdout.fileno() if self._stdout else 1
        stderr = self._stderr.fileno() if self._stderr else 2
        process = self._take(self.local_rank_id, tuple(args), env, stdout, stderr)
        if process is not None:
            return process
        started: subprocess.Popen[bytes] = super()._popen(args, env)
        return started


@contextlib.contextmanager
def asking(take: Take) -> Iterator[None]:
    """While the block lasts, ranks that torchelastic starts may be standbys."""
    names = vars(api)
    before = names["get_subprocess_handler"]

    def get_handler(*args: Any, **kwargs: Any) -> SubprocessHandler:
        return StandbyHandler(take, *args, **kwargs)

    names["get_subprocess_handler"] = get_handler
    try:
        yield
    finally:
        names["get_subprocess_handler"] = before
