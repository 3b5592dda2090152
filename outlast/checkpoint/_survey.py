"""What lies in the memory of all nodes, and getting at it: the shards of a restore's fastest copies."""

from __future__ import annotations

import json
import logging
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from outlast.checkpoint._agreement import Agreement
from outlast.checkpoint._lying import Lying, Span
from outlast.checkpoint._names import MEMORY, NODE, PARTNER, parse_local, parse_pack
from outlast.checkpoint._needs import who_needs
from outlast.checkpoint._nodes import Nodes
from outlast.checkpoint._records import (
    Commit,
    Fault,
    FileEntry,
    Seen,
    Vote,
    check_file,
    check_pieces,
    crc_hex,
    seal,
    unseal_commit,
    unseal_vote,
)
from outlast.checkpoint._slots import Holding, commits, holdings
from outlast.checkpoint._store import Buffer
from outlast.checkpoint._wanted import Wanted
from outlast.errors import CorruptCheckpoint, IncompleteCheckpoint

_log = logging.getLogger("outlast.checkpoint")


@dataclass(frozen=True)
class MemorySave:
    """One committed save, as far as some node's memory has parts of it; equal on all ranks."""

    commit: Commit
    holders: dict[int, tuple[str, ...]]
    """By rank that saved: the nodes that have its part."""

    @property
    def key(self) -> tuple[str, int]:
        """Which save of which attempt."""
        return self.commit.epoch, self.commit.serial

    @property
    def missing(self) -> list[int]:
        """Ranks whose parts no node has."""
        return [rank for rank in range(self.commit.world_size) if rank not in self.holders]


@dataclass
class Taken:
    """How many bytes came from which tier; may be added to from several threads."""

    counts: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, tier: str, nbytes: int) -> None:
        """Count."""
        with self._lock:
            self.counts[tier] += nbytes


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
        nodes: who is where.
        rank: of this process.
        agreement: over all ranks.
        io: threads that verify.
    """

    def __init__(self, folder: Path, nodes: Nodes, rank: int, agreement: Agreement, io: ThreadPoolExecutor) -> None:
        self._folder = folder
        self._nodes = nodes
        self._rank = rank
        self._node = nodes.names[rank]
        self._peers = nodes.ranks_with(rank)
        self._agreement = agreement
        self._io = io
        self._local: dict[tuple[str, int], dict[int, Holding]] = {}

    @property
    def leads(self) -> bool:
        """Whether this rank speaks for its node."""
        return self._peers[0] == self._rank

    def saves(self) -> list[MemorySave]:
        """Committed saves of which there are parts in memory, newest first."""
        self._local = {}
        for holding in holdings(self._folder):
            vote = holding.placed.vote
            mine = self._local.setdefault((vote.epoch, vote.serial), {})
            if vote.rank not in mine or not holding.copied:
                mine[vote.rank] = holding
        told = ""
        if self.leads and self._local:
            records = [seal(commit).decode() for commit in commits(self._folder).values()]
            told = json.dumps(
                {"has": [[*key, sorted(ranks)] for key, ranks in self._local.items()], "commits": records}
            )
        known: dict[tuple[str, int], Commit] = {}
        holders: dict[tuple[str, int], dict[int, list[str]]] = {}
        for rank, text in enumerate(self._agreement.texts(told)):
            if not text:
                continue
            said = json.loads(text)
            for record in said["commits"]:
                commit = unseal_commit(record.encode())
                known.setdefault((commit.epoch, commit.serial), commit)
            for epoch, serial, ranks in said["has"]:
                for saved in ranks:
                    holders.setdefault((epoch, serial), {}).setdefault(saved, []).append(self._nodes.names[rank])
        found = [
            MemorySave(commit, {rank: tuple(names) for rank, names in sorted(holders.get(key, {}).items())})
            for key, commit in known.items()
            if key in holders
        ]
        return sorted(found, key=lambda save: (save.commit.step, save.commit.saved_at, save.key), reverse=True)

    def votes(self, save: MemorySave) -> dict[int, Vote]:
        """The votes of a save's parts that are in memory."""
        told = ""
        mine = self._local.get(save.key, {})
        if self.leads and mine:
            told = json.dumps({rank: seal(holding.placed.vote).decode() for rank, holding in mine.items()})
        found: dict[int, Vote] = {}
        for text in self._agreement.texts(told):
            for name, sealed in (json.loads(text) if text else {}).items():
                rank, data = int(name), sealed.encode()
                entry = save.commit.votes[rank]
                if crc_hex(data) == entry.crc32c:
                    found[rank] = unseal_vote(data, entry.path)
        return found

    def gather(
        self,
        save: MemorySave,
        votes: dict[int, Vote],
        same_ranks: bool,
        wanted: Wanted | None,
        taken: Taken,
        *,
        verify: bool,
    ) -> Gathered:
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
        faults = self._verify(lying, save) if verify else []
        texts = self._agreement.texts(json.dumps([[path, reason] for path, reason in faults]) if faults else "")
        bad = {
            (self._nodes.names[rank], path): reason
            for rank, text in enumerate(texts)
            for path, reason in (json.loads(text) if text else [])
        }
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
        mine = self._local.get(save.key, {}).values()
        copied = {path for holding in mine if holding.copied for path in holding.placed.places}
        return Gathered(lying, good, verify, sent, copied, bad, taken)

    def quarantine(self, save: MemorySave, gathered: Gathered) -> None:
        """See that copies with damage are never taken again. Not collective."""
        for holding in self._local.get(save.key, {}).values():
            if any((self._node, path) in gathered.bad for path in holding.placed.places):
                holding.quarantine()

    def discard(self, newer_than: int) -> None:
        """Remove what this node has of steps newer than the one gone back to. Not collective."""
        if not self.leads:
            return
        for path, commit in commits(self._folder).items():
            if commit.step > newer_than:
                path.unlink(missing_ok=True)
        for holding in list(holdings(self._folder)):
            if holding.placed.vote.step > newer_than:
                holding.remove()

    def _lying(self, save: MemorySave) -> Lying:
        return Lying(
            {
                entry.path: Span(holding.data, holding.placed.places[entry.path], entry.size_bytes)
                for holding in self._local.get(save.key, {}).values()
                for entry in holding.placed.vote.files
            }
        )

    def _verify(self, lying: Lying, save: MemorySave) -> list[tuple[str, str]]:
        """This rank's portion of what its node has."""
        entries = [entry for h in self._local.get(save.key, {}).values() for entry in h.placed.vote.files]
        entries.sort(key=lambda entry: (entry.size_bytes, entry.path))  # equal shares by dealing them out in turn
        mine = entries[self._peers.index(self._rank) :: len(self._peers)]

        def fault(entry: FileEntry) -> tuple[str, str] | None:
            try:
                lying.check(entry)
            except Fault as found:
                return entry.path, found.reason
            return None

        return [found for found in self._io.map(fault, mine) if found is not None]

    def _routes(
        self, save: MemorySave, votes: dict[int, Vote], same_ranks: bool, bad: dict[tuple[str, str], str]
    ) -> list[Route]:
        """The files that some rank's node lacks and another's has; the same list on all ranks."""
        names, routes = self._nodes.names, []
        for saved in sorted(votes):
            holders = save.holders.get(saved, ())
            for entry in votes[saved].files:
                good = [name for name in holders if (name, entry.path) not in bad]
                owner = parse_local(entry.path)
                needed = range(len(names)) if owner is None or not same_ranks else [owner]
                without = [rank for rank in needed if names[rank] not in good]
                if without and good:
                    able = self._nodes.ranks_with(names.index(good[0]))
                    routes.append(Route(entry, able[saved % len(able)], without))
        return routes

    def _send(self, routes: list[Route], lying: Lying) -> dict[str, Buffer]:
        """Have each file sent to its receivers; all ranks walk one list. What this rank got."""
        sent: dict[str, Buffer] = {}
        for route in routes:
            if not route.receivers:
                continue
            path, size_bytes = route.entry.path, route.entry.size_bytes
            data = torch.from_numpy(lying.view(path)) if self._rank == route.sender else None
            got = self._agreement.transfer(data, size_bytes, route.sender, route.receivers)
            if got is not None and self._rank in route.receivers:
                sent[path] = got.numpy()
        return sent


@dataclass(frozen=True)
class Gathered:
    """What one rank has at hand of a save that lies in memory."""

    lying: Lying
    """In this node's memory."""
    good: set[str]
    """What of it is not known to be damaged."""
    verified: bool
    """Whether that was looked at; else reading it is what finds damage, and raises :class:`Fault`."""
    sent: dict[str, Buffer]
    """From other nodes, not yet verified."""
    copied: set[str]
    """Files in this node's memory that are a partner's copies."""
    bad: dict[tuple[str, str], str]
    """By node and file: what is wrong with it; equal on all ranks."""
    taken: Taken
    given: set[str] = field(default_factory=set)
    """Files of which tensors were made: what is read again gets memory of its own."""

    def __call__(self, entry: FileEntry) -> Buffer | None:
        """A file's verified bytes, or None if memory has none."""
        again = entry.path in self.given
        view = None
        if entry.path in self.good:
            view = self.lying.view(entry.path)
            if not self.verified:
                check_file(entry, view.data)
            self.taken.add(PARTNER if entry.path in self.copied else MEMORY, entry.size_bytes)
        elif entry.path in self.sent:
            view = self.sent[entry.path]
            try:
                check_file(entry, view.data)
            except Fault as fault:
                _log.warning("%s was damaged on its way from another node's memory: %s", entry.path, fault.reason)
                return None
            self.taken.add(PARTNER, entry.size_bytes)
            if parse_local(entry.path) is None and parse_pack(entry.path) is None:
                del self.sent[entry.path]  # read once, into its tensor
        if view is None:
            return None
        self.given.add(entry.path)
        return view.copy() if again else view

    def fill(self, entry: FileEntry, out: Buffer) -> bool:
        """Have a chunk's elements where they belong, verified; False if memory has none."""
        if entry.path not in self.good:
            found = self(entry)
            if found is not None:
                np.copyto(out, found[: len(out)])
            return found is not None
        seen = Seen()
        try:
            check_pieces(entry, seen, self.lying.read_into(entry.path, out.data, seen))
        except Fault as fault:
            if not self.verified:
                raise
            _log.warning("%s was whole in this node's memory a moment ago: %s", entry.path, fault.reason)
            return False
        self.taken.add(PARTNER if entry.path in self.copied else MEMORY, entry.size_bytes)
        return True


def missing_fault(save: MemorySave) -> Fault:
    """Of a save that memory has in part."""
    ranks = ", ".join(map(str, save.missing))
    return Fault(IncompleteCheckpoint, "", f"the parts of ranks {ranks} are in no node's memory")


def bad_faults(gathered: Gathered) -> list[Fault]:
    """What was found damaged in memory, one a file and node."""
    return [
        Fault(CorruptCheckpoint, path, f"{reason} (in a node's memory)") for (_, path), reason in gathered.bad.items()
    ]
