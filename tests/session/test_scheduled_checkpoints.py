"""What the trainer and the session save, and when: to which tier, the last step, and what is told of it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from outlast.checkpoint import CheckpointConfig
from outlast.checkpoint.tools import remove_memory
from outlast.errors import CommError, NotDurable
from outlast.events import EventLog
from outlast.free_port import free_port
from outlast.launch import find_place
from outlast.launch.attempt import Attempt
from outlast.session import process_group
from outlast.session.agreement import StepAgreement
from outlast.session.scheduled_checkpoints import Collected, ScheduledCheckpoints
from tests.forked import context
from tests.helpers import steps_saved


def collect(step: int) -> Collected:
    return Collected({"x": torch.full((4,), float(step))}, {}, frozenset())


class Start:
    """A start of a run of one rank, which saves every third step, and every second one to memory."""

    def __init__(self, run: Path, number: int, **settings: Any) -> None:
        attempt = Attempt(run, number)
        attempt.make_folders()
        self.events = EventLog(attempt.events_path(0), rank=0, generation=0)
        config = CheckpointConfig(every_steps=3, memory_every_steps=2, **settings)
        self.made = ScheduledCheckpoints(
            config,
            attempt,
            find_place({}),
            StepAgreement(0, 1, None),
            device=torch.device("cpu"),
            events=self.events,
        )

    def step(self, step: int, *, last: bool = False, wanted: bool = False) -> None:
        self.made.save_if_due(step, collect, last=last, wanted=wanted)
        self.made.checkpointer.wait_copied()

    def end(self, step: int) -> None:
        self.made.save_last(step, collect)
        self.made.close()
        self.made.check_durable("the test is done")
        self.events.close()


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    """A run's directory, of which nothing stays in memory."""
    yield tmp_path / "run"
    remove_memory(tmp_path / "run" / "checkpoints")


def test_storage_gets_what_is_due_wanted_and_last(run: Path) -> None:
    start = Start(run, 1)
    for step in range(1, 6):
        start.step(step, wanted=step == 5)
    start.end(7)
    assert steps_saved(run) == [3, 5, 7]


def test_a_last_step_that_memory_alone_has_goes_to_storage(run: Path) -> None:
    first = Start(run, 1)
    first.step(3)
    first.step(4)
    first.made.checkpointer.close()  # as where a process is killed before step 4 is saved to storage
    first.events.close()
    assert steps_saved(run) == [3]
    for number in (2, 3):  # the third start finds it in storage
        again = Start(run, number)
        restored = again.made.read("auto", None)
        assert restored is not None
        assert restored.step == 4
        again.end(4)
        assert steps_saved(run) == [3, 4]


def test_what_cannot_be_saved_is_told_in_the_end(run: Path) -> None:
    start = Start(run, 1)
    start.step(3)
    start.made.checkpointer.wait_copied()
    (run / "checkpoints").rename(run / "away")
    (run / "checkpoints").write_text("in the way")
    start.made.save_last(4, collect)
    start.made.close()
    with pytest.raises(NotDurable, match=r"^the test is done, but step 4 is not durable"):
        start.made.check_durable("the test is done")
    start.events.close()
    (run / "checkpoints").unlink()


def stopped_peer(rank: int, port: int, answers: Any) -> None:
    """Rank 1 stops in the middle; rank 0 tells what becomes of its question."""
    limit = timedelta(seconds=2)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", limit, 2, rank)
    agreement = StepAgreement(rank, 2, None)
    assert agreement.all_equal(7)
    assert not agreement.all_equal(rank)
    if rank == 1:
        signal.raise_signal(signal.SIGSTOP)
    try:
        agreement.came()
    except CommError as error:
        answers.put((process_group.limit() == limit, str(error)))


def test_a_question_is_given_up_when_the_process_group_would(tmp_path: Path) -> None:
    answers, port = context().Queue(), free_port()
    ranks = [context().Process(target=stopped_peer, args=(rank, port, answers)) for rank in range(2)]
    for one in ranks:
        one.start()
    try:
        same, said = answers.get(timeout=60)
    finally:
        for one in ranks:
            one.kill()
            one.join()
    assert same
    assert "a notice" in said
