"""Whether a step in a store is committed."""

from __future__ import annotations

from outlast.checkpoint.format.names import COMMIT, step_name, vote_path
from outlast.checkpoint.format.records import Commit, Fault, unseal_commit, unseal_vote
from outlast.checkpoint.storage.base import Store
from outlast.errors import CorruptCheckpoint, IncompleteCheckpoint


def read_commit(store: Store, step: int) -> Commit:
    """The commit record of a step; raises :class:`Fault` for the file, and OSError if the storage cannot be read."""
    try:
        data = bytes(store.read(f"{step_name(step)}/{COMMIT}"))
    except FileNotFoundError as error:
        raise Fault(IncompleteCheckpoint, COMMIT, "missing: the checkpoint was never completed") from error
    except (ConnectionError, TimeoutError, PermissionError):
        raise  # says nothing about the file
    except OSError as error:
        raise Fault(CorruptCheckpoint, COMMIT, f"cannot be read: {error}") from error
    commit = unseal_commit(data)
    if commit.step != step or len(commit.votes) != commit.world_size:
        raise Fault(
            CorruptCheckpoint,
            COMMIT,
            f"belongs to step {commit.step} and has {len(commit.votes)} votes of {commit.world_size} ranks",
        )
    return commit


def has_all_votes(store: Store, step: int) -> bool:
    """Whether a step has the votes of all ranks for one save: then maybe only the commit record is missing."""
    try:
        first = unseal_vote(bytes(store.read(vote_path(step, 0))), "")
        votes = [unseal_vote(bytes(store.read(vote_path(step, rank))), "") for rank in range(first.world_size)]
    except (Fault, FileNotFoundError):
        return False
    return all((vote.attempt_id, vote.save_id) == (first.attempt_id, first.save_id) for vote in votes)
