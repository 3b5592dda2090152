"""The parts of saves that each node holds in its memory and on its disk."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

from outlast.checkpoint.format.names import LOCAL_DISK, MEMORY, PARTNER
from outlast.checkpoint.format.records import Commit, Fault, Vote, crc_hex, seal, unseal_commit, unseal_vote
from outlast.checkpoint.peers.collectives import Agreement
from outlast.checkpoint.peers.topology import Nodes
from outlast.checkpoint.restore.messages import (
    DamagedCopy,
    PartOnNode,
    SaveKey,
    SealedCommit,
    SealedVote,
    all_gather_messages,
)
from outlast.checkpoint.restore.slot_files import SlotFiles, Span
from outlast.checkpoint.storage.local import sync_removal
from outlast.checkpoint.tiers.folders import OWN
from outlast.checkpoint.tiers.slots import SlotContents, commits, holdings
from outlast.errors import IncompleteCheckpoint

_log = logging.getLogger("outlast.checkpoint")
_FASTEST_FIRST = (MEMORY, PARTNER, LOCAL_DISK)
"""The tiers of a node."""


@dataclass(frozen=True)
class SaveOnNodes:
    """A committed save, parts of which are on nodes; equal on all ranks."""

    commit: Commit
    holders: dict[int, tuple[str, ...]]
    """By rank that saved: the nodes that have its part."""
    in_memory: dict[int, tuple[str, ...]]
    """By rank that saved: the nodes that have its part in memory."""

    @property
    def key(self) -> SaveKey:
        """Which save of which attempt."""
        return SaveKey(self.commit.attempt_id, self.commit.save_id)

    def missing_fault(self) -> Fault | None:
        """What makes the save incomplete on the nodes; None if together they have every rank's part."""
        missing = [rank for rank in range(self.commit.world_size) if rank not in self.holders]
        if not missing:
            return None
        ranks = f"{'rank' if len(missing) == 1 else 'ranks'} {', '.join(map(str, missing))}"
        return Fault(IncompleteCheckpoint, "", f"no node holds the data of {ranks}")


class Survey:
    """What the nodes hold besides the storage, during one restore.

    The methods are collective over the agreement's group, unless they say otherwise, and fail as it does.

    Args:
        folder: of this node's memory.
        disk: of this node's own disk; None: there is no such tier.
        nodes: which rank is on which node.
        rank: of this process.
        agreement: over all ranks.
        io: threads that verify.
    """

    def __init__(
        self,
        folder: Path,
        disk: Path | None,
        nodes: Nodes,
        rank: int,
        agreement: Agreement,
        io: Executor,
    ) -> None:
        self.nodes = nodes
        self.rank = rank
        self.node = nodes.names[rank]
        self.ranks_here = nodes.ranks_with(rank)
        """The ranks of this node."""
        self.agreement = agreement
        self.io = io
        self._folders = [folder] if disk is None else [folder, disk]
        self._parts: dict[SaveKey, dict[int, list[SlotContents]]] = {}
        """By save and rank that saved: this node's copies of its part, the fastest first."""

    @property
    def is_node_leader(self) -> bool:
        """Whether this rank speaks for its node."""
        return self.ranks_here[0] == self.rank

    def saves(self) -> list[SaveOnNodes]:
        """The committed saves that are on nodes, in whole or in part; newest first."""
        self._parts = self._scan()
        parts: list[PartOnNode] = []
        records: list[SealedCommit] = []
        if self.is_node_leader and self._parts:
            records = [SealedCommit(seal(commit).decode()) for _, commit in self._commits()]
        committed: dict[SaveKey, Commit] = {}
        for _, record in all_gather_messages(self.agreement, SealedCommit, records):
            try:
                commit = unseal_commit(record.text.encode())
            except Fault as fault:
                _log.warning("a commit record on a node is not used: %s", fault)
                continue
            committed.setdefault(SaveKey(commit.attempt_id, commit.save_id), commit)
        self._parts = {key: _counting(self._parts[key], committed[key]) for key in self._parts if key in committed}
        if self.is_node_leader:
            parts = [
                PartOnNode(self.node, *key, rank, copies[0].tier != LOCAL_DISK)
                for key, by_rank in self._parts.items()
                for rank, copies in sorted(by_rank.items())
            ]
        on_nodes: dict[SaveKey, list[PartOnNode]] = {}
        for _, part in all_gather_messages(self.agreement, PartOnNode, parts):
            on_nodes.setdefault(SaveKey(part.attempt_id, part.save_id), []).append(part)
        saves = [
            SaveOnNodes(commit, _by_rank(on_nodes[key]), _by_rank(part for part in on_nodes[key] if part.in_memory))
            for key, commit in committed.items()
            if key in on_nodes
        ]
        return sorted(saves, key=lambda save: (save.commit.step, save.commit.saved_at, save.key), reverse=True)

    def votes(self, save: SaveOnNodes) -> dict[int, Vote]:
        """The votes for a save, by rank, of those parts that nodes have; each verified against the commit record."""
        own: list[SealedVote] = []
        if self.is_node_leader:
            by_rank = self._parts.get(save.key, {})
            own = [SealedVote(rank, seal(copies[0].placed.vote).decode()) for rank, copies in by_rank.items()]
        votes: dict[int, Vote] = {}
        for _, vote in all_gather_messages(self.agreement, SealedVote, own):
            if not 0 <= vote.rank < save.commit.world_size:
                continue
            data, entry = vote.text.encode(), save.commit.votes[vote.rank]
            if crc_hex(data) == entry.crc32c:
                try:
                    votes[vote.rank] = unseal_vote(data, entry.path)
                except Fault as fault:
                    _log.warning("a vote on a node is not used: %s", fault)
        return votes

    def files(self, save: SaveOnNodes) -> SlotFiles:
        """This node's copies of a save's files, the fastest first. Not collective."""
        spans: dict[str, list[Span]] = {}
        for part in self.parts(save):
            for entry in part.placed.vote.files:
                offset = part.placed.places[entry.path]
                spans.setdefault(entry.path, []).append(Span(part.data, offset, entry.size_bytes, part.tier))
        return SlotFiles(spans)

    def parts(self, save: SaveOnNodes) -> list[SlotContents]:
        """This node's copies of a save's parts, the fastest first. Not collective."""
        parts = [part for copies in self._parts.get(save.key, {}).values() for part in copies]
        return sorted(parts, key=_speed)

    def lacks_copies(self, step: int, copies: int) -> bool:
        """Whether a step is in memory, and some rank's part of it in the memory of fewer than ``copies`` nodes."""
        newest = next((save for save in self.saves() if save.commit.step == step), None)
        if newest is None:
            return False
        return any(len(newest.in_memory.get(rank, ())) < copies for rank in range(newest.commit.world_size))

    def quarantine(self, save: SaveOnNodes, damaged: Iterable[DamagedCopy]) -> None:
        """Make sure that this node's parts with damage are never used again. Not collective."""
        here = {(copy.path, copy.tier) for copy in damaged if copy.node == self.node}
        for part in self.parts(save):
            if any((path, part.tier) in here for path in part.placed.places):
                part.quarantine()

    def discard(self, newer_than: int) -> None:
        """Remove what this node holds of steps newer than the restored one. Not collective."""
        if not self.is_node_leader:
            return
        for path, commit in self._commits():
            if commit.step > newer_than:
                path.unlink(missing_ok=True)
        for part in list(self._contents()):
            if part.placed.vote.step > newer_than:
                part.remove()
        for folder in self._folders:
            sync_removal(str(folder / OWN))

    def _scan(self) -> dict[SaveKey, dict[int, list[SlotContents]]]:
        parts: dict[SaveKey, dict[int, list[SlotContents]]] = {}
        for part in sorted(self._contents(), key=_speed):
            vote = part.placed.vote
            parts.setdefault(SaveKey(vote.attempt_id, vote.save_id), {}).setdefault(vote.rank, []).append(part)
        return parts

    def _commits(self) -> list[tuple[Path, Commit]]:
        return [record for folder in self._folders for record in commits(folder).items()]

    def _contents(self) -> Iterator[SlotContents]:
        for folder, own_tier in zip(self._folders, (MEMORY, LOCAL_DISK), strict=False):
            yield from holdings(folder, own_tier)


def _counting(parts: dict[int, list[SlotContents]], commit: Commit) -> dict[int, list[SlotContents]]:
    """Those parts of a save whose vote is the one that its commit record counts."""
    return {
        rank: counting
        for rank, copies in parts.items()
        if rank < commit.world_size
        and (
            counting := [
                copy
                for copy in copies
                if (copy.placed.vote.step, copy.placed.vote.world_size) == (commit.step, commit.world_size)
                and crc_hex(seal(copy.placed.vote)) == commit.votes[rank].crc32c
            ]
        )
    }


def _speed(part: SlotContents) -> int:
    return _FASTEST_FIRST.index(part.tier)


def _by_rank(parts: Iterable[PartOnNode]) -> dict[int, tuple[str, ...]]:
    nodes: dict[int, tuple[str, ...]] = {}
    for part in sorted(parts, key=lambda part: part.rank):
        nodes[part.rank] = (*nodes.get(part.rank, ()), part.node)
    return nodes
