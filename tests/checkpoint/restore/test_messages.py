"""What ranks tell one another arrives as it was sent, with its sender's rank."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from outlast.checkpoint.format.records import Fault
from outlast.checkpoint.peers.collectives import Agreement
from outlast.checkpoint.restore import messages
from outlast.checkpoint.restore.messages import (
    Ask,
    DamagedCopy,
    Failure,
    FileOnNode,
    Message,
    PartOnNode,
    SealedCommit,
    SealedVote,
    StoredStep,
    all_gather_messages,
)
from outlast.errors import CheckpointError, CorruptCheckpoint, StateMismatch

SAMPLES: list[Message] = [
    Ask("boot:17", 12, "two states", "pass one"),
    Failure("CorruptCheckpoint", 'a "quoted" reason', "do\nthis", "model/w/c.0"),
    StoredStep(7, committed=True),
    PartOnNode("boot:17", "attempt", 3, 1, in_memory=False),
    SealedCommit('{"step":1}\n'),
    SealedVote(2, "größer"),
    FileOnNode("boot:17", "model/w/c.0"),
    DamagedCopy("boot:17", "model/w/c.0", "memory", "truncated"),
]


class _TwoRanks(Agreement):
    """Rank 1 of two; rank 0 sends what it was given."""

    def __init__(self, from_rank_0: str) -> None:
        super().__init__(None, 0, 1)
        self._from_rank_0 = from_rank_0

    def all_gather_text(self, text: str) -> list[str]:
        return [self._from_rank_0, text]


def test_samples_are_of_every_kind() -> None:
    kinds = {kind for kind in Message.__subclasses__() if kind.__module__ == messages.__name__}
    assert {type(sample) for sample in SAMPLES} == kinds


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: type(sample).__name__)
def test_a_message_arrives_as_it_was_sent(sample: Message) -> None:
    sent = json.dumps([asdict(sample), asdict(sample)])
    assert all_gather_messages(_TwoRanks(sent), type(sample), [sample]) == [(0, sample), (0, sample), (1, sample)]
    assert all_gather_messages(_TwoRanks(""), type(sample), []) == []


def test_a_failure_is_of_the_error_that_was_raised() -> None:
    failure = Failure.of(Fault(CorruptCheckpoint, "zarr.json", "truncated"))
    assert (failure.error_type, failure.file, failure.reason) == (CorruptCheckpoint, "zarr.json", "truncated")
    assert str(failure.as_fault()) == "zarr.json: truncated"
    assert type(failure.as_error()) is CorruptCheckpoint
    mismatch = Failure.of(StateMismatch("saved by 2 ranks", "start 2 ranks"))
    assert (mismatch.error_type, mismatch.reason, mismatch.fix) == (StateMismatch, "saved by 2 ranks", "start 2 ranks")
    unreadable = Failure.of(ConnectionError("no answer"))
    assert (unreadable.error_type, unreadable.reason) == (CheckpointError, "ConnectionError: no answer")
