"""Whether the documents and files of one state fit together, before memory is taken for its tensors.

Checksums only tell that a step is as somebody wrote it. What is checked here holds for every step that a save writes:
each group and array has its place in one tree, and each array's chunks are all there, and no others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from outlast.checkpoint.format.fields import Malformed
from outlast.checkpoint.format.file_paths import check_node
from outlast.checkpoint.format.names import COMMIT, CONTAINER, PACKS, decode_key, parse_local, parse_pack, rank_name
from outlast.checkpoint.format.records import CRC_BYTES, Commit, Fault, FileEntry, Vote
from outlast.checkpoint.format.zarr import ArrayInfo, chunk_name, node_path
from outlast.checkpoint.state.boxes import whole
from outlast.checkpoint.state.matching import TensorType
from outlast.errors import CorruptCheckpoint, IncompleteCheckpoint

Nodes = Mapping[str, ArrayInfo | dict[str, Any]]
"""Arrays, and the attributes of groups, by path relative to the step."""


def top_of(rank: int | None) -> str:
    """The path of the group of a rank's local state, or (None) of the replicated state."""
    return "" if rank is None else rank_name(rank)


def arrays_in(nodes: Nodes) -> dict[str, ArrayInfo]:
    """The arrays, packs included."""
    return {path: info for path, info in nodes.items() if isinstance(info, ArrayInfo)}


def groups_in(nodes: Nodes) -> dict[str, dict[str, Any]]:
    """The attributes of the groups."""
    return {path: info for path, info in nodes.items() if not isinstance(info, ArrayInfo)}


def types_of(rank: int | None, arrays: Mapping[str, ArrayInfo]) -> dict[str, TensorType]:
    """Shape and dtype of a state's tensors, by path."""
    types = {path: TensorType(info.shape, info.dtype) for path, info in arrays.items() if info.packed is None}
    for info in arrays.values():
        packed = info.packed or {}
        types |= {path: TensorType(at.shape, at.dtype) for path, at in packed.items() if parse_local(path) == rank}
    return types


def check_structure(rank: int | None, nodes: Nodes, entries: Iterable[FileEntry], takes: Callable[[str], bool]) -> None:
    """Check one rank's local state, or (None) the replicated state.

    Args:
        rank: whose state.
        nodes: its arrays and groups, and the packs that may hold its small tensors.
        entries: its files, those of the packs included.
        takes: whether the groups of a packed tensor are among the nodes.

    Raises:
        Fault: what does not fit; names the file.
    """
    top = top_of(rank)
    if isinstance(nodes.get(top), ArrayInfo) or top not in nodes:
        raise Fault(IncompleteCheckpoint, node_path(top), "no vote lists this file as a group")
    chunks: dict[str, list[FileEntry]] = {}
    for entry in entries:
        if entry.chunk:
            chunks.setdefault(entry.path.rpartition("/")[0], []).append(entry)
    packed: dict[str, str] = {}
    for path, info in nodes.items():
        if isinstance(info, ArrayInfo):
            _check_chunks(path, info, chunks.pop(path, []))
            is_pack = path.startswith(f"{PACKS}/")
            if is_pack != (info.packed is not None):
                raise _fault(path, "is a pack elsewhere than among the packs, or no pack there")
            if is_pack:
                _add_packed(path, info, packed)
                continue
        if path != top:
            _check_place(path, top, nodes, path)
    for path, pack in packed.items():
        if parse_local(path) == rank and takes(path):
            _check_place(path, top, nodes, pack)
            if path in nodes:
                raise _fault(pack, f"has {path[:80]!r}, which has a file of its own, too")
    for path, listed in chunks.items():
        raise Fault(CorruptCheckpoint, listed[0].path, f"is a chunk, but {path[:80]!r} is no array")


def check_votes(commit: Commit, votes: Sequence[Vote]) -> None:
    """Check that the votes of a step list no file twice, and as many bytes as its commit record says.

    Raises:
        Fault: they do not.
    """
    listed: set[str] = set()
    for vote in votes:
        for entry in vote.files:
            if entry.path in listed:
                raise Fault(CorruptCheckpoint, entry.path, "is in the votes of two ranks")
            listed.add(entry.path)
    size_bytes = sum(entry.size_bytes for vote in votes for entry in vote.files)
    if size_bytes != commit.size_bytes:
        raise Fault(CorruptCheckpoint, COMMIT, f"says {commit.size_bytes} bytes, the votes {size_bytes}")


def _check_chunks(path: str, info: ArrayInfo, listed: list[FileEntry]) -> None:
    grid = math.prod(-(-size // step) for size, step in zip(info.shape, info.chunk, strict=True))
    names = {entry.path.rpartition("/")[2] for entry in listed}
    if grid <= len(names):  # otherwise the grid may have any number of chunks
        names ^= {chunk_name(index) for index in whole(info.shape).places(info.chunk)}
        if not names:
            for entry in listed:
                if entry.size_bytes != info.chunk_bytes + CRC_BYTES:
                    expected = info.chunk_bytes + CRC_BYTES
                    raise Fault(
                        CorruptCheckpoint,
                        entry.path,
                        f"expected {expected} bytes for its array, the vote says {entry.size_bytes}",
                    )
            return
        name = min(names)
        raise Fault(IncompleteCheckpoint, f"{path}/{name}", "is in the votes or in its array's grid, but not in both")
    raise Fault(
        IncompleteCheckpoint, node_path(path), f"its array has {grid} chunks, but the votes list {len(names)} of them"
    )


def _add_packed(path: str, info: ArrayInfo, packed: dict[str, str]) -> None:
    owner = parse_pack(node_path(path))
    for name in info.packed or {}:
        if name in packed:
            raise _fault(path, f"has {name[:80]!r}, which another pack has, too")
        packed[name] = path
        try:
            check_node(name, rank=owner if owner is not None else 0)
        except Malformed as error:
            raise _fault(path, str(error)) from error


def _check_place(path: str, top: str, nodes: Nodes, document: str) -> None:
    """Check that a node's parent is a group, and that the group has no value under the node's key."""
    parent, _, name = path.rpartition("/")
    group = nodes.get(parent)
    if group is None or isinstance(group, ArrayInfo) or not f"{parent}/".startswith(f"{top}/" if top else ""):
        raise _fault(document, f"{path[:80]!r} is not in a group of the state")
    if decode_key(name) in group.keys() - {CONTAINER}:  # which is not a value
        raise _fault(document, f"{path[:80]!r} is a value of its group, too")


def _fault(path: str, reason: str) -> Fault:
    return Fault(CorruptCheckpoint, node_path(path), reason)
