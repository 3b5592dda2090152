"""A rank that does nothing but beat, meet its peers in an all-reduce, and misbehave as told.

``rank.py RUN_DIR STEPS [--rank R --at STEP --do kill|stop|spin|torn|exit:N|raise|wait:S|skip] [--once] [--all]
[--notice]``

``--do skip`` leaves out the step's all-reduce. With ``--all``, all ranks misbehave; with ``--once``, only in generation
0. With ``--notice`` it ends after a step when told to, and its children do not inherit how it takes signals. Every rank
appends ``generation rank step`` to ``RUN_DIR/steps``.
"""

from __future__ import annotations

import argparse
import faulthandler
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from outlast.diagnostics import (
    Heartbeat,
    Recorder,
)
from outlast.diagnostics.live import (
    heartbeat_path,
    ring_path,
    shm_directory,
)
from outlast.launch import Notice, find_place


def misbehave(how: str) -> None:
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif how == "spin":
        while True:
            time.sleep(3600)
    elif how.startswith("wait:"):
        time.sleep(float(how.removeprefix("wait:")))
    elif how.startswith("exit:"):
        print(f"leaving with {how}", file=sys.stderr, flush=True)
        os._exit(int(how.removeprefix("exit:")))
    elif how == "torn":
        Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text('{"message": {"mess')
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "raise":
        raise ValueError("the rank was told to raise this")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("steps", type=int)
    parser.add_argument("--rank", type=int, default=-1)
    parser.add_argument("--at", type=int, default=0)
    parser.add_argument("--do", default="")
    parser.add_argument("--once", action="store_true")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--notice", action="store_true")
    parser.add_argument("--step-s", type=float, default=0.05)
    told = parser.parse_args()
    place = find_place()
    everybody = range(place.world_size) if told.all else ()
    faulthandler.register(signal.SIGUSR1)
    shm = shm_directory(told.run_dir)
    heartbeat = Heartbeat(heartbeat_path(shm, place.rank), rank=place.rank)
    recorder = Recorder(ring_path(shm, place.rank), rank=place.rank, capacity=64)
    os.environ.update(place.environ())
    dist.init_process_group("gloo")
    notice = Notice() if told.notice else None
    if notice is not None:
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
        child.start()
        child.terminate()
        child.join(60)
        assert child.exitcode == -signal.SIGTERM
    with (told.run_dir / "steps").open("a") as record:
        for step in range(1, told.steps + 1):
            heartbeat.beat("step", step)
            recorder.step = step
            record.write(f"{place.generation} {place.rank} {step}\n")
            record.flush()
            time.sleep(told.step_s)
            odd = step == told.at and place.rank in (told.rank, *everybody) and not (told.once and place.generation)
            if odd:
                misbehave(told.do)
            if odd and told.do == "skip":
                recorder.enter("recv", 16, "what comes after the all-reduce")
                dist.recv(torch.ones(4), src=1 - place.rank)
            ones = torch.ones(4)
            token = recorder.enter("all_reduce", ones.nbytes, "ones")
            dist.all_reduce(ones)
            recorder.complete(token)
            assert ones.tolist() == [place.world_size] * 4
            if notice is not None and notice.came():
                print(f"rank {place.rank} was told to end: {notice.name}", flush=True)
                sys.exit(notice.status)
    heartbeat.beat("finish", told.steps)
    dist.destroy_process_group()
    print(f"rank {place.rank} of {place.world_size} done in generation {place.generation} ({place.source})")


if __name__ == "__main__":
    main()
