"""Saves under limits of memory and threads that the system enforces; run as a script, each way in a fork of its own."""

from __future__ import annotations

import json
import os
import resource
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from outlast.checkpoint import CheckpointConfig, Checkpointer, attach
from outlast.events import CheckpointFailed, CheckpointSaved, Event

URL = ""
SEEN: list[Event] = []
torch.set_num_threads(1)  # those of OpenMP do not survive a fork
STATE: dict[str, Any] = {"weight": torch.ones(4_000_000)}


@contextmanager
def limit(more_bytes: int, stack_bytes: int = 0) -> Iterator[None]:
    """As after ``ulimit -v``: little more address space than is taken. Threads with a large stack cannot start then."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + more_bytes, resource.RLIM_INFINITY))
    threading.stack_size(stack_bytes)
    try:
        yield
    finally:
        threading.stack_size(0)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def save(saver: Checkpointer, step: int) -> None:
    saver.save(step, replicated=STATE)
    saver.wait_copied()
    saver._finish()


def begin(**settings: Any) -> Checkpointer:
    return attach(URL, CheckpointConfig(commit_timeout_s=10, **settings), on_event=SEEN.append)


def no_thread_from_the_first_save_on() -> None:
    with begin() as saver:
        with limit(20 << 20, 512 << 20):
            save(saver, 1)
            save(saver, 2)
        save(saver, 3)


def no_thread_with_a_memory_tier() -> None:
    with begin(memory_every_steps=1) as saver:
        save(saver, 1)
        with limit(40 << 20, 512 << 20):
            save(saver, 2)
        save(saver, 3)


def no_memory_for_the_copy() -> None:
    with begin() as saver:
        with limit(10 << 20, 1 << 18):
            save(saver, 1)
        save(saver, 2)


def no_memory_with_a_memory_tier() -> None:
    with begin(memory_every_steps=1) as saver:
        with limit(10 << 20, 1 << 18):
            save(saver, 1)
        save(saver, 2)


def no_memory_to_lay_the_state_out() -> None:
    with begin() as saver:
        save(saver, 1)
        STATE["text"] = {str(number): bytes(8 << 20) for number in range(8)}
        with limit(4 << 20):
            save(saver, 2)
        save(saver, 3)


def the_last_save_has_no_thread() -> None:
    with begin() as saver:
        save(saver, 1)
        with limit(20 << 20, 512 << 20):
            save(saver, 2)


WAYS: dict[str, Callable[[], None]] = {
    name: value for name, value in list(globals().items()) if name.startswith(("no_", "the_last"))
}


def told(event: Event) -> list[Any]:
    if isinstance(event, CheckpointSaved):
        return [event.step, event.tier, ""]
    assert isinstance(event, CheckpointFailed)
    return [event.step, event.tier, event.reason]


if __name__ == "__main__":
    todo, children = "", dict[str, int]()
    for way in WAYS:
        URL = os.path.join(sys.argv[1], way)
        children[way] = os.fork()
        if children[way] == 0:
            todo = way
            os.dup2(os.open(f"{URL}.said", os.O_WRONLY | os.O_CREAT), 2)
            break
    if todo:
        try:
            WAYS[todo]()
        finally:
            Path(f"{URL}.json").write_text(json.dumps([told(event) for event in SEEN]))
    else:
        print(json.dumps({way: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for way, pid in children.items()}))
