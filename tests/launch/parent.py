"""A rank with processes of its own: a worker in its session, a shell in another, and one that is meant to stay.

``parent.py RUN_DIR HOW``: writes ``name pid`` of each to ``RUN_DIR/pids``, then ends as told: ``kill`` (SIGKILL),
``stay`` (does not), ``exit:N``.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

SLEEP = [sys.executable, "-S", "-c", "import time; time.sleep(300)"]
WIPE = (  # overwrites its environment, as setproctitle does
    "import ctypes, time; "
    "at = [line for line in open('/proc/self/stat')][0].rpartition(')')[2].split(); "
    "ctypes.memset(int(at[47]), 0, int(at[48]) - int(at[47])); time.sleep(300)"
)


def main() -> None:
    run, how = Path(sys.argv[1]), sys.argv[2]
    free = {key: value for key, value in os.environ.items() if key != "OUTLAST_STARTED_BY"}
    started = {
        "worker": subprocess.Popen(SLEEP),
        "shell": subprocess.Popen(["sh", "-c", "sleep 300 & sleep 301"], start_new_session=True),
        "wiped": subprocess.Popen([sys.executable, "-S", "-c", WIPE]),
        "daemon": subprocess.Popen(SLEEP, start_new_session=True, env=free),
    }
    text = "".join(f"{name} {one.pid}\n" for name, one in started.items())
    time.sleep(0.5)
    with (run / "pids").open("a") as file:
        file.write(f"rank {os.getpid()}\n{text}")
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "stay":
        time.sleep(300)
    os._exit(int(how.removeprefix("exit:")))


if __name__ == "__main__":
    main()
