"""Who computes, reads or writes is busy, and so is who waits for a process of its own that does."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest

from outlast.launch.activity import INTERVAL_S, Activity

SPIN = "while True: pass"
SLEEP = "import time; time.sleep(1000)"
PROGRAMS = {
    "it computes": (SPIN, True),
    "its child computes": (
        f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SPIN!r}])",
        True,
    ),
    "it writes": (
        "import os, time\nwhile True: os.write(os.open('/dev/null', os.O_WRONLY), bytes(1 << 20)); time.sleep(0.05)",
        True,
    ),
    "it sleeps": (SLEEP, False),
    "it waits for a child that sleeps": (
        f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SLEEP!r}])",
        False,
    ),
}


@contextmanager
def running(code: str) -> Iterator[psutil.Process]:
    """The program, once it does what it does."""
    with subprocess.Popen([sys.executable, "-c", code]) as started:
        process = psutil.Process(started.pid)
        try:
            time.sleep(1.0)
            yield process
        finally:
            for one in [*process.children(recursive=True), process]:
                one.kill()


@pytest.mark.parametrize("what", PROGRAMS)
def test_who_is_busy(what: str) -> None:
    code, busy = PROGRAMS[what]
    activity = Activity()
    with running(code) as process:
        activity.look({0: process.pid}, 100.0)
        time.sleep(1.0)
        activity.look({0: process.pid}, 100.0 + INTERVAL_S)
    assert activity.idle_s(0, 101.0 + INTERVAL_S) == (1.0 if busy else 1.0 + INTERVAL_S)


def test_looks_come_no_closer_than_the_interval() -> None:
    activity = Activity()
    with running(SLEEP) as process:
        activity.look({0: process.pid}, 100.0)
        activity.look({0: process.pid}, 100.0 + INTERVAL_S / 2)
        assert activity.idle_s(0, 104.0) == 4.0
    activity.look({0: process.pid}, 106.0)
    assert activity.idle_s(0, 106.0) == 0.0, "its end is something that it did"
    assert activity.idle_s(1, 106.0) == 0.0, "nobody has looked at this one"
