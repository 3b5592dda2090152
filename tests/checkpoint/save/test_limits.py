"""Threads and memory that run out in a save fail the save, are told once, and leave training and other saves alone."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from outlast.checkpoint.tools import list_steps
from outlast.events import CheckpointFailed, CheckpointSaved, Event
from tests.checkpoint.helpers import checkpointer, failed, of, save_by_ranks
from tests.checkpoint.states import local, state

ROOT = Path(__file__).parents[3]
THREAD, MEMORY = "can't start new thread", "Cannot allocate memory"
EXPECTED: dict[str, tuple[int, list[tuple[int, str, str]]]] = {
    # the status, and of each save its step, its tier and why it failed, if it did
    "no_thread_from_the_first_save_on": (0, [(1, "storage", THREAD), (2, "storage", THREAD), (3, "storage", "")]),
    "no_thread_with_a_memory_tier": (
        0,
        [
            *((1, tier, "") for tier in ("memory", "storage")),
            *((2, tier, THREAD) for tier in ("memory", "storage")),
            *((3, tier, "") for tier in ("memory", "storage")),
        ],
    ),
    "no_memory_for_the_copy": (0, [(1, "storage", MEMORY), (2, "storage", "")]),
    "no_memory_with_a_memory_tier": (
        0,
        [(1, "memory", MEMORY), (1, "storage", MEMORY), (2, "memory", ""), (2, "storage", "")],
    ),
    "no_memory_to_lay_the_state_out": (
        0,
        [(1, "storage", ""), (2, "storage", "this process gets no more memory"), (3, "storage", "")],
    ),
    "the_last_save_has_no_thread": (1, [(1, "storage", ""), (2, "storage", THREAD)]),
}


def test_limits_of_the_system(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.checkpoint.save.limits", str(tmp_path)]
    done = subprocess.run(command, timeout=240, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    assert json.loads(done.stdout) == {way: status for way, (status, _) in EXPECTED.items()}
    for way, (_, wanted) in EXPECTED.items():
        seen = json.loads((tmp_path / f"{way}.json").read_text())
        assert [event[:2] for event in seen] == [list(event[:2]) for event in wanted], way
        for event, (step, tier, why) in zip(seen, wanted, strict=True):
            assert bool(why) == bool(event[2]), (way, event)
            assert why in event[2], (way, event)
            said = (tmp_path / f"{way}.said").read_text()
            where = "" if tier == "storage" else f" in {tier}"
            assert said.count(f"checkpoint of step {step} failed{where}: ") == bool(why), (way, said)
        committed = [info.step for info in list_steps(tmp_path / way) if info.status == "committed"]
        assert committed == [step for step, tier, why in wanted if tier == "storage" and not why]


class Threads:
    """Lets all threads start but those of some numbers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.refused: range = range(0)
        self.asked = 0
        self._start: Any = threading._start_new_thread  # type: ignore[attr-defined]
        monkeypatch.setattr(threading, "_start_new_thread", self)

    def __call__(self, *arguments: Any) -> Any:
        self.asked += 1
        if self.asked in self.refused:
            raise RuntimeError("can't start new thread")
        return self._start(*arguments)


@pytest.mark.parametrize("tiers", ["storage", "all"])
def test_whichever_thread_cannot_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiers: str) -> None:
    settings: dict[str, Any] = {}
    if tiers == "all":
        settings = {"memory_every_steps": 1, "local_every_steps": 1, "local_dir": str(tmp_path / "disk")}
    threads, events, refused = Threads(monkeypatch), list[Event](), 0
    with checkpointer(tmp_path / "place", events, **settings) as saver:
        for first in range(1, 8):
            events.clear()
            step, threads.asked, threads.refused = 2 * first, 0, range(first, first + 1)
            saver.save(step, replicated=state(step), local=local(step))
            saver.wait_copied()
            saver._finish()
            threads.refused = range(0)
            saver.save(step + 1, replicated=state(step + 1), local=local(step + 1))
            saver.wait_copied()
            saver._finish()
            if saver._tiers is not None:
                for tier in saver._tiers._fed:
                    tier.finish()
            assert all("can't start new thread" in reason for reason in failed(events))
            outcomes = [*of(CheckpointSaved, events), *of(CheckpointFailed, events)]
            told = [event.tier for event in outcomes if event.step == step]
            assert len(told) == len(set(told))
            assert "storage" in told
            refused += bool(failed(events))
            assert [event.tier for event in of(CheckpointFailed, events) if event.step == step + 1] == []
    assert refused >= 2


@pytest.mark.parametrize("first", range(1, 9))
def test_a_rank_without_a_thread_releases_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    threads = Threads(monkeypatch)
    threads.refused = range(first, first + 1)
    events = save_by_ranks(tmp_path, 1, world_size=2)
    assert len(failed(events[0])) == len(failed(events[1]))
    committed = [info.step for info in list_steps(tmp_path) if info.status == "committed"]
    assert committed == [event.step for event in of(CheckpointSaved, events[0])]
