"""``outlast ckpt ls|show|verify``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial

from rich.console import Console
from rich.table import Table

from outlast.cli.ckpt.output import (
    Action,
    Url,
    escape,
    print_json,
    print_line,
    print_rows,
    rank_text,
    shape_text,
    size,
    time_text,
)
from outlast.cli.ckpt.progress import Verifying
from outlast.errors import CheckpointNotFound


@dataclass(frozen=True, kw_only=True)
class Ls(Action):
    """List the steps."""

    url: Url
    """The folder or fsspec URL of a run's checkpoints."""
    step: int | None = None
    """Only this one."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        """List them."""
        from outlast.checkpoint import tools

        steps = [info for info in tools.list_steps(self.url) if self.step is None or info.step == self.step]
        if not steps:
            raise _none_at(self.url)
        if self.json:
            print_json([dataclasses.asdict(info) for info in steps])
            return 0
        table = Table("step", "status", "ranks", "size", "saved", "remark", box=None)
        for info in steps:
            ranks = "" if info.world_size is None else str(info.world_size)
            amount = "" if info.size_bytes is None else size(info.size_bytes)
            table.add_row(str(info.step), info.status, ranks, amount, time_text(info.saved_at), escape(info.reason))
        Console().print(table)
        return 0


@dataclass(frozen=True, kw_only=True)
class Show(Action):
    """List one step's arrays."""

    url: Url
    """The folder or fsspec URL of a run's checkpoints."""
    step: int | None = None
    """The step; without it, the newest."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        """List them."""
        from outlast.checkpoint import tools

        step = tools.describe(self.url, self.step)
        if self.json:
            print_json(dataclasses.asdict(step))
            return 0
        console = Console()
        print_line(
            console, f"{step.url}: {step.world_size} ranks, {size(step.size_bytes)}, saved {time_text(step.saved_at)}"
        )
        rows = [
            (tensor.name, rank_text(tensor.rank), shape_text(tensor.shape), tensor.dtype, size(tensor.size_bytes))
            for tensor in step.tensors
        ]
        print_rows(console, ("tensor", "rank", "shape", "type", "size"), rows)
        return 0


@dataclass(frozen=True, kw_only=True)
class Verify(Action):
    """Check every byte against the checksums taken when it was saved. Exit status 1 if a step is damaged."""

    url: Url
    """The folder or fsspec URL of a run's checkpoints."""
    step: int | None = None
    """The step; without it, all."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        """Check them."""
        from outlast.checkpoint import tools

        if self.step is None:
            steps = [info.step for info in tools.list_steps(self.url) if info.status != "aside"]
        else:
            steps = [self.step]
        if not steps:
            raise _none_at(self.url)
        console = Console()
        results, rates = [], []
        with Verifying(console, json=self.json) as progress:
            for step in steps:
                progress.begin(step)
                results.append(tools.verify(self.url, step, partial(progress, step)))
                rates.append(progress.rate(results[-1].size_bytes))
        if self.json:
            print_json([dataclasses.asdict(result) for result in results])
        else:
            for result, rate in zip(results, rates, strict=True):
                verdict = result.not_judged or ("good" if result.ok else "DAMAGED")
                read = f"{result.files} files, {size(result.size_bytes)} {rate}"
                console.print(f"step {result.step}: {verdict}, {read}", soft_wrap=True)
                for problem in result.problems:
                    print_line(console, f"  {problem.file}: {problem.kind}: {problem.reason}")
        return 1 if any(result.problems for result in results) else 0


def _none_at(url: str) -> CheckpointNotFound:
    from outlast.checkpoint.tools.open_step import storage, where_steps_are

    with storage(url) as store:
        return CheckpointNotFound(f"no checkpoints at {store.url}", where_steps_are(store, "--step"))
