"""Runs a command that the kernel kills when its launcher dies: ``parent_death.py LAUNCHER_PID IGNORED COMMAND…``.

IGNORED lists the numbers of signals, with commas, that the command shall ignore until it sets handlers; ``-`` is none.

A launcher that dies of SIGKILL cannot end its ranks. They would keep devices and ports, and write checkpoints beside
those of the next attempt. ``prctl(PR_SET_PDEATHSIG)`` survives ``execve``, so it is set here before the process becomes
the command. Nothing of outlast is imported, so that this takes about 20 ms.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
NO_RESTART_STATUS = 93
"""As in ``failures.py``: what cannot be run now cannot be run after a restart."""


def main(arguments: list[str]) -> None:
    launcher, ignored, *command = arguments
    for number in ignored.split(",") if ignored != "-" else ():
        signal.signal(int(number), signal.SIG_IGN)
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        sys.exit(f"outlast: prctl(PR_SET_PDEATHSIG) failed: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != int(launcher):
        sys.exit(f"outlast: launcher {launcher} died before its rank started")  # before the signal was set
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"outlast: {command[0]} cannot be run: {error.strerror}", file=sys.stderr, flush=True)
        sys.exit(NO_RESTART_STATUS)


if __name__ == "__main__":
    main(sys.argv[1:])
