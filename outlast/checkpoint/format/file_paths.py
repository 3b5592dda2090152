"""The paths in votes and pack indices: only those that a save gives, so that none leads out of the step."""

from __future__ import annotations

import re
from functools import lru_cache

from outlast.checkpoint.format.fields import Malformed
from outlast.checkpoint.format.names import NODE, PACKS, decode_key, encode_key, parse_local, parse_pack, rank_name
from outlast.errors import CheckpointError

_MAX_BYTES = 4096
_MAX_NAME_BYTES = 255
_CHUNK = re.compile(r"c(\.(0|[1-9][0-9]*))*")
_PACK = re.compile(rf"{PACKS}/rank_[0-9]{{5,}}\.(0|[1-9][0-9]*)")
_DIGEST = re.compile(r"~k[0-9a-f]{32}")
_SHOWN = 80


def check_path(path: str, *, chunk: bool, rank: int) -> None:
    """Check the path of a file that a vote lists.

    Args:
        path: relative to the step's folder.
        chunk: whether the vote says that it is a chunk; otherwise it is a Zarr document.
        rank: whose vote it is.

    Raises:
        Malformed: a save by this rank gives no file this path.
    """
    folder, _, name = path.rpartition("/")
    right_name = _CHUNK.fullmatch(name) is not None if chunk else name == NODE
    if len(path) > _MAX_BYTES or not right_name or (chunk and not folder):
        raise Malformed(f"{path[:_SHOWN]!r} is not the path of a {'chunk' if chunk else 'Zarr document'} of a step")
    if folder.startswith(f"{PACKS}/"):
        if not _PACK.fullmatch(folder):
            raise Malformed(f"{path[:_SHOWN]!r} is not the path of a pack")
        owner = parse_pack(path)
        prefix = f"{PACKS}/{rank_name(owner or 0)}."
    else:
        owner = parse_local(path)
        prefix = f"{rank_name(owner)}/" if owner is not None else ""
        if folder and folder != PACKS:
            check_node(folder, rank=rank)
    if owner not in (None, rank) or not path.startswith(prefix):
        raise Malformed(f"{path[:_SHOWN]!r} is in the vote of rank {rank}")


def check_node(path: str, *, rank: int) -> None:
    """Check the path of an array or a group of the state.

    Args:
        path: relative to the step's folder, and not the root.
        rank: that wrote it.

    Raises:
        Malformed: no key of the state is stored there, or it is another rank's.
    """
    names = path.split("/")
    if len(path) > _MAX_BYTES:
        raise Malformed(f"the path {path[:_SHOWN]!r}... has {len(path)} characters; at most {_MAX_BYTES} are read")
    if names[0] == rank_name(rank):
        names = names[1:]
        at_root = False
    else:
        at_root = True
    for name in names:
        if not _is_key(name, at_root):
            raise Malformed(f"{path[:_SHOWN]!r} has the component {name[:_SHOWN]!r}, which is no key of a state")
        at_root = False


@lru_cache(maxsize=65_536)
def _is_key(name: str, at_root: bool) -> bool:
    """Whether a key is encoded like this: then it is neither empty nor ``..``, and no two names are the same key."""
    if not at_root and _DIGEST.fullmatch(name):
        return True  # of a key that its group's attribute tells
    if not name or len(name) > _MAX_NAME_BYTES:
        return False
    try:
        return encode_key(decode_key(name), at_root=at_root) == name
    except (CheckpointError, ValueError):
        return False
