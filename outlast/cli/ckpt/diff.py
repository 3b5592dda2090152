"""``outlast ckpt diff|prune|memory|export|import``: what was found or done, as text or JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from datetime import datetime
from functools import partial
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from outlast.checkpoint import convert, tools
from outlast.cli.ckpt_args import Diff, Export, Import, Ls, Memory, Prune, Show, Verify
from outlast.cli.progress import Verifying, size
from outlast.errors import CheckpointNotFound, ConfigError


def diff(verb: Diff, console: Console) -> int:
    """Print how two steps differ; the exit status: 1 if they do.

    Raises:
        ConfigError: nothing tells two steps apart.
        CheckpointError: a step is not there, or damaged.
    """
    if verb.other is None and verb.other_step is None:
        raise ConfigError("there is nothing to compare with", "give a second URL, or --other-step, or both")
    found = tools.diff(verb.url, verb.url if verb.other is None else verb.other, verb.step, verb.other_step)
    if verb.json:
        print_json({"equal": found.equal, **_strict(dataclasses.asdict(found))})
        return 0 if found.equal else 1
    for letter, url, ranks in (("a", found.url_a, found.world_size_a), ("b", found.url_b, found.world_size_b)):
        _say(console, f"{letter}: {url}, {ranks} ranks")
    if found.tensors:
        name = Column("tensor", overflow="fold")
        table = Table(name, "rank", "differs in", "a", "b", "elements", "max |a-b|", "relative L2", box=None)
        for item in found.tensors:
            amounts = ("", "", "")
            if item.differing is not None and item.shape_a is not None:
                count = f"{item.differing} of {math.prod(item.shape_a)}"
                amounts = (count, f"{item.max_abs:.3g}", f"{item.relative_l2:.3g}")
            table.add_row(
                escape(item.name),
                _rank(item.rank),
                item.kind,
                _tensor(item.shape_a, item.dtype_a),
                _tensor(item.shape_b, item.dtype_b),
                *amounts,
            )
        console.print(table)
    if found.values:
        table = Table(Column("value", overflow="fold"), "rank", "differs in", "a", "b", box=None)
        for value in found.values:
            a = "" if value.kind == "only in b" else _short(value.a)
            b = "" if value.kind == "only in a" else _short(value.b)
            table.add_row(escape(value.name), _rank(value.rank), value.kind, escape(a), escape(b))
        console.print(table)
    same = f"{len(found.equal_tensors)} tensors and {len(found.equal_values)} values are equal"
    unlike = f"{len(found.tensors)} tensors and {len(found.values)} values differ"
    console.print(f"equal: all {same.removesuffix(' are equal')}" if found.equal else f"{unlike}, {same}")
    return 0 if found.equal else 1


def prune(verb: Prune, console: Console) -> int:
    """Remove old steps and print which, or which would go.

    Raises:
        ConfigError: less than one step would be kept.
        CheckpointError: there is no committed step that verifies, or something cannot be removed.
    """
    with Verifying(console, json=verb.json) as progress:
        found = tools.prune(verb.url, verb.keep_last, aside=verb.aside, dry_run=verb.dry_run, progress=progress)
    if verb.json:
        print_json({"size_bytes": found.size_bytes, **dataclasses.asdict(found)})
        return 0
    say = partial(_say, console)
    for bad in found.damaged:
        first = bad.problems[0]
        say(f"step {bad.step} is DAMAGED, so it and the newest step that verifies stay: {first.file}: {first.reason}")
    verb_done = "would be removed" if verb.dry_run else "removed"
    for item in found.removed:
        say(f"{verb_done}: {item.folder} ({item.kind}), {size(item.size_bytes)}")
    count = len(found.removed)
    freed = f"{size(found.size_bytes)} {'would be ' if verb.dry_run else ''}freed" if count else "nothing to remove"
    say(
        f"{freed}; committed steps {'that would be ' if verb.dry_run and count else ''}left: "
        f"{', '.join(map(str, found.kept))}"
    )
    return 0


def memory(verb: Memory, console: Console) -> int:
    """Print what lies in this node's memory, and give it back if that is asked for.

    Raises:
        CheckpointError: a run uses what is to be given back, or it cannot be read or removed.
    """
    found = tools.remove_memory(verb.url) if verb.remove else tools.list_memory(verb.url)
    if verb.json:
        print_json({"removed": verb.remove, **dataclasses.asdict(found)})
        return 0
    say = partial(_say, console)
    if not found.steps and not found.reserved_bytes:
        say(f"nothing in this node's memory for {found.url}")
        return 0
    if found.steps:
        table = Table("step", "attempt", "status", "of ranks", "own parts", "partner's parts", "size", box=None)
        for save in found.steps:
            table.add_row(
                str(save.step),
                escape(save.epoch),
                "committed" if save.committed else "uncommitted",
                str(save.world_size),
                _ranks(save.own_ranks),
                _ranks(save.partner_ranks),
                size(save.size_bytes),
            )
        console.print(table)
    if verb.remove:
        say(f"removed: {found.folder}, {size(found.reserved_bytes)}")
    else:
        use = "in use by a run" if found.in_use else "no run uses it; --remove gives it back"
        say(f"{found.folder}: {size(found.reserved_bytes)} in all, {use}")
    return 0


def export(verb: Export, console: Console) -> int:
    """Export and print what was written.

    Raises:
        OutlastError: it could not be done; nothing is left of it.
    """
    done = convert.export_step(verb.url, verb.target, verb.format, step=verb.step, part=verb.part, force=verb.force)
    if verb.json:
        print_json(dataclasses.asdict(done))
        return 0
    say = partial(_say, console)
    what = f"{done.tensors} tensors and {done.values} values"
    say(f"written: {done.target} ({done.format}): {what} of {done.url}, {size(done.size_bytes)}")
    for name in done.left_out:
        say(f"left out: {name}: {done.format} cannot hold an empty dictionary")
    return 0


def import_(verb: Import, console: Console) -> int:
    """Import and print what was saved.

    Raises:
        OutlastError: it could not be done; there is no such step then.
    """
    done = convert.import_step(verb.source, verb.url, verb.format, step=verb.step, part=verb.part)
    if verb.json:
        print_json(dataclasses.asdict(done))
        return 0
    what = f"{done.tensors} tensors and {done.values} values of {done.source}"
    _say(console, f"saved: step {done.step} at {done.url}: {what}, {size(done.size_bytes)}")
    return 0


def _say(console: Console, text: str) -> None:
    """A line as it stands, never wrapped: paths can be copied from it."""
    console.print(text, soft_wrap=True, markup=False, highlight=False)


def _rank(rank: int | None) -> str:
    return "all" if rank is None else str(rank)


def _ranks(ranks: tuple[int, ...]) -> str:
    """``0-3, 8``; none is a dash."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][1] == rank - 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) or "-"


def _tensor(shape: tuple[int, ...] | None, dtype: str | None) -> str:
    return "" if shape is None else f"{'×'.join(map(str, shape)) or 'scalar'} {dtype}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _strict(value: Any) -> Any:
    """With NaN and infinities, which JSON does not have, as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    return [_strict(item) for item in value] if isinstance(value, (list, tuple)) else value


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
    found = [info for info in tools.list_steps(url) if step is None or info.step == step]
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
    found = tools.describe(url, step)
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
    steps = [step] if step is not None else [i.step for i in tools.list_steps(url) if i.status != "aside"]
    if not steps:
        raise CheckpointNotFound(f"no checkpoints at {url}", "give the folder that holds step_… folders")
    results, rates = [], []
    with Verifying(console, json=as_json) as progress:
        for number in steps:
            progress.begin(number)
            results.append(tools.verify(url, number, partial(progress, number)))
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
