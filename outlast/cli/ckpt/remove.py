"""``outlast ckpt prune|memory``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial

from rich.console import Console
from rich.table import Table

from outlast.cli.ckpt.output import Action, Url, escape, print_json, print_line, rank_ranges, size
from outlast.cli.ckpt.progress import Verifying


@dataclass(frozen=True, kw_only=True)
class Prune(Action):
    """Remove old steps, but never the newest one that verifies."""

    url: Url
    """The folder or fsspec URL of a run's checkpoints."""
    keep_last: int
    """How many committed steps to keep, at least 1."""
    aside: bool = False
    """Also remove incomplete saves and what was kept as step_….aside-N. Not while a run saves: its save looks so."""
    dry_run: bool = False
    """Print what would be removed, and remove nothing."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        """Remove them."""
        from outlast.checkpoint import tools

        console = Console()
        with Verifying(console, json=self.json) as progress:
            pruned = tools.prune(self.url, self.keep_last, aside=self.aside, dry_run=self.dry_run, progress=progress)
        if self.json:
            print_json({"size_bytes": pruned.size_bytes, **dataclasses.asdict(pruned)})
            return 0
        say = partial(print_line, console)
        for bad in pruned.damaged:
            first = bad.problems[0]
            say(
                f"step {bad.step} is DAMAGED, so it and the newest step that verifies stay: "
                f"{first.file}: {first.reason}"
            )
        removed = "would be removed" if self.dry_run else "removed"
        for item in pruned.removed:
            say(f"{removed}: {item.folder} ({item.kind}), {size(item.size_bytes)}")
        count = len(pruned.removed)
        freed = (
            f"{size(pruned.size_bytes)} {'would be ' if self.dry_run else ''}freed" if count else "nothing to remove"
        )
        left = "that would be left" if self.dry_run and count else "left"
        say(f"{freed}; committed steps {left}: {', '.join(map(str, pruned.kept))}")
        return 0


@dataclass(frozen=True, kw_only=True)
class Memory(Action):
    """List the checkpoints of a run in this node's shared memory; they may be newer than those in storage."""

    url: Url
    """The folder or fsspec URL of a run's checkpoints; it need not exist."""
    remove: bool = False
    """Free it, on this node; refused while a run uses it."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        """List them, or free the memory."""
        from outlast.checkpoint import tools

        memory = tools.remove_memory(self.url) if self.remove else tools.list_memory(self.url)
        if self.json:
            print_json({"removed": self.remove, **dataclasses.asdict(memory)})
            return 0
        console = Console()
        if not memory.steps and not memory.reserved_bytes:
            print_line(console, f"nothing in this node's memory for {memory.url}")
            return 0
        if memory.steps:
            table = Table("step", "attempt", "status", "of ranks", "own parts", "partner's parts", "size", box=None)
            for save in memory.steps:
                table.add_row(
                    str(save.step),
                    escape(save.epoch),
                    "committed" if save.committed else "uncommitted",
                    str(save.world_size),
                    rank_ranges(save.own_ranks),
                    rank_ranges(save.partner_ranks),
                    size(save.size_bytes),
                )
            console.print(table)
        if self.remove:
            print_line(console, f"removed: {memory.folder}, {size(memory.reserved_bytes)}")
        else:
            use = "in use by a run" if memory.in_use else "no run uses it; --remove frees it"
            print_line(console, f"{memory.folder}: {size(memory.reserved_bytes)} in all, {use}")
        return 0
