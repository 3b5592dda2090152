"""``outlast status RUN``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from outlast.cli.verb import Verb
from outlast.config import Overrides

if TYPE_CHECKING:
    from rich.console import Console

    from outlast.diagnostics.report.status import RunStatus

MOST_RANKS = 64
"""Rows on a terminal, those with the oldest sign of life; the JSON has all."""


@dataclass(frozen=True, kw_only=True)
class Status(Verb):
    """Show what a run does now: each rank's step and phase, its last sign of life, nodes, and what is wrong."""

    run_dir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """The run's directory."""
    json: bool = False
    """Print JSON instead of tables."""

    def run(self, overrides: Overrides) -> int:
        """Look, and print; 0 whatever the run does."""
        from outlast.diagnostics.report.status import status_of

        status = status_of(self.run_dir)
        if self.json:
            print(json.dumps(status.to_json()))
            return 0
        from rich.console import Console

        _print(status, Console())
        return 0


def _print(status: RunStatus, console: Console) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from outlast.diagnostics.formatting import duration

    def age(seconds: float | None) -> str:
        return "never" if seconds is None else "now" if seconds < 1 else f"{duration(seconds)} ago"

    planned = f" of {status.steps_planned}" if status.steps_planned else ""
    restarts = f", start {status.generation + 1}, {status.restarts_left} restarts left" if status.generation else ""
    why = f": {status.reason}" if status.reason else ""
    style = "bold red" if status.state in ("failed", "no sign of life") else "bold"
    console.print(Text(f"{status.name}: {status.state}, step {status.step}{planned}{restarts}{why}", style=style))
    for words in status.verdicts:
        console.print(Text(words, style="bold red"))
        for story in status.stories:
            if story.verdict == words:
                for line in story.lines():
                    console.print(Text(f"    {line}"))
    for node in status.nodes:
        for words in node.conditions:
            console.print(Text(f"node {node.host}: {words}", style="yellow"))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("rank", "node", "step", "doing", "last sign of life"):
        table.add_column(name, justify="right" if name in ("rank", "step") else "left", overflow="fold")
    oldest = sorted(status.ranks, key=lambda one: -(one.age_s if one.age_s is not None else float("inf")))
    shown = sorted(oldest[:MOST_RANKS], key=lambda one: one.rank)
    for one in shown:
        row = (str(one.rank), one.host, str(one.step), one.doing, age(one.age_s))
        table.add_row(*(Text(cell) for cell in row), style="red" if one.state in ("stopped", "dead") else None)
    console.print(table)
    if len(shown) < len(status.ranks):
        rest = len(status.ranks) - len(shown)
        console.print(f"{rest} more ranks, heard of later than these; --json has all")
    elsewhere = sum(one.seen_in == "events" for one in status.ranks)
    if elsewhere and status.state == "running":
        console.print(Text(f"{elsewhere} ranks are not on this machine; of these, what their events tell", style="dim"))
