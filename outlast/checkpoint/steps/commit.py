"""Whether a step in a store is committed."""

from __future__ import annotations

from outlast.checkpoint.format.names import COMMIT, step_name, vote_path
from outlast.checkpoint.format.records import Commit, Fault, unseal_commit, unseal_vote
from outlast.checkpoint.storage.base import Store
from outlast.errors import CorruptCheckpoint, IncompleteCheckpoint


def as_fault(error: OSError, file: str) -> Fault:
    """The fault of a file that cannot be read; raises the error again where it says nothing about the file."""
    if isinstance(error, FileNotFoundError):
        return Fault(IncompleteCheckpoint, file, "missing")
    if isinstance(error, (ConnectionError, TimeoutError, PermissionError)):
        raise error
    return Fault(CorruptCheckpoint, file, f"cannot be read: {error}")


def read_commit(store: Store, step: int) -> Commit:
    """The commit record of a step; raises :class:`Fault` for the file, and OSError if the storage cannot be read."""
    try:
        data = store.read(f"{step_name(step)}/{COMMIT}")
    except FileNotFoundError as error:
        raise Fault(IncompleteCheckpoint, COMMIT, "missing: the checkpoint was never completed") from error
    except OSError as error:
        raise as_fault(error, COMMIT) from error
    commit = unseal_commit(data.data)
    if commit.step != step:
        raise Fault(CorruptCheckpoint, COMMIT, f"belongs to step {commit.step}")
    return commit


def has_all_votes(store: Store, step: int) -> bool:
    """Whether a step has the votes of all ranks for one save: then maybe only the commit record is missing."""
    try:
        first = unseal_vote(store.read(vote_path(step, 0)).data, "")
        for rank in range(first.world_size):
            vote = unseal_vote(store.read(vote_path(step, rank)).data, "")
            if (vote.attempt_id, vote.save_id) != (first.attempt_id, first.save_id):
                return False
    except Fault:
        return False
    except OSError as error:
        as_fault(error, "")  # raises what says nothing about the vote
        return False
    return True
