"""Ways in which a process ends that has a Checkpointer; run as a script, each in a fork of its own."""

from __future__ import annotations

import json
import os
import resource
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from outlast.checkpoint import CheckpointConfig, Checkpointer, attach, process_exit

URL = ""
torch.set_num_threads(1)  # those of OpenMP do not survive a fork
WEIGHT = torch.ones(100_000)
POOL = ThreadPoolExecutor(1)


def begin(**settings: Any) -> Checkpointer:
    """With step 1 in storage and step 2 on its way."""
    saver = attach(URL, CheckpointConfig(**settings))
    saver.save(1, replicated={"weight": WEIGHT})
    saver.wait_copied()
    saver.save(2, replicated={"weight": WEIGHT})
    return saver


def falls_off() -> None:
    begin()


def leaves_with_0() -> None:
    begin()
    sys.exit(0)


def leaves_with_3() -> None:
    begin()
    sys.exit(3)


def raises() -> None:
    begin()
    raise ValueError("training broke")


def has_a_memory_tier() -> None:
    begin(memory_every_steps=1)


def changes() -> None:
    begin()
    WEIGHT.add_(1)


def fails() -> None:
    saver = begin()
    saver.wait_copied()
    saver._finish()
    small_files()
    saver.save(3, replicated={"weight": WEIGHT})


def fails_and_closes() -> None:
    saver = begin()
    saver.wait_copied()
    saver.close()
    small_files()
    saver = attach(URL, CheckpointConfig(old_steps="keep"))
    saver.restore("auto")
    saver.save(3, replicated={"weight": WEIGHT})
    saver.close()


def fails_in_a_with_that_raises() -> None:
    with begin() as saver:
        saver.wait_copied()
        saver._finish()
        small_files()
        saver.save(3, replicated={"weight": WEIGHT})
        raise ValueError("training broke")


def fails_before_it_succeeds() -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with begin() as saver:
        saver.wait_copied()
        saver._finish()
        small_files()
        saver.save(3, replicated={"weight": WEIGHT})
        saver._finish()
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        saver.save(4, replicated={"weight": WEIGHT})


def small_files() -> None:
    """From here on files end at 64 kB, as if the disk were full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))


def with_leaves_with_0() -> None:
    with begin():
        sys.exit(0)


def with_raises() -> None:
    with begin():
        raise ValueError("training broke")


def with_is_interrupted() -> None:
    with begin():
        raise KeyboardInterrupt


def waits_for_a_rank_that_is_gone() -> None:
    config = CheckpointConfig(exit_wait_s=0.3)
    saver = Checkpointer(URL, config, rank=0, world_size=2, attempt_id="one", on_event=lambda event: None)
    saver.save(2, replicated={"weight": WEIGHT})


def train_on() -> None:
    saver = begin()
    for step in (3, 4):
        while not process_exit.exiting() and not threading.current_thread().daemon:
            time.sleep(0.01)
        saver.wait_copied()
        WEIGHT.add_(1)
        saver.save(step, replicated={"weight": WEIGHT})


def trains_in_a_thread() -> None:
    threading.Thread(target=train_on).start()


def trains_in_a_pool() -> None:
    POOL.submit(train_on)


def trains_in_a_daemon_thread() -> None:
    thread = threading.Thread(target=train_on, daemon=True)
    thread.start()
    thread.join()


def rank_0_destroys_its_group() -> None:
    rank_of_two(0)
    dist.destroy_process_group()


def rank_1_leaves_with_1() -> None:
    rank_of_two(1)
    sys.exit(1)


def rank_of_two(rank: int) -> None:
    global URL
    URL = os.path.join(os.path.dirname(URL), "two")
    dist.init_process_group("gloo", init_method=f"file://{URL}.store", rank=rank, world_size=2)
    begin(memory_every_steps=1)


def reads_and_leaves() -> None:
    read(0)


def reads_and_outlives_it() -> None:
    """It leaves once the other is gone, which waits for nobody."""
    group = read(1)
    try:
        group.barrier().wait()
    except RuntimeError as error:  # the other's end of the connection is closed
        sys.exit("timed out" in str(error).lower())
    sys.exit(4)


def read(rank: int) -> dist.ProcessGroup:
    global URL
    URL = os.path.join(os.path.dirname(URL), "reads")
    limit = timedelta(seconds=45)  # less than exit_wait_s
    dist.init_process_group("gloo", init_method=f"file://{URL}.store", rank=rank, world_size=2, timeout=limit)
    attach(URL, CheckpointConfig(memory_every_steps=1)).restore("auto", into={"weight": WEIGHT})
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def forks() -> None:
    saver = begin(memory_every_steps=1)
    if os.fork() == 0:
        sys.exit(0)
    os.wait()
    saver.wait_copied()
    saver.save(3, replicated={"weight": WEIGHT})


WAYS: dict[str, Callable[[], None]] = {
    name: value
    for name, value in list(globals().items())
    if callable(value) and getattr(value, "__module__", "") == __name__
}

if __name__ == "__main__":
    todo, children = "", dict[str, int]()
    for way in sys.argv[2:]:
        URL = os.path.join(sys.argv[1], way)
        children[way] = os.fork()
        if children[way] == 0:
            todo = way
            os.dup2(os.open(f"{URL}.said", os.O_WRONLY | os.O_CREAT), 2)
            break
    if todo:
        WAYS[todo]()
    else:
        print(json.dumps({way: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for way, pid in children.items()}))
