"""What a restore takes of a step, and under which names and types: the part of its arguments that selects."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from outlast.checkpoint.format.names import NODE, PACKS, decode_key, encode_key, parse_local, readable
from outlast.errors import CheckpointError

Rename = Mapping[str, str] | Callable[[str], str | None] | Literal["unwrapped"]
"""From names as they were saved (keys joined by ``/``) to those of the running state; see :class:`Selection`."""

_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"})
"""What torch.compile, FSDP, activation checkpointing and Lightning put into a module's name, wherever it stands."""
_OUTER_WRAPPERS = _WRAPPERS | {"module"}
"""What stands before a module's name: also DDP's, which elsewhere may be the name of anybody's module."""


@dataclass(frozen=True)
class Selection:
    """Which tensors and values of a step are taken, and as what."""

    parts: frozenset[str] | None = None
    """Top-level keys of the state; None: all."""
    strict: bool | frozenset[str] = True
    """Whether the step and the running state must have the same tensors; a set: below these top-level keys."""
    rename: Rename | None = None
    """A function, which returns None for what is to be left out; or names, and beginnings of names that end at a ``/``
    or ``.``, of which the longest that fits is replaced; or ``unwrapped``: without the names of wrappers."""
    cast: bool | torch.dtype = False
    """Whether floating-point tensors are converted to the running ones' type; a type: to this one."""

    @property
    def takes_all(self) -> bool:
        """Whether everything is taken as it was saved, or nothing."""
        return self.parts is None and self.strict is True and self.rename is None and self.cast is False

    @property
    def described(self) -> str:
        """Text that is equal on ranks which select alike (of a function no more than that it is one)."""
        rename = "a function" if callable(self.rename) else repr(self.rename)
        strict = self.strict if isinstance(self.strict, bool) else sorted(self.strict)
        return f"{None if self.parts is None else sorted(self.parts)} {strict} {rename} {self.cast}"

    def takes_part(self, path: str) -> bool:
        """Whether a path relative to the step is in a part that is taken; of local state, keys below the rank count."""
        if self.parts is None:
            return True
        keys = path.split("/")
        if parse_local(f"{path}/.") is not None:
            keys = keys[1:]
        return not keys or not keys[0] or readable(keys[0]) in self.parts

    def takes_file(self, path: str) -> bool:
        """As :meth:`takes_part`, of a file; packs may hold tensors of any part."""
        if path == NODE or path.split("/")[0] == PACKS:
            return True
        return self.takes_part(path.removesuffix(f"/{NODE}"))

    def is_strict(self, name: str) -> bool:
        """Whether a tensor must be in both the step and the running state."""
        return self.strict if isinstance(self.strict, bool) else name.split("/")[0] in self.strict

    def renamed(self, name: str) -> str | None:
        """The running name of what was saved as ``name``; None: it is left out.

        Raises:
            CheckpointError: the function returned something else.
        """
        if self.rename is None:
            return name
        if self.rename == "unwrapped":
            return unwrapped(name)
        if isinstance(self.rename, Mapping):
            fits = [old for old in self.rename if _begins(name, old)]
            return self.rename[best] + name[len(best) :] if (best := max(fits, key=len, default=None)) else name
        assert callable(self.rename)
        new = self.rename(name)
        if new is not None and not isinstance(new, str):
            raise CheckpointError(f"rename({name!r}) returned {new!r}", "return a name, or None to leave it out")
        return new


EVERYTHING = Selection()


def make_selection(
    parts: Iterable[str] | None,
    strict: bool | Collection[str],
    rename: Rename | None,
    cast: bool | torch.dtype,
    *,
    running: bool,
) -> Selection:
    """A selection from a caller's arguments.

    Args:
        parts, strict, rename, cast: see :class:`Selection`.
        running: whether there is a running state to compare with.

    Raises:
        CheckpointError: an argument is of another type, or means nothing here.
    """
    keys = {"parts": parts, "strict": None if isinstance(strict, bool) else strict}
    chosen: dict[str, frozenset[str] | None] = {}
    for argument, value in keys.items():
        if isinstance(value, str):
            raise CheckpointError(f"{argument} = {value!r} is a string", f"pass {argument}=({value!r},)")
        chosen[argument] = None if value is None else frozenset(value)
    if chosen["parts"] is not None and not chosen["parts"]:
        raise CheckpointError("parts is empty", "name at least one top-level key of the state, or pass None for all")
    if rename is not None and rename != "unwrapped" and not isinstance(rename, Mapping) and not callable(rename):
        raise CheckpointError(f"rename = {rename!r}", 'pass a mapping of names, a function, or "unwrapped"')
    if isinstance(cast, torch.dtype):
        if running:
            raise CheckpointError(
                f"cast = {cast} together with a running state",
                "pass cast=True, which converts to the types of the running state",
            )
        if not cast.is_floating_point:
            raise CheckpointError(f"cast = {cast}", "pass a floating-point type")
    elif not isinstance(cast, bool):
        raise CheckpointError(f"cast = {cast!r}", "pass True, False or a floating-point torch.dtype")
    elif cast and not running:
        raise CheckpointError("cast = True without a running state to take types from", "pass a torch.dtype")
    whole = strict if isinstance(strict, bool) else chosen["strict"] or False
    return Selection(chosen["parts"], whole, rename, cast)


def unwrapped(name: str) -> str:
    """A name without what wrappers of modules put into it."""
    return "/".join(_unwrapped_key(key) for key in name.split("/"))


def _unwrapped_key(key: str) -> str:
    components = key.split(".")
    inner = [part for part in components if part not in _WRAPPERS]
    while len(inner) > 1 and inner[0] in _OUTER_WRAPPERS:
        inner = inner[1:]
    return ".".join(inner) or key


def _begins(name: str, old: str) -> bool:
    if not old or not name.startswith(old):
        return False
    return len(name) == len(old) or old[-1] in "/." or name[len(old)] in "/."


def keys_of(path: str) -> list[Any]:
    """The keys that lead to a path relative to the step."""
    return [decode_key(component) for component in path.split("/")]


def path_of(name: str, saved: str) -> str:
    """The path of a new name for what was saved at a path: keys that keep their place keep their type.

    Raises:
        CheckpointError: the name has an empty key.
    """
    before, after = saved.split("/"), name.split("/")
    if len(before) != len(after):
        before = [""] * len(after)
    return "/".join(
        old if old and str(decode_key(old)) == new else encode_key(new, at_root=not number)
        for number, (old, new) in enumerate(zip(before, after, strict=True))
    )
