"""``outlast ckpt ls|show|verify``: what the checkpoint room tells, as tables or JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from datetime import datetime
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from outlast import checkpoint
from outlast.ckpt_progress import Verifying, size
from outlast.ckpt_verbs import Ls, Show, Verify
from outlast.errors import CheckpointNotFound


def show(verb: Ls | Show | Verify, console: Console) -> int:
    """Print what is asked for; the exit status: 1 if a step does not verify.

    Raises:
        CheckpointError: there is no checkpoint at the URL, or its metadata is damaged.
    """
    actions: dict[type, Callable[[str, int | None, bool, Console], int]] = {Ls: _ls, Show: _show, Verify: _verify}
    return actions[type(verb)](verb.url, verb.step, verb.json, console)


def print_json(value: Any) -> None:
    """As text for programs."""
    print(json.dumps(value, indent=1))


def _when(t: float | None) -> str:
    return datetime.fromtimestamp(t).isoformat(" ", "seconds") if t is not None else ""


def _ls(url: str, step: int | None, as_json: bool, console: Console) -> int:
    found = [info for info in checkpoint.list_steps(url) if step is None or info.step == step]
    if not found:
        raise CheckpointNotFound(f"no checkpoints at {url}", "give the folder that holds step_… folders")
    if as_json:
        print_json([dataclasses.asdict(info) for info in found])
        return 0
    table = Table("step", "status", "ranks", "size", "saved", "remark", box=None)
    for info in found:
        ranks = "" if info.world_size is None else str(info.world_size)
        amount = "" if info.size_bytes is None else size(info.size_bytes)
        table.add_row(str(info.step), info.status, ranks, amount, _when(info.saved_at), info.reason)
    console.print(table)
    return 0


def _show(url: str, step: int | None, as_json: bool, console: Console) -> int:
    found = checkpoint.describe(url, step)
    if as_json:
        print_json(dataclasses.asdict(found))
        return 0
    console.print(f"{found.url}: {found.world_size} ranks, {size(found.size_bytes)}, saved {_when(found.saved_at)}")
    table = Table(Column("tensor", overflow="fold"), "rank", "shape", "type", "size", box=None)
    for tensor in found.tensors:
        rank = "all" if tensor.rank is None else str(tensor.rank)
        table.add_row(
            tensor.name, rank, "×".join(map(str, tensor.shape)) or "scalar", tensor.dtype, size(tensor.size_bytes)
        )
    console.print(table)
    return 0


def _verify(url: str, step: int | None, as_json: bool, console: Console) -> int:
    steps = [step] if step is not None else [i.step for i in checkpoint.list_steps(url) if i.status != "aside"]
    if not steps:
        raise CheckpointNotFound(f"no checkpoints at {url}", "give the folder that holds step_… folders")
    results, rates = [], []
    with Verifying(console, json=as_json) as progress:
        for number in steps:
            progress.begin(number)
            results.append(checkpoint.verify(url, number, partial(progress, number)))
            rates.append(progress.rate(results[-1].size_bytes))
    if as_json:
        print_json([dataclasses.asdict(result) for result in results])
    else:
        for result, rate in zip(results, rates, strict=True):
            verdict = "good" if result.ok else "DAMAGED"
            read = f"{result.files} files, {size(result.size_bytes)} {rate}"
            console.print(f"step {result.step}: {verdict}, {read}", soft_wrap=True)
            for problem in result.problems:
                console.print(f"  {problem.file}: {problem.kind}: {problem.reason}", soft_wrap=True, markup=False)
    return 1 if any(result.problems for result in results) else 0
