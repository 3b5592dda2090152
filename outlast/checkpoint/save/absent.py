"""Why a save did not get all votes: a rank that wrote nothing never called ``save``; one that did is slow, or gone."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from outlast.checkpoint.format.names import parse_local, parse_pack
from outlast.errors import CheckpointError

_SLOW = "see its events; on slow storage raise checkpoint.commit_timeout_s"


def no_vote(
    step: int, limit_s: float, absent: Sequence[int], refused: Mapping[int, str], written: Collection[str]
) -> CheckpointError:
    """The error of the coordinator.

    Args:
        step: which was saved.
        limit_s: how long it waited, in seconds.
        absent: ranks without a vote.
        refused: by rank, why a vote of it did not count.
        written: files in the step's folder that belong to none of the ranks that have voted.
    """
    shared = any(parse_local(path) is None and parse_pack(path) is None for path in written)
    wrote = {owner for path in written for owner in (parse_local(path), parse_pack(path))}
    # Replicated tensors do not say who wrote them: it may have been any of the absent ranks.
    silent = [] if shared else [rank for rank in absent if rank not in refused and rank not in wrote]
    late = [
        f"rank {rank}" + (f" ({refused[rank]})" if rank in refused else "") for rank in absent if rank not in silent
    ]
    said = [f"from {', '.join(late)}"] if late else []
    if silent:
        names = f"rank {silent[0]}" if len(silent) == 1 else f"ranks {', '.join(map(str, silent))}"
        said.append(f"{names} never called save({step}); every rank must")
    return CheckpointError(
        f"no vote for step {step} within {limit_s:g} s{': ' if not late else ' '}{'; '.join(said)}",
        _SLOW
        if late
        else f"call save({step}, ...) on all ranks, not on rank 0 alone: each writes its share, and votes",
    )


def not_opened(step: int, limit_s: float) -> CheckpointError:
    """The error of another rank, which waited for rank 0 for ``limit_s`` seconds."""
    return CheckpointError(
        f"rank 0 did not open the save of step {step} within {limit_s:g} s: it never called save({step}), which every "
        "rank must, or could not",
        f"call save({step}, ...) on all ranks, in the same order; if rank 0 did, see its events, and on slow storage "
        "raise checkpoint.commit_timeout_s",
    )


def other_count(step: int, own: int, opened: int) -> CheckpointError:
    """The error of a rank that has called ``save`` fewer times than rank 0."""
    return CheckpointError(
        f"the save of step {step} is number {opened} on rank 0 and number {own} here: some save was called on rank 0 "
        "alone",
        "call save() on all ranks, in the same order, and start the run again: until then no save can be committed",
    )
