"""Whether replicas hold the same: digests of all ranks that should, and which of them is the odd one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from outlast.diagnostics.numerics.events import ReplicasDifferent
from outlast.diagnostics.numerics.peers import Peers

_MOST = 5
_MASK = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Difference:
    """Digests of replicas that are not the same."""

    names: tuple[str, ...]
    """What differs, in the model's order."""
    odd: tuple[int, ...]
    """The ranks that differ from a majority of at least two; empty if there is none."""
    groups: tuple[tuple[int, ...], ...]
    """Ranks that have the same, the largest group first."""


def compare(digests: Mapping[str, int], peers: Peers) -> Difference | None:
    """Compare digests with those of the other replicas; None if all are the same. Collective.

    One number is exchanged; all of them only where those differ.

    Raises:
        CommError: a peer is lost, or does not come.
    """
    names = list(digests)
    rows = peers.gather([_digest_of(digests), len(names)], "digests of replicas")
    if all(row == rows[0] for row in rows):
        return None
    if any(row[1] != rows[0][1] for row in rows):
        # They do not even have as many tensors: what can be compared is how many there are.
        return _difference(("how many tensors there are",), [(row[1],) for row in rows], peers.ranks)
    found = peers.gather(list(digests.values()), "digests of each tensor")
    differ = [place for place in range(len(names)) if len({row[place] for row in found}) > 1]
    if not differ:
        return _difference(("the names of the tensors",), [(row[0],) for row in rows], peers.ranks)
    kept = [tuple(row[place] for place in differ) for row in found]
    return _difference(tuple(names[place] for place in differ), kept, peers.ranks)


def _digest_of(digests: Mapping[str, int]) -> int:
    """Of names and digests: 63 bits."""
    text = "\n".join(f"{name} {digest}" for name, digest in digests.items())
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest()) & _MASK


def _difference(names: tuple[str, ...], rows: Sequence[tuple[int, ...]], ranks: Sequence[int]) -> Difference:
    counts = Counter(rows)
    groups = sorted(
        (tuple(rank for rank, row in zip(ranks, rows, strict=True) if row == each) for each in counts),
        key=lambda group: (-len(group), group),
    )
    has_majority = 2 * len(groups[0]) > len(ranks)
    odd = tuple(sorted(rank for group in groups[1:] for rank in group)) if has_majority else ()
    return Difference(names, odd, tuple(groups))


def difference_event(step: int, found: Difference, equal_at: int | None, checked: str) -> ReplicasDifferent:
    """What a difference is told as.

    Args:
        step: after whose update it was found.
        found: the difference.
        equal_at: the last step at which all were the same; None if none is known.
        checked: what was compared, in words.
    """
    count = sum(map(len, found.groups))
    since = f"since a step after {equal_at}" if equal_at is not None else "at the first comparison"
    what = f"{found.names[0]}" + (f" first, and {len(found.names) - 1} more" if len(found.names) > 1 else "")
    if found.odd:
        who = (
            f"rank{'s' if len(found.odd) > 1 else ''} {_shown(found.odd)} differ{'' if len(found.odd) > 1 else 's'} "
            f"from the other {count - len(found.odd)} of {count}"
        )
    elif count == 2:
        who = f"ranks {_shown([rank for group in found.groups for rank in group])} differ; of two, none is the odd one"
    else:
        who = f"the {count} ranks are in {len(found.groups)} groups, none of them a majority"
    return ReplicasDifferent(
        step=step,
        ranks=found.odd,
        groups=found.groups,
        parameter=found.names[0],
        count=len(found.names),
        equal_at=equal_at,
        told=f"replicas are not the same, {since}: {who}, in {what} ({checked})",
    )


def _shown(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:_MOST])) + (f" and {len(ranks) - _MOST} more" if len(ranks) > _MOST else "")
