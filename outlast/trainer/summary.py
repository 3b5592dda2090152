"""A run's result in a few lines, from its report."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from outlast.diagnostics import Report
from outlast.diagnostics.report.summary import cause


def render_summary(report: Report, console: Console, report_path: Path) -> None:
    """Print the first and last loss, bytes on the wire, the time share of checkpoints, and the report's path."""
    first, last = report.loss.evaluated[0], report.loss.evaluated[-1]
    traffic, rows = report.traffic, report.checkpoints.rows
    committed = [row.step for row in rows if row.state == "committed" and row.tier == "storage"]
    in_memory = [row.step for row in rows if row.state == "committed" and row.tier == "memory"]
    failed = [row.step for row in rows if row.state == "failed"]
    lines = [
        ("steps", f"{report.facts.steps_done} in {report.facts.wall_s:.0f} s, {report.facts.restarts} restarts"),
        (
            "held-out loss",
            f"{first:.3f} at step {report.loss.eval_steps[0]}, {last:.3f} at step {report.loss.eval_steps[-1]}",
        ),
    ]
    if traffic.ratio is not None:
        lines.append(
            (
                "on the wire",
                f"{traffic.wire_bytes / 1e6:.1f} MB of gradients; dense: {traffic.dense_bytes / 1e6:.1f} MB "
                f"({traffic.ratio:.1f} × as much)",
            )
        )
    if rows:
        remark = f", {len(failed)} failed" if failed else ""
        newest = f", the newest of step {committed[-1]}" if committed else ""
        remark += f", {len(in_memory)} in memory" if in_memory else ""
        share = report.checkpoints.time_share
        lines.append(("checkpoints", f"{len(committed)} committed{newest}{remark}; {share:.2%} of the step time"))
    why = cause(report)
    lines += [("cause", why)] if why else []
    lines += [("stragglers", report.verdict), ("report", str(report_path))]
    console.print()
    for title, text in lines:
        console.print(f"{title:>14}  {text}", soft_wrap=True, markup=False, highlight=False)
