"""Each node verifies its copies of a save, and replaces damaged ones by others of its own where it has any."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from outlast.checkpoint.format.records import Fault, FileEntry
from outlast.checkpoint.restore.messages import DamagedCopy, FileOnNode, all_gather_messages
from outlast.checkpoint.restore.slot_files import SlotFiles
from outlast.checkpoint.restore.survey import SaveOnNodes, Survey


@dataclass
class Verification:
    """Which copies of a save are damaged; equal on all ranks."""

    damaged: list[DamagedCopy] = field(default_factory=list)
    lost: set[FileOnNode] = field(default_factory=set)
    """Files that have no good copy left on a node."""


def verify_copies(survey: Survey, save: SaveOnNodes, files: SlotFiles, *, whole: bool) -> Verification:
    """Verify what the nodes hold of a save; collective. Fails as :class:`Agreement` does.

    Args:
        survey: of the nodes.
        save: which.
        files: this node's copies; where one is damaged, the next is put in its place.
        whole: every byte; otherwise only that there are as many as the votes say, before memory is taken for them.
    """
    result = Verification()
    entries = {entry.path: entry for part in survey.parts(save) for entry in part.placed.vote.files}
    while True:
        found_here = _damaged_copies(survey, files.check if whole else files.check_room, files, entries.values())
        damaged = [copy for _, copy in all_gather_messages(survey.agreement, DamagedCopy, found_here)]
        if not damaged:
            return result
        result.damaged += damaged
        # The ranks of a node see the same damage and replace the same copies; the other nodes are told by its leader.
        replaced_here = {copy.path for copy in damaged if copy.node == survey.node and files.drop(copy.path)}
        own = [FileOnNode(survey.node, path) for path in sorted(replaced_here)] if survey.is_node_leader else []
        replaced = {file for _, file in all_gather_messages(survey.agreement, FileOnNode, own)}
        result.lost |= {FileOnNode(copy.node, copy.path) for copy in damaged} - replaced
        entries = {path: entries[path] for path in replaced_here}


def _damaged_copies(
    survey: Survey, check: Callable[[FileEntry], None], files: SlotFiles, entries: Iterable[FileEntry]
) -> list[DamagedCopy]:
    """What is damaged in this rank's share of its node's copies."""
    # The ranks of a node take turns in the order of size, so that their shares are about equal.
    by_size = sorted(entries, key=lambda entry: (entry.size_bytes, entry.path))
    share = by_size[survey.ranks_here.index(survey.rank) :: len(survey.ranks_here)]

    def damage(entry: FileEntry) -> DamagedCopy | None:
        try:
            check(entry)
        except Fault as fault:
            return DamagedCopy(survey.node, entry.path, files.tier(entry.path), fault.reason)
        return None

    return [copy for copy in survey.io.map(damage, share) if copy is not None]
