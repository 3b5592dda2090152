"""Which tensors of a step are which of a running state, and what is not taken because it has no counterpart."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from outlast.checkpoint.format.names import readable
from outlast.checkpoint.state.mismatch_text import mismatch_error
from outlast.checkpoint.state.selection import Selection, path_of, unwrapped
from outlast.errors import StateMismatch


class TensorType(NamedTuple):
    """What a tensor is, but for its elements."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Mismatch:
    """A tensor that a restore did not take, because step and running state differ in it."""

    name: str
    """In the running state, keys joined by ``/``; if that does not have it, as it was saved."""
    saved: TensorType | None
    """As it is in the step; None: the step does not have it, and the running state's was left as it is."""
    running: TensorType | None
    """As it is in the running state; None: the running state does not have it."""

    @property
    def kind(self) -> Literal["missing", "unexpected", "shape", "dtype"]:
        """``missing`` in the step, ``unexpected`` by the running state, or of another shape or dtype."""
        if self.saved is None:
            return "missing"
        if self.running is None:
            return "unexpected"
        return "shape" if self.saved.shape != self.running.shape else "dtype"

    def __str__(self) -> str:
        if self.saved is None:
            return f"{self.name}: in the running state, not in the checkpoint"
        if self.running is None:
            return f"{self.name}: in the checkpoint, not in the running state"
        saved, running = (f"{of.shape} {of.dtype}" for of in (self.saved, self.running))
        return f"{self.name}: {saved} in the checkpoint, {running} in the running state"


Types = Mapping[str, TensorType]
"""By path relative to the step."""


@dataclass(frozen=True)
class Matching:
    """What is taken of a step."""

    taken: Mapping[str, str]
    """By the path of a saved tensor, the path of its counterpart, or its new path."""
    left_out: frozenset[str]
    """Paths of the saved tensors that are not taken."""
    not_taken: tuple[Mismatch, ...]
    """Sorted by name."""


def castable(saved: torch.dtype, running: torch.dtype) -> bool:
    """Whether elements may be converted: real to real floating-point numbers, complex to complex ones."""
    return (saved.is_floating_point and running.is_floating_point) or (saved.is_complex and running.is_complex)


def match_new_names(saved: Types, selection: Selection) -> Matching:
    """The tensors of a step under their new names, without a running state.

    Raises:
        StateMismatch: two get the same name.
        CheckpointError: a new name that cannot be a path.
    """
    if selection.rename is None:
        return Matching({path: path for path in saved}, frozenset(), ())
    renamed = {path: selection.renamed(readable(path)) for path in saved}
    taken = {
        path: path if new == readable(path) else path_of(new, path) for path, new in renamed.items() if new is not None
    }
    _check_distinct(taken)
    return Matching(taken, frozenset(saved.keys() - taken.keys()), ())


def match(saved: Types, running: Types, names: Mapping[str, str], selection: Selection) -> Matching:
    """The tensors of a step and their counterparts in a running state.

    Counterparts have the same name, after ``selection.rename``. Of what is left over, those are counterparts whose
    names differ only in what wrappers of modules put into them, if there is no doubt which is which.

    Args:
        saved: the step's tensors, by path.
        running: the running state's, by path.
        names: of the running state's, by path.
        selection: what may differ.

    Raises:
        StateMismatch: a tensor has no counterpart, or one of another shape or type, where the selection is strict; or
            two have the same one.
    """
    pairs, left_over, dropped = _by_name(saved, names, selection)
    pairs |= _by_unwrapped_name(left_over, [path for path in running if path not in set(pairs.values())], names)
    _check_distinct(pairs)
    mismatches = []
    taken = {}
    for old, new in pairs.items():
        converted = saved[old].dtype == running[new].dtype or (
            selection.cast is True and castable(saved[old].dtype, running[new].dtype)
        )
        if saved[old].shape == running[new].shape and converted:
            taken[old] = new
        else:
            mismatches.append(Mismatch(names[new], saved[old], running[new]))
    matched = set(pairs.values())
    mismatches += [Mismatch(names[path], None, running[path]) for path in running if path not in matched]
    mismatches += [
        Mismatch(readable(path), saved[path], None) for path in saved if path not in pairs and path not in dropped
    ]
    mismatches.sort(key=lambda mismatch: mismatch.name)
    if any(selection.is_strict(mismatch.name) for mismatch in mismatches):
        refused = [mismatch for mismatch in mismatches if selection.is_strict(mismatch.name)]
        have = {readable(path): of for path, of in saved.items()}
        want = {names[path]: of for path, of in running.items()}
        raise mismatch_error(refused, have, want, selection)
    return Matching(taken, frozenset(saved.keys() - taken.keys()), tuple(mismatches))


def _by_name(
    saved: Types, names: Mapping[str, str], selection: Selection
) -> tuple[dict[str, str], dict[str, str], Collection[str]]:
    """Pairs of saved and running paths; saved paths without one, with their new names; those to be left out."""
    by_name = {name: path for path, name in names.items()}
    pairs: dict[str, str] = {}
    left_over: dict[str, str] = {}
    dropped: set[str] = set()
    for path in saved:
        if selection.rename is None and path in names:
            pairs[path] = path  # also where two keys, "5" and 5, have the same name
            continue
        new = selection.renamed(readable(path))
        if new is None:
            dropped.add(path)
        elif new in by_name:
            pairs[path] = by_name[new]
        else:
            left_over[path] = new
    return pairs, left_over, dropped


def _by_unwrapped_name(left_over: Mapping[str, str], free: Iterable[str], names: Mapping[str, str]) -> dict[str, str]:
    ours: defaultdict[str, list[str]] = defaultdict(list)
    theirs: defaultdict[str, list[str]] = defaultdict(list)
    for path, name in left_over.items():
        theirs[unwrapped(name)].append(path)
    for path in free:
        ours[unwrapped(names[path])].append(path)
    return {theirs[name][0]: ours[name][0] for name in theirs if len(theirs[name]) == 1 == len(ours.get(name, ()))}


def _check_distinct(pairs: Mapping[str, str]) -> None:
    first: dict[str, str] = {}
    for old, new in pairs.items():
        if first.setdefault(new, old) != old:
            raise StateMismatch(
                f"{readable(first[new])!r} and {readable(old)!r} of the checkpoint would both become {readable(new)!r}",
                "give them different names in `rename`, or return None for one",
            )
