"""Runs a command that the kernel kills when its launcher dies: ``python parent_death.py LAUNCHER_PID COMMAND…``.

A launcher that is killed with SIGKILL cannot end its ranks, and ranks that live on would hold devices and ports and
write checkpoints beside the next attempt's. ``prctl(PR_SET_PDEATHSIG)`` outlives ``execve``, so it is set here and the
process then becomes the command. Nothing of outlast is imported: the interpreter is up in some 20 ms.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    launcher, *command = arguments
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        sys.exit(f"outlast: prctl(PR_SET_PDEATHSIG) failed: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != int(launcher):
        sys.exit(f"outlast: launcher {launcher} died before its rank began")  # the signal was for an earlier death
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"outlast: {command[0]} cannot be run: {error.strerror}")


if __name__ == "__main__":
    main(sys.argv[1:])
