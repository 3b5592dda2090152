"""Prints the report on a terminal, or to a file 80 columns wide."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from outlast.diagnostics import formatting as fmt
from outlast.diagnostics.report import summary
from outlast.diagnostics.report.incidents import names_of, worst_first
from outlast.diagnostics.report.model import Report

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

MOST_RANKS = 10
MOST_INCIDENTS = 30
MOST_CHECKPOINTS = 8
MOST_NUMERICS = 8
BAR_CHARS = 28
STATUS = {"bad": "red", "warn": "yellow", "good": "green"}


def render_terminal(report: Report, console: Console) -> None:
    """Print verdict, numbers, where the time went, ranks by lateness, incidents, checkpoints, and missing events."""
    from rich.markup import escape
    from rich.text import Text

    facts = report.facts
    hosts = facts.hosts
    why = summary.cause(report)
    if why:
        console.print(Text(why, style="bold red"))
    console.print(Text(report.name, style="bold"))
    what = [
        f"{facts.world_size} rank{'s' if facts.world_size != 1 else ''} on {', '.join(hosts) or 'unknown hosts'}",
        facts.device,
        f"{fmt.count(facts.parameters)} parameters" if facts.parameters else "",
        facts.comm,
    ]
    console.print(Text(" · ".join(one for one in what if one), style="dim"))
    console.print(escape(summary.outcome(report)))
    has_straggler = any(row.straggler for row in report.stragglers)
    console.print(Text(report.verdict, style="bold red" if has_straggler else "bold"))
    console.print()
    parts = (_numbers(report), _goodput(report, console), _split(report, console))
    for table in (*parts, _ranks(report), _incidents(report), _numerics(report), _checkpoints(report)):
        if table is not None:
            console.print(table)
            console.print()
    for line in report.missing:
        console.print(Text(f"missing: {line}", style="yellow"))


def _table(title: str, *columns: str, right: tuple[int, ...] = ()) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index in right else "left", overflow="fold")
    return table


def _numbers(report: Report) -> Table | None:
    facts, traffic = report.facts, report.traffic
    table = _table("Numbers", "", "")
    table.show_header, table.box = False, None
    if not report.loss.steps:
        return None
    table.add_row("training loss", fmt.first_and_last(report.loss.train))
    if report.loss.evaluated:
        table.add_row("held-out loss", fmt.first_and_last(report.loss.evaluated))
    for name, norms in (("gradient norm", report.loss.grad_norm), ("update norm", report.loss.update_norm)):
        if any(map(math.isfinite, norms)):
            table.add_row(name, fmt.first_and_last(norms))
    if traffic.ratio is not None:
        table.add_row(
            "gradients on the wire",
            f"{fmt.size(traffic.wire_bytes)}; dense {fmt.size(traffic.dense_bytes)}, {traffic.ratio:.1f} × as much",
        )
    table.add_row(
        "compression and decompression", f"{fmt.share(traffic.codec_share)} of the step time, overlapped or not"
    )
    if traffic.alpha is not None and traffic.residual is not None:
        table.add_row("error feedback", summary.error_feedback(traffic.alpha, traffic.residual))
    table.add_row("checkpoints", f"{fmt.share(report.checkpoints.time_share)} of the step time")
    goodput = report.goodput.shares()["useful"]
    table.add_row("goodput", f"{fmt.share(goodput)} of {fmt.duration(facts.wall_s)} wall time was useful")
    if facts.useful_s > 0 and facts.tokens:  # a program need not tell of them
        table.add_row("tokens", f"{fmt.count(facts.tokens)}, {fmt.count(facts.tokens / facts.useful_s)} per second")
    return table


def _goodput(report: Report, console: Console) -> Table | None:
    parts = summary.wall_time(report.goodput)
    if not parts:
        return None
    block = "#" if console.options.ascii_only else "█"
    title = f"Where the wall time went ({fmt.duration(report.goodput.wall_s)})"
    table = _table(title, "", "share", "time", "", right=(1, 2))
    for name, seconds, part in parts:
        table.add_row(name, fmt.share(part), fmt.duration(seconds), block * round(part * BAR_CHARS))
    return table


def _split(report: Report, console: Console) -> Table | None:
    if not report.split.steps:
        return None
    block = "#" if console.options.ascii_only else "█"
    title = f"Where a step's time goes (median step {fmt.duration(report.facts.median_step_s)})"
    table = _table(title, "", "share", "mean", "", right=(1, 2))
    totals = report.split.told_apart_s()
    for name, part in report.split.shares_told_apart().items():
        mean_s = totals[name] / len(report.split.steps)
        title = "waiting for late ranks" if name == "waiting" else name
        table.add_row(title, fmt.share(part), fmt.duration(mean_s), block * round(part * BAR_CHARS))
    table.caption = summary.waiting(report.split)
    return table


def _ranks(report: Report) -> Table | None:
    from rich.markup import escape

    if not report.stragglers:
        return None
    table = _table("Ranks by lateness", "rank", "host", "median lateness", "p90", "latest in", "steps", "verdict")
    for index in (0, 2, 3, 4, 5):
        table.columns[index].justify = "right"
    for row in report.stragglers[:MOST_RANKS]:
        verdict = f"[bold red]straggler[/], steps {fmt.share(row.slowdown_share)} longer" if row.straggler else "fine"
        if row.straggler and row.longer:
            part, more_ms = row.longer[0]
            verdict += f" ({part} +{more_ms:.0f} ms)"
        if row.straggler and row.cause:
            verdict += f": {escape(row.cause)}"
        slow = summary.slow_in(report.phases_of(row))
        if slow:
            verdict = f"{verdict}, {slow}" if row.straggler else f"[yellow]{slow}[/]"
        table.add_row(
            str(row.rank),
            escape(row.host),
            f"{row.median_lateness_ms:.1f} ms",
            f"{row.p90_lateness_ms:.1f} ms",
            fmt.share(row.latest_share),
            str(row.steps),
            verdict,
        )
    if len(report.stragglers) > MOST_RANKS:
        table.caption = f"and {len(report.stragglers) - MOST_RANKS} more that are less late"
    return table


def _incidents(report: Report) -> Table | None:
    from rich.markup import escape

    if not report.incidents:
        return None
    table = _table("Incidents", "after", "what happened", right=(0,))
    for one in worst_first(report.incidents)[:MOST_INCIDENTS]:
        colour = STATUS[one.severity]
        table.add_row(fmt.duration(one.at_s), f"[{colour}]{escape(one.title)}[/]\n{escape(one.detail)}")
    if len(report.incidents) > MOST_INCIDENTS:
        table.caption = f"and {len(report.incidents) - MOST_INCIDENTS} more"
    return table


def _numerics(report: Report) -> Table | None:
    from rich.markup import escape

    if not report.numerics:
        return None
    table = _table("Numerics", "step", "what was seen", right=(0,))
    for row in report.numerics[-MOST_NUMERICS:]:
        colour = STATUS[row.severity]
        table.add_row(str(row.step), f"[{colour}]{escape(row.told)}[/]\n{escape(f'told by {names_of(row.ranks)}')}")
    if len(report.numerics) > MOST_NUMERICS:
        table.caption = f"the newest {MOST_NUMERICS} of {len(report.numerics)}"
    return table


def _checkpoints(report: Report) -> Table | None:
    rows = report.checkpoints.rows
    if not rows:
        return None
    heads = ("step", "tier", "state", "ranks", "size", "blocked", "durable after")
    table = _table("Checkpoints", *heads, right=(0, 3, 4, 5, 6))
    for row in rows[-MOST_CHECKPOINTS:]:
        colour = {"committed": "green", "copied": "green", "failed": "red"}.get(row.state, "yellow")
        table.add_row(
            str(row.step),
            row.tier,
            f"[{colour}]{row.state}[/]",
            str(row.ranks),
            fmt.size(row.size_bytes),
            fmt.duration(row.blocked_s),
            fmt.duration(row.durable_s),
        )
    if len(rows) > MOST_CHECKPOINTS:
        table.caption = f"the newest {MOST_CHECKPOINTS} of {len(rows)}"
    return table
