"""The vote of a rank, and the commit record that the coordinator makes of all ranks' votes, in whatever tier."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from outlast.checkpoint.format.names import vote_path
from outlast.checkpoint.format.records import Commit, Fault, FileEntry, Vote, crc_hex, unseal_vote
from outlast.checkpoint.save.replicas import check_replicas
from outlast.checkpoint.save.request import SaveContext, SaveRequest
from outlast.errors import CheckpointError, StateMismatch


@dataclass(frozen=True)
class ReceivedVote:
    """A vote of the save at hand."""

    vote: Vote
    entry: FileEntry
    """Its own file, for the commit record."""


def make_vote(context: SaveContext, request: SaveRequest, files: Iterable[FileEntry]) -> Vote:
    """This rank's vote.

    Args:
        context: whose vote.
        request: for which save.
        files: what the rank wrote.
    """
    return Vote(
        step=request.step,
        rank=context.rank,
        world_size=context.world_size,
        attempt_id=context.attempt_id,
        save_id=request.save_id,
        layout=request.plan.digest,
        files=tuple(sorted(files, key=lambda entry: entry.path)),
        replicas=request.replicas.digests(),
    )


def read_vote(data: bytes, rank: int, context: SaveContext, request: SaveRequest) -> ReceivedVote:
    """A rank's vote from its file's bytes.

    Args:
        data: the sealed vote.
        rank: whose file it is.
        context: the coordinator.
        request: its own, for the same save.

    Raises:
        Fault: the bytes are damaged, or a vote of another save: it does not count, and the right one may still come.
        CheckpointError: a vote of this save that cannot be this rank's.
    """
    file = vote_path(request.step, rank).partition("/")[2]
    vote = unseal_vote(data, file)
    if (vote.attempt_id, vote.save_id) != (context.attempt_id, request.save_id):
        other = f"attempt {vote.attempt_id}, save {vote.save_id}"
        raise Fault(CheckpointError, "", f"a vote of another save ({other}) does not count")
    if (vote.step, vote.rank, vote.world_size) != (request.step, rank, context.world_size):
        raise CheckpointError(
            f"{file} is rank {vote.rank}'s of {vote.world_size} for step {vote.step}, "
            f"expected rank {rank}'s of {context.world_size} for step {request.step}"
        )
    return ReceivedVote(vote, FileEntry(file, len(data), crc_hex(data), False))


def build_commit(votes: Sequence[ReceivedVote], digest: str) -> Commit:
    """The commit record of a save.

    Args:
        votes: of all ranks, by rank.
        digest: of the coordinator's replicated state.

    Raises:
        StateMismatch: a rank has a replicated state of another layout.
        ReplicasDiffer: a rank has other numbers in it.
    """
    for received in votes:
        if received.vote.layout != digest:
            raise StateMismatch(
                f"the replicated state of rank {received.vote.rank} has other names, shapes or types than rank 0's",
                "pass the same keys on all ranks; what differs belongs into local",
            )
    check_replicas(received.vote for received in votes)
    first = votes[0].vote
    return Commit(
        step=first.step,
        world_size=first.world_size,
        attempt_id=first.attempt_id,
        save_id=first.save_id,
        saved_at=time.time(),
        size_bytes=sum(entry.size_bytes for received in votes for entry in received.vote.files),
        votes=tuple(received.entry for received in votes),
    )
