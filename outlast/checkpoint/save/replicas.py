"""Whether ranks have the same replicated state: digests of each piece from two of them, compared before the commit.

Each piece of a tensor is written by one of the ranks that hold it. The next of them digests the same piece. Where the
two digests differ, the step would be a mixture of two states, so it is not committed. Values are written by rank 0, and
digested by all.
"""

from __future__ import annotations

import ctypes
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import crc32c
import torch

from outlast.checkpoint.format.names import CONTAINER, HEADER, readable
from outlast.checkpoint.format.records import Vote, crc_hex
from outlast.checkpoint.save.parts import Content
from outlast.errors import ReplicasDiffer

Compared = Literal["sampled", "whole", "off"]
_BLOCK_BYTES = 4096
_EVERY_BYTES = 1 << 20
"""Sampled are a block out of each such stretch, another one with each step, and all of a piece below this size."""
_COPIED_BYTES = 1 << 16
"""Up to this size a copy costs less than a view of the tensor's memory."""
_VALUE_DIGESTS = 256
"""At most, of all values: if there are more, neighbours share one."""
_VALUES = "="
"""What the name of a digest of values begins with; no path does."""
_SHOWN = 5


@dataclass(frozen=True)
class Piece:
    """What two ranks digest."""

    path: str
    """Of the chunk, or of a small tensor, relative to the step."""
    content: Content


class Replicas:
    """One rank's digests for one save.

    Args:
        pieces: that this rank writes, or is to check.
        groups: of the replicated state: attributes by path.
        compared: how much of a piece.
        step: of the save, equal on all ranks.
    """

    def __init__(
        self, pieces: Sequence[Piece], groups: Mapping[str, dict[str, Any]], compared: Compared, step: int
    ) -> None:
        self._compared = compared
        self._step = step
        self._groups: Mapping[str, dict[str, Any]] = groups if compared != "off" else {}
        self._lazy = [piece for piece in pieces if not piece.content.item.eager] if compared != "off" else []
        eager = [piece for piece in pieces if piece.content.item.eager] if compared != "off" else []
        self._digests: dict[str, str] = {}
        self._held: dict[str, torch.Tensor] = {}
        """Of eager pieces on a device, copies there: to wait for the device here would hold training."""
        for piece in eager:
            if piece.content.source.device.type == "cuda":
                self._held[piece.path] = self._bytes(piece).clone()
            else:
                self._digests[piece.path] = self._digest(piece)
        devices = {piece.content.source.device for piece in pieces} if compared != "off" else set()
        self._queued = {
            device: torch.cuda.current_stream(device).record_event() for device in devices if device.type == "cuda"
        }

    def digests(self) -> dict[str, str]:
        """By piece; the tensors are read by the first call, and must not have changed before that."""
        streams = {}
        for device, event in self._queued.items():
            streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            streams[device].wait_event(event)
        for path, held in self._held.items():
            with torch.cuda.stream(streams[held.device]):
                self._digests[path] = crc_hex(held.cpu().numpy().data)
        for piece in self._lazy:
            if not streams:
                self._digests[piece.path] = self._digest(piece)
                continue
            with torch.cuda.stream(streams.get(piece.content.source.device)):
                self._digests[piece.path] = self._digest(piece)
        self._digests |= _value_digests(self._groups)
        self.release()
        return self._digests

    def release(self) -> None:
        """Let go of the tensors."""
        self._lazy, self._groups, self._queued, self._held = [], {}, {}, {}

    def _digest(self, piece: Piece) -> str:
        source = piece.content.source
        large = self._compared == "sampled" and source.nbytes > _EVERY_BYTES
        if source.device.type == "cpu" and source.is_contiguous() and not (source.is_conj() or source.is_neg()):
            # Without a view of torch's, which costs more than the checksum of a small tensor.
            runs = _blocks(source.nbytes, self._step) if large else [(0, source.nbytes)]
            address, crc = source.data_ptr(), 0
            for start, nbytes in runs:
                small = nbytes <= _COPIED_BYTES
                at = address + start
                data = ctypes.string_at(at, nbytes) if small else (ctypes.c_char * nbytes).from_address(at)
                crc = crc32c.crc32c(data, crc)
            return f"{crc:08x}"
        return crc_hex(self._bytes(piece).cpu().numpy().data)

    def _bytes(self, piece: Piece) -> torch.Tensor:
        """What is digested, end to end, where the tensor is."""
        source = piece.content.source
        with torch.no_grad():
            flat = source.detach().resolve_conj().resolve_neg().reshape(-1).view(torch.uint8)
            large = self._compared == "sampled" and source.nbytes > _EVERY_BYTES
            return _sample(flat, self._step) if large else flat


def _blocks(nbytes: int, step: int) -> list[tuple[int, int]]:
    """A block of each stretch, and the last one: where it begins, and its size."""
    at = step % (_EVERY_BYTES // _BLOCK_BYTES) * _BLOCK_BYTES
    stretches = range(0, nbytes - _EVERY_BYTES + 1, _EVERY_BYTES)
    return [*((start + at, _BLOCK_BYTES) for start in stretches), (nbytes - _BLOCK_BYTES, _BLOCK_BYTES)]


def _sample(flat: torch.Tensor, step: int) -> torch.Tensor:
    """The same bytes as those of :func:`_blocks`, end to end: of a tensor on a device, or one with gaps."""
    stretches = flat.numel() // _EVERY_BYTES
    at = step % (_EVERY_BYTES // _BLOCK_BYTES) * _BLOCK_BYTES
    blocks = flat[: stretches * _EVERY_BYTES].view(stretches, _EVERY_BYTES)[:, at : at + _BLOCK_BYTES]
    return torch.cat([blocks.reshape(-1), flat[-_BLOCK_BYTES:]])


def _value_digests(groups: Mapping[str, dict[str, Any]]) -> dict[str, str]:
    """Of the values of all groups, whatever the order of the dictionaries."""
    values = sorted(
        (f"{readable(path)}/{name}" if path else name, json.dumps(value, sort_keys=True))
        for path, attributes in groups.items()
        for name, value in attributes.items()
        if name != CONTAINER and (path or name != HEADER)
    )
    together = -(-len(values) // _VALUE_DIGESTS) or 1
    digests = {}
    for at in range(0, len(values), together):
        run = values[at : at + together]
        name = run[0][0] if len(run) == 1 else f"{run[0][0]} to {run[-1][0]}"
        digests[f"{_VALUES}{name}"] = crc_hex("\n".join(f"{key} {text}" for key, text in run).encode())
    return digests


def check_replicas(votes: Iterable[Vote]) -> None:
    """Compare what the ranks of a save digested.

    Raises:
        ReplicasDiffer: names tensors and values, ranks and digests.
    """
    found: defaultdict[str, defaultdict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for vote in votes:
        for piece, digest in vote.replicas.items():
            found[piece][digest].append(vote.rank)
    differ = {piece: by_digest for piece, by_digest in found.items() if len(by_digest) > 1}
    if not differ:
        return
    lines = [f"{_name(piece)}: {_digests(by_digest)}" for piece, by_digest in sorted(differ.items())[:_SHOWN]]
    more = f"\n  and {len(differ) - _SHOWN} more" if len(differ) > _SHOWN else ""
    raise ReplicasDiffer(
        f"{len(differ)} pieces of the replicated state are not the same on all ranks:\n  " + "\n  ".join(lines) + more,
        "what is each rank's own belongs into `local`; parameters that differ were not synchronised (broadcast them "
        "from one rank). checkpoint.compare_replicas sets how much is compared",
    )


def _name(piece: str) -> str:
    if piece.startswith(_VALUES):
        return f"the value {piece.removeprefix(_VALUES)!r}"
    path, _, last = piece.rpartition("/")
    if path and last.startswith("c.") and all(place.isdecimal() for place in last.split(".")[1:]):
        return f"the tensor {readable(path)!r}, chunk {last}"
    return f"the tensor {readable(piece)!r}"


def _digests(by_digest: Mapping[str, Sequence[int]]) -> str:
    return ", ".join(
        f"CRC32C {digest} on rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:8]))}"
        + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
        for digest, ranks in by_digest.items()
    )
