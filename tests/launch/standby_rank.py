"""A rank without torch that writes what it finds around itself, as each start sees it: ``standby_rank.py FOLDER ARG…``.

It waits for ``FOLDER/end``, and then ends well.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path


def own(number: str) -> str:
    """What a descriptor leads to, without what differs in each start."""
    try:
        return os.readlink(f"/proc/self/fd/{number}").split("[")[0].split(":")[0].rpartition("/")[2]
    except OSError:
        return ""


def found() -> dict[str, object]:
    """All that a program can see of how it was started."""
    limits = {name: resource.getrlimit(getattr(resource, name)) for name in dir(resource) if name.startswith("RLIMIT_")}
    streams = (sys.stdout, sys.stderr)
    changing = ("MASTER_PORT", "TORCHELASTIC_RESTART_COUNT", "OUTLAST_GENERATION", "TORCHELASTIC_ERROR_FILE")
    return {
        "environ": {key: value for key, value in os.environ.items() if not key.startswith(("OUTLAST_", *changing))},
        "names": sorted(os.environ),
        "argv": sys.argv,
        "orig_argv": sys.orig_argv,
        "path": sys.path,
        "flags": str(sys.flags),
        "folder": os.getcwd(),
        "main": [__name__, __file__, sys.modules["__main__"] is sys.modules[__name__]],
        "meta_path": [str(getattr(one, "__name__", type(one).__name__)) for one in sys.meta_path],
        "streams": [(one.encoding, one.errors, one.line_buffering, one.write_through) for one in streams],
        "environ_class": type(os.environ).__name__,
        "signals": {one.name: str(signal.getsignal(one)).split(" at ")[0] for one in signal.Signals},
        "blocked": [one.name for one in signal.pthread_sigmask(signal.SIG_BLOCK, [])],
        "limits": limits,
        "cores": sorted(os.sched_getaffinity(0)),
        "policy": [os.sched_getscheduler(0), os.nice(0), os.umask(0o022)],
        "cgroup": Path("/proc/self/cgroup").read_text(),
        "name": Path("/proc/self/comm").read_text(),
        "session": os.getsid(0) == os.getpid() == os.getpgid(0),
        "parent": os.getppid(),
        "descriptors": sorted(own(number) for number in os.listdir("/proc/self/fd")),
    }


def main() -> None:
    """Write it, and wait."""
    folder = Path(sys.argv[1])
    rank, generation = os.environ["RANK"], os.environ["OUTLAST_GENERATION"]
    print(f"rank {rank} of start {generation} speaks", flush=True)
    path = folder / f"{generation}_{rank}.json"
    path.with_suffix(".tmp").write_text(json.dumps({"pid": os.getpid(), "found": found()}))
    path.with_suffix(".tmp").replace(path)
    while not (folder / "end").exists():
        time.sleep(0.02)


if __name__ == "__main__":
    main()
