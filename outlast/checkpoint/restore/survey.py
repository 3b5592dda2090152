"""What lies in the nodes' memory and on their disks, and getting at it: the shards of a restore's fastest copies."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from outlast.checkpoint.format.names import LOCAL_DISK, MEMORY, NODE, PARTNER, parse_local
from outlast.checkpoint.format.records import Commit, Fault, FileEntry, Vote, crc_hex, seal, unseal_commit, unseal_vote
from outlast.checkpoint.memory.pages import Buffer
from outlast.checkpoint.peers.collectives import Agreement
from outlast.checkpoint.peers.topology import Nodes
from outlast.checkpoint.restore.chunk_needs import who_needs
from outlast.checkpoint.restore.copies import AvailableCopies, BytesByTier, SurveyedSave
from outlast.checkpoint.restore.slot_files import SlotFiles, Span
from outlast.checkpoint.state.target import RestoreTarget
from outlast.checkpoint.storage.local import sync_dir
from outlast.checkpoint.tiers.slots import OWN, SlotContents, commits, holdings

_ORDER = (MEMORY, PARTNER, LOCAL_DISK)
"""The tiers of a node, the fastest first."""


@dataclass(frozen=True)
class Route:
    """A file's way from a rank whose node's memory has it to ranks whose nodes' have not."""

    entry: FileEntry
    sender: int
    receivers: list[int]


class Survey:
    """The memory of all nodes, during a restore. Methods are collective over the agreement's group unless said.

    Args:
        folder: of this node's memory.
        disk: of its own disk; None: there is no such tier.
        nodes: who is where.
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
        io: ThreadPoolExecutor,
    ) -> None:
        self._folders = [folder] if disk is None else [folder, disk]
        self._nodes = nodes
        self._rank = rank
        self._node = nodes.names[rank]
        self._peers = nodes.ranks_with(rank)
        self._agreement = agreement
        self._io = io
        self._local: dict[tuple[str, int], dict[int, list[SlotContents]]] = {}
        """By save and rank: what this node has of it, the fastest first."""

    @property
    def is_node_leader(self) -> bool:
        """Whether this rank speaks for its node."""
        return self._peers[0] == self._rank

    def saves(self) -> list[SurveyedSave]:
        """Committed saves of which nodes have parts, newest first."""
        self._local = {}
        for holding in self._holdings():
            vote = holding.placed.vote
            self._local.setdefault((vote.attempt_id, vote.save_id), {}).setdefault(vote.rank, []).append(holding)
        for ranks in self._local.values():
            for found in ranks.values():
                found.sort(key=lambda holding: _ORDER.index(holding.tier))
        told = ""
        if self.is_node_leader and self._local:
            records = [seal(commit).decode() for folder in self._folders for commit in commits(folder).values()]
            has = []
            for key, ranks in self._local.items():
                in_memory = [rank for rank, found in sorted(ranks.items()) if found[0].tier != LOCAL_DISK]
                has.append([*key, sorted(ranks), in_memory])
            told = json.dumps({"has": has, "commits": records})
        known: dict[tuple[str, int], Commit] = {}
        holders: dict[tuple[str, int], dict[int, list[str]]] = {}
        fast: dict[tuple[str, int], dict[int, list[str]]] = {}
        for rank, text in enumerate(self._agreement.all_gather_text(told)):
            if not text:
                continue
            said = json.loads(text)
            for record in said["commits"]:
                commit = unseal_commit(record.encode())
                known.setdefault((commit.attempt_id, commit.save_id), commit)
            for attempt_id, save_id, *both in said["has"]:
                for table, some in zip((holders, fast), both, strict=True):
                    for saved in some:
                        table.setdefault((attempt_id, save_id), {}).setdefault(saved, []).append(
                            self._nodes.names[rank]
                        )
        saves = [
            SurveyedSave(commit, *(_by_rank(table.get(key, {})) for table in (holders, fast)))
            for key, commit in known.items()
            if key in holders
        ]
        return sorted(saves, key=lambda save: (save.commit.step, save.commit.saved_at, save.key), reverse=True)

    def votes(self, save: SurveyedSave) -> dict[int, Vote]:
        """The votes of a save's parts that nodes have."""
        told = ""
        mine = self._local.get(save.key, {})
        if self.is_node_leader and mine:
            told = json.dumps({rank: seal(found[0].placed.vote).decode() for rank, found in mine.items()})
        votes: dict[int, Vote] = {}
        for text in self._agreement.all_gather_text(told):
            for name, sealed in (json.loads(text) if text else {}).items():
                rank, data = int(name), sealed.encode()
                entry = save.commit.votes[rank]
                if crc_hex(data) == entry.crc32c:
                    votes[rank] = unseal_vote(data, entry.path)
        return votes

    def gather(
        self,
        save: SurveyedSave,
        votes: dict[int, Vote],
        same_ranks: bool,
        wanted: RestoreTarget | None,
        taken: BytesByTier,
        *,
        verify: bool,
    ) -> AvailableCopies:
        """Verify what this node has of a save, and have what its ranks need and it lacks sent by nodes that have it.

        Every byte is verified: where it lies, by one of the ranks that share it; what is sent, by its receiver.

        Args:
            save: which.
            votes: its parts' votes.
            same_ranks: whether as many ranks restore as saved; then local state goes to its own rank alone.
            wanted: of which tensors this rank needs a part; chunks that lie in no such part are not sent to it.
            taken: where bytes are counted.
            verify: False leaves what this node has to whoever reads it.
        """
        lying = self._lying(save)
        bad, damaged = self._verify(lying, save) if verify else (set(), {})
        good = {path for path in lying.spans if (self._node, path) not in bad}
        routes = self._routes(save, votes, same_ranks, bad)
        # Documents first: they say which chunks a part of a tensor lies in.
        sent = self._send([route for route in routes if not route.entry.chunk], lying)
        chunks = [route for route in routes if route.entry.chunk]
        boxes = wanted.boxes if wanted is not None else {}
        documents = {path: lying.view(path) for path in good if path.endswith(NODE)} if boxes else {}
        needs = who_needs([route.entry.path for route in chunks], boxes, documents | sent, self._agreement)
        chunks = [
            Route(route.entry, route.sender, [rank for rank in route.receivers if rank in needs[route.entry.path]])
            for route in chunks
        ]
        sent |= self._send(chunks, lying)
        return AvailableCopies(lying, good, verify, sent, damaged, taken)

    def quarantine(self, save: SurveyedSave, gathered: AvailableCopies) -> None:
        """See that copies with damage are never taken again. Not collective."""
        for holding in self._held(save):
            if any((self._node, path, holding.tier) in gathered.damaged for path in holding.placed.places):
                holding.quarantine()

    def discard(self, newer_than: int) -> None:
        """Remove what this node has of steps newer than the one gone back to. Not collective."""
        if not self.is_node_leader:
            return
        for folder in self._folders:
            for path, commit in commits(folder).items():
                if commit.step > newer_than:
                    path.unlink(missing_ok=True)
        for holding in list(self._holdings()):
            if holding.placed.vote.step > newer_than:
                holding.remove()
        for folder in self._folders:
            sync_dir(str(folder / OWN))

    def _holdings(self) -> Iterator[SlotContents]:
        for folder, own in zip(self._folders, (MEMORY, LOCAL_DISK), strict=False):
            yield from holdings(folder, own)

    def _held(self, save: SurveyedSave) -> list[SlotContents]:
        """What this node has of a save, the fastest first."""
        held = [holding for found in self._local.get(save.key, {}).values() for holding in found]
        return sorted(held, key=lambda holding: _ORDER.index(holding.tier))

    def _lying(self, save: SurveyedSave) -> SlotFiles:
        spans: dict[str, list[Span]] = {}
        for holding in self._held(save):
            for entry in holding.placed.vote.files:
                at = holding.placed.places[entry.path]
                spans.setdefault(entry.path, []).append(Span(holding.data, at, entry.size_bytes, holding.tier))
        return SlotFiles(spans)

    def _verify(
        self, lying: SlotFiles, save: SurveyedSave
    ) -> tuple[set[tuple[str, str]], dict[tuple[str, str, str], str]]:
        """Have each node verify what it has, and take what it has besides in place of what is damaged.

        Returns:
            By node and file: what it has no good copy of. By node, file and tier: what is wrong with it.
        """
        files = {entry.path: entry for holding in self._held(save) for entry in holding.placed.vote.files}
        bad: set[tuple[str, str]] = set()
        damaged: dict[tuple[str, str, str], str] = {}
        while True:
            found = self._faults(lying, list(files.values()))
            news = [
                (self._nodes.names[rank], *fault)
                for rank, text in enumerate(self._agreement.all_gather_text(json.dumps(found) if found else ""))
                for fault in (json.loads(text) if text else [])
            ]
            if not news:
                return bad, damaged
            damaged |= {(node, path, tier): reason for node, path, tier, reason in news}
            # The ranks of a node know of the same faults, and do the same; the others hear of it.
            again = {path for node, path, *_ in news if node == self._node and lying.drop(path)}
            files = {path: files[path] for path in again}
            texts = self._agreement.all_gather_text(json.dumps(sorted(again)) if self.is_node_leader and again else "")
            replaced = {
                (self._nodes.names[rank], path)
                for rank, text in enumerate(texts)
                for path in (json.loads(text) if text else [])
            }
            bad |= {(node, path) for node, path, *_ in news} - replaced

    def _faults(self, lying: SlotFiles, entries: list[FileEntry]) -> list[tuple[str, str, str]]:
        """File, tier and reason, of this rank's portion of what its node has."""
        entries.sort(key=lambda entry: (entry.size_bytes, entry.path))  # equal shares by dealing them out in turn
        mine = entries[self._peers.index(self._rank) :: len(self._peers)]

        def fault(entry: FileEntry) -> tuple[str, str, str] | None:
            try:
                lying.check(entry)
            except Fault as found:
                return entry.path, lying.tier(entry.path), found.reason
            return None

        return [found for found in self._io.map(fault, mine) if found is not None]

    def _routes(
        self, save: SurveyedSave, votes: dict[int, Vote], same_ranks: bool, bad: set[tuple[str, str]]
    ) -> list[Route]:
        """The files that some rank's node lacks and another's has; the same list on all ranks."""
        names, routes = self._nodes.names, []
        for saved in sorted(votes):
            fast = save.in_memory.get(saved, ())
            holders = sorted(save.holders.get(saved, ()), key=lambda name: name not in fast)
            for entry in votes[saved].files:
                good = [name for name in holders if (name, entry.path) not in bad]
                owner = parse_local(entry.path)
                needed = range(len(names)) if owner is None or not same_ranks else [owner]
                without = [rank for rank in needed if names[rank] not in good]
                if without and good:
                    able = self._nodes.ranks_with(names.index(good[0]))
                    routes.append(Route(entry, able[saved % len(able)], without))
        return routes

    def _send(self, routes: list[Route], lying: SlotFiles) -> dict[str, Buffer]:
        """Have each file sent to its receivers; all ranks walk one list. What this rank got."""
        sent: dict[str, Buffer] = {}
        for route in routes:
            if not route.receivers:
                continue
            path, size_bytes = route.entry.path, route.entry.size_bytes
            data = torch.from_numpy(_sent(lying, route.entry)) if self._rank == route.sender else None
            got = self._agreement.transfer(data, size_bytes, route.sender, route.receivers)
            if got is not None and self._rank in route.receivers:
                sent[path] = got.numpy()
        return sent


def _sent(lying: SlotFiles, entry: FileEntry) -> Buffer:
    """As many bytes of a file as its receivers wait for, which find out if they are not the right ones."""
    try:
        data = lying.view(entry.path)
    except Fault:
        data = np.empty(0, np.uint8)
    return data if len(data) == entry.size_bytes else np.zeros(entry.size_bytes, np.uint8)


def _by_rank(nodes: Mapping[int, list[str]]) -> dict[int, tuple[str, ...]]:
    return {rank: tuple(names) for rank, names in sorted(nodes.items())}
