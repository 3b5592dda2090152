"""What is quoted of a rank that hung or failed."""

from __future__ import annotations

import faulthandler
import subprocess
import sys
from pathlib import Path

import pytest

from outlast.launch.failures import RankFailure, last_output

CODE = """
import faulthandler, threading, time
def innermost(): faulthandler.dump_traceback(all_threads={all_threads})
def called(): innermost()
def outer(depth): called() if depth == 0 else outer(depth - 1)
for _ in range({threads}): threading.Thread(target=time.sleep, args=(5,), daemon=True).start()
print("earlier words", file=__import__("sys").stderr, flush=True)
outer(30)
"""


@pytest.mark.parametrize(("threads", "all_threads"), [(0, True), (3, True), (3, False)])
def test_the_innermost_frames_of_the_main_thread(tmp_path: Path, threads: int, all_threads: bool) -> None:
    log = tmp_path / "rank_00000.log"
    with log.open("w") as file:
        subprocess.run(
            [sys.executable, "-c", CODE.format(threads=threads, all_threads=all_threads)], stderr=file, check=True
        )
    words, found = last_output(None, [log], 0.0)
    assert found == log
    assert [line.rsplit(" in ", 1)[1] for line in words.splitlines()] == ["innermost", "called", "outer"]


def test_other_words_are_the_last_lines(tmp_path: Path) -> None:
    log = tmp_path / "rank_00000.log"
    with log.open("w") as file:
        faulthandler.dump_traceback(file)
        file.write("one\ntwo\nValueError: three\n")
    assert last_output(None, [log], 0.0)[0] == "one\ntwo\nValueError: three"


def test_a_process_that_ended_before_its_wrapper_has_its_own_words() -> None:
    one = RankFailure(rank=0, pid=7, status=-9, message="at x\nLinkError: timed out after 5 s", ended_alone=True)
    assert one.reason == "its process ended: LinkError: timed out after 5 s"
