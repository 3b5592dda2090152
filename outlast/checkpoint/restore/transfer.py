"""A save's files, gathered on the ranks that need them: from their own node, and from nodes that have what it lacks."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from outlast.checkpoint.format.names import NODE, parse_local
from outlast.checkpoint.format.records import Fault, FileEntry, Vote
from outlast.checkpoint.memory.pages import Buffer
from outlast.checkpoint.restore.chunk_needs import who_needs
from outlast.checkpoint.restore.copies import AvailableCopies
from outlast.checkpoint.restore.messages import FileOnNode
from outlast.checkpoint.restore.slot_files import SlotFiles
from outlast.checkpoint.restore.survey import SaveOnNodes, Survey
from outlast.checkpoint.restore.verify_copies import verify_copies
from outlast.checkpoint.state.boxes import Box


@dataclass(frozen=True)
class Route:
    """A file's way from a rank whose node has it to the ranks that need it and whose nodes lack it."""

    entry: FileEntry
    sender: int
    receivers: tuple[int, ...]


def gather_copies(survey: Survey, save: SaveOnNodes, boxes: Mapping[str, Box], *, verify: bool) -> AvailableCopies:
    """Verify this node's copies of a save, and receive what its ranks need and it lacks from other nodes; collective.

    Every byte is verified: a node's copies by the ranks of the node, in equal shares; what is sent, by its receiver.
    Fails as :class:`Agreement` does. No buffer is shared with other ranks once this returns.

    Args:
        survey: of the nodes.
        save: which.
        boxes: this rank's parts of DTensors, by path; chunks outside of them are not sent to it.
        verify: False leaves this node's copies to be verified by whoever reads them, but for their sizes.
    """
    votes = survey.votes(save)
    files = survey.files(save)
    verification = verify_copies(survey, save, files, whole=verify)
    good = {path for path in files.spans if FileOnNode(survey.node, path) not in verification.lost}
    routes = _routes(survey, save, votes, verification.lost)
    # Documents first: they say which chunks hold a part of a tensor.
    received = _send(survey, [route for route in routes if not route.entry.chunk], files)
    chunks = [route for route in routes if route.entry.chunk]
    if chunks:
        documents = {path: files.view(path) for path in good if path.endswith(NODE)} if boxes else {}
        needs = who_needs([route.entry.path for route in chunks], boxes, documents | received, survey.agreement)
        received |= _send(survey, [_narrowed(route, needs[route.entry.path]) for route in chunks], files)
    return AvailableCopies(files, good, verify, received, verification.damaged, votes)


def _routes(survey: Survey, save: SaveOnNodes, votes: dict[int, Vote], lost: set[FileOnNode]) -> list[Route]:
    """The files that some rank's node lacks and another has; the same list on all ranks."""
    names, routes = survey.nodes.names, []
    local_state_to_its_rank = save.commit.world_size == len(names)
    for saved_by in sorted(votes):
        in_memory = save.in_memory.get(saved_by, ())
        holders = sorted(save.holders.get(saved_by, ()), key=lambda name: name not in in_memory)
        for entry in votes[saved_by].files:
            good = [name for name in holders if FileOnNode(name, entry.path) not in lost]
            owner = parse_local(entry.path)
            needed_by = range(len(names)) if owner is None or not local_state_to_its_rank else [owner]
            receivers = tuple(rank for rank in needed_by if names[rank] not in good)
            if receivers and good:
                senders = survey.nodes.ranks_with(names.index(good[0]))
                routes.append(Route(entry, senders[saved_by % len(senders)], receivers))
    return routes


def _narrowed(route: Route, needed_by: Collection[int]) -> Route:
    return replace(route, receivers=tuple(rank for rank in route.receivers if rank in needed_by))


def _send(survey: Survey, routes: Sequence[Route], files: SlotFiles) -> dict[str, Buffer]:
    """Send each file to its receivers; all ranks walk the same list. Returns what this rank received, by path."""
    received: dict[str, Buffer] = {}
    for route in routes:
        if not route.receivers:
            continue
        data = torch.from_numpy(_payload(files, route.entry)) if survey.rank == route.sender else None
        copy = survey.agreement.transfer(data, route.entry.size_bytes, route.sender, route.receivers)
        if copy is not None and survey.rank in route.receivers:
            received[route.entry.path] = copy.numpy()
    return received


def _payload(files: SlotFiles, entry: FileEntry) -> Buffer:
    """As many bytes of a file as its receivers wait for; they notice if these are not the right ones."""
    try:
        data = files.view(entry.path)
    except Fault:
        data = np.empty(0, np.uint8)
    return data if len(data) == entry.size_bytes else np.zeros(entry.size_bytes, np.uint8)
