"""Renders the report as one self-contained HTML file: style, script and data are inline, and nothing is fetched."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import Any

import numpy as np

from outlast.diagnostics import formatting as fmt
from outlast.diagnostics.config import DiagnosticsConfig
from outlast.diagnostics.report import summary
from outlast.diagnostics.report.bins import binned, bins_of, edges_of, rounded
from outlast.diagnostics.report.heat import heat_data
from outlast.diagnostics.report.incidents import names_of, worst_first
from outlast.diagnostics.report.model import Report

MOST_LOSS_BINS = 600
MOST_SPLIT_BINS = 160
MOST_ROWS = 200
NUMERICS = {
    "not_finite": "not finite",
    "numerics_spike": "spike",
    "replicas_different": "replicas",
    "numerics_drift": "drift",
}
STATES = {"committed": "good", "copied": "good", "failed": "bad", "written": "warn"}


def render_html(report: Report) -> str:
    """The report as a complete HTML document."""
    config = report.thresholds
    first, rest = summary.headline(report)
    has_straggler = any(row.straggler for row in report.stragglers)
    judged = any(row.steps >= config.straggler_min_steps for row in report.stragglers)
    assets = files("outlast.diagnostics.report") / "assets"
    parts = {
        "title": escape(f"{report.name} – outlast report"),
        "css": (assets / "report.css").read_text(encoding="utf-8"),
        "js": (assets / "report.js").read_text(encoding="utf-8"),
        "data": _script_json(_data(report)),
        "name": escape(report.name),
        "chips": "".join(f"<li>{escape(chip)}</li>" for chip in _chips(report)),
        "verdict_class": "bad" if has_straggler or summary.cause(report) else "good" if judged else "",
        "headline": escape(first),
        "evidence": escape(rest),
        "course": escape(summary.outcome(report)),
        "tiles": "".join(_tile(*tile) for tile in _tiles(report)),
        "missing": _missing(report),
        "heat_label": escape(f"Heat map of lateness, {len(report.lateness.ranks)} ranks. {report.verdict}"),
        "ranking": _ranking(report),
        "scene": _scene(report),
        "loss_label": escape(
            f"Training loss {fmt.first_and_last(report.loss.train)}, "
            f"held-out loss {fmt.first_and_last(report.loss.evaluated)}"
        ),
        "split_label": escape(
            "Shares of the step time: "
            + ", ".join(f"{name} {fmt.share(part)}" for name, part in report.split.shares_told_apart().items())
        ),
        "waited_for": escape(f"{told}." if (told := summary.waiting(report.split)) else ""),
        "goodput": _goodput(report),
        "time_label": escape(f"Timeline of {len(report.facts.starts)} attempts and {len(report.incidents)} incidents"),
        "incidents": _incidents(report),
        "numerics": _numerics(report),
        "checkpoints": _checkpoints(report),
        "facts": _facts(report),
        "rule": escape(_rule(config)),
    }
    template = (assets / "report.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _rule(config: DiagnosticsConfig) -> str:
    return (
        f"{config.straggler_min_s * 1e3:g} ms and {fmt.share(config.straggler_share)} of a step behind its median "
        f"peer, the latest in {fmt.share(config.straggler_latest_share)} of at least "
        f"{config.straggler_min_steps} steps, and late by {config.straggler_noise:g} × its own noise and by "
        f"{config.straggler_sigmas:g} standard errors"
    )


def _script_json(value: Any) -> str:
    """JSON that cannot end the script element that contains it."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"), ensure_ascii=True)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _data(report: Report) -> dict[str, Any]:
    """The data that the script draws, in as many bins as a screen can show."""
    loss, split = report.loss, report.split
    loss_edges, split_edges = edges_of(len(loss.steps), MOST_LOSS_BINS), edges_of(len(split.steps), MOST_SPLIT_BINS)
    starts, shares = report.facts.starts, split.shares_told_apart()
    transfer_s = np.maximum(np.asarray(split.communication_s) - np.asarray(split.waiting_s), 0.0)
    return {
        "restart_steps": sorted({one.first_step for one in report.facts.starts[1:] if one.first_step is not None}),
        "heat": heat_data(report),
        "scene": None if report.scene is None else dataclasses.asdict(report.scene),
        "loss": {
            "bins": bins_of(loss.steps, loss_edges),
            "train": rounded(binned(np.asarray(loss.train), loss_edges, np.mean), 5),
            "eval_steps": loss.eval_steps,
            "evaluated": rounded(loss.evaluated, 5),
        },
        "split": {
            "bins": bins_of(split.steps, split_edges),
            "shares": {name: fmt.share(part) for name, part in shares.items()},
            **{
                name: rounded(binned(np.asarray(values), split_edges, np.mean), 6)
                for name, values in (
                    ("compute", split.compute_s),
                    ("data", split.data_s),
                    ("transfer", transfer_s),
                    ("waiting", split.waiting_s),
                    ("checkpoint", split.checkpoint_s),
                )
            },
        },
        "time": {
            "wall_s": max(0.0, *(one.ended_s for one in starts), *(one.at_s for one in report.incidents), 0.0),
            "starts": [
                {
                    "attempt": one.attempt,
                    "generation": one.generation,
                    "world_size": one.world_size,
                    "launched_s": one.launched_s,
                    "training_s": one.training_s,
                    "ended_s": one.ended_s,
                    "lost_until_s": lost,
                    "first_step": one.first_step,
                    "last_step": one.last_step,
                }
                for one, lost in zip(starts, _lost_until_s(report), strict=True)
            ],
            "incidents": [
                {"at_s": one.at_s, "severity": one.severity, "title": one.title, "detail": one.detail}
                for one in report.incidents[:MOST_ROWS]
            ],
        },
    }


def _lost_until_s(report: Report) -> list[float | None]:
    """When the failure of each start was noticed, if it failed."""
    ends = [one.at_s for one in report.incidents if one.kind == "workers_failed"]
    starts = report.facts.starts
    found: list[float | None] = []
    for start, after in itertools.zip_longest(starts, starts[1:]):
        until = after.began_s if after is not None else math.inf
        found.append(min((end for end in ends if start.ended_s < end <= until), default=None))
    return found


def _chips(report: Report) -> list[str]:
    facts = report.facts
    hosts = facts.hosts
    plural = "s" if facts.world_size != 1 else ""
    chips = ["finished" if facts.finished else "not finished"]
    chips.append(f"{facts.world_size} rank{plural} on {len(hosts)} host{'s' if len(hosts) != 1 else ''}")
    chips += [facts.device, facts.comm]
    chips.append(f"{fmt.count(facts.parameters)} parameters" if facts.parameters else "")
    chips.append(fmt.date(facts.began_t))
    return [chip for chip in chips if chip]


def _tiles(report: Report) -> list[tuple[str, str, str]]:
    facts, loss, traffic = report.facts, report.loss, report.traffic
    curve, name = (loss.evaluated, "Held-out loss") if loss.evaluated else (loss.train, "Training loss")
    goodput = report.goodput.shares()["useful"]
    blocked = report.split.totals_s()["checkpoint"]
    speed = f"{fmt.count(facts.tokens / facts.useful_s)} tokens/s" if facts.useful_s > 0 and facts.tokens else ""
    wire = f"{fmt.size(traffic.wire_bytes)} sent; dense {fmt.size(traffic.dense_bytes)}"
    redone = f"{facts.steps_redone} step{'s' if facts.steps_redone != 1 else ''} redone" if facts.steps_redone else ""
    return [
        (
            name,
            fmt.number(curve[-1]) if curve else fmt.UNKNOWN,
            f"from {fmt.number(curve[0])}" if curve else "",
        ),
        ("Median step", fmt.duration(facts.median_step_s) if facts.steps_done else fmt.UNKNOWN, speed),
        ("Bytes on the wire", f"{traffic.ratio:.1f} × less" if traffic.ratio is not None else fmt.UNKNOWN, wire),
        (
            "Checkpoint share",
            fmt.share(report.checkpoints.time_share),
            f"{fmt.duration(blocked)} blocked",
        ),
        ("Goodput", fmt.share(goodput), f"of {fmt.duration(facts.wall_s)} was useful"),
        ("Restarts", str(facts.restarts), redone),
    ]


def _tile(name: str, value: str, more: str) -> str:
    return (
        f'<div class="tile"><div class="name">{escape(name)}</div><div class="value">{escape(value)}</div>'
        f'<div class="more">{escape(more)}</div></div>'
    )


def _scene(report: Report) -> str:
    scene = report.scene
    if scene is None:
        return ""
    unseen = scene.waiting - (len(scene.ranks) - 1)
    more = f" {unseen} more waited, and are not shown." if unseen > 0 else ""
    label = f"Timeline around the worst incident: {scene.title}, {scene.waiting} ranks waited for it"
    return (
        f'<section class="card" id="card-scene"><div class="head"><h2>The worst: {escape(scene.title)}</h2>'
        f'<div class="legend" id="scene-legend"></div></div><p class="note">An arrow leads from where a rank began to '
        f"wait to where it was held up. Times are by each rank&rsquo;s node, corrected where clocks are known to be "
        f'apart.{escape(more)}</p><div class="chart" id="scene" role="img" aria-label="{escape(label)}"></div>'
        f"</section>"
    )


def _missing(report: Report) -> str:
    if not report.missing:
        return ""
    items = "".join(f"<li>{escape(one)}</li>" for one in report.missing)
    return f'<section class="card missing"><h2>Missing events</h2><ul>{items}</ul></section>'


def _table(heads: Sequence[tuple[str, str]], rows: Sequence[str], caption: str = "") -> str:
    head = "".join(f'<th scope="col" class="{kind}">{escape(name)}</th>' for name, kind in heads)
    more = f'<p class="quiet">{escape(caption)}</p>' if caption else ""
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>{more}"
    )


def _ranking(report: Report) -> str:
    if not report.stragglers:
        return ""
    most_ms = max(10.0, *(row.median_lateness_ms for row in report.stragglers))
    rows = []
    for row in report.stragglers[:MOST_ROWS]:
        slow = summary.slow_in(report.phases_of(row))
        kind, word = ("bad", "straggler") if row.straggler else ("warn", slow) if slow else ("none", "fine")
        badge = f'<span class="badge {kind}">{escape(word)}</span>'
        slower = f"+{fmt.share(row.slowdown_share)}" if row.straggler else fmt.UNKNOWN
        width = round(100 * row.median_lateness_ms / most_ms)
        evidence = (
            row.evidence
            if row.straggler
            else f"{fmt.signed(row.behind_typical_ms)} ms behind its median peer, noise {row.noise_ms:.1f} ms, "
            f"{row.steps} steps"
        )
        rows.append(
            f'<tr class="{"guilty" if row.straggler else ""}"><td class="name">rank {row.rank}</td>'
            f'<td class="name">{escape(row.host)}</td>'
            f'<td>{badge}</td><td class="n">{row.median_lateness_ms:.1f} ms</td>'
            f'<td class="barcell"><span class="bar" style="width:{width}px"></span></td>'
            f'<td class="n">{row.p90_lateness_ms:.1f} ms</td><td class="n">{fmt.share(row.latest_share)}</td>'
            f'<td class="n">{slower}</td><td class="evidence">{escape(evidence)}</td></tr>'
        )
    hidden = len(report.stragglers) - MOST_ROWS
    heads = [("rank", ""), ("host", ""), ("verdict", ""), ("median lateness", "n"), ("", ""), ("p90", "n")]
    heads += [("latest in", "n"), ("steps longer", "n"), ("evidence", "")]
    return _table(heads, rows, f"and {hidden} more that are less late" if hidden > 0 else "")


def _incidents(report: Report) -> str:
    if not report.incidents:
        return '<p class="quiet">No failures, restarts, stalls, slow phases or rejected checkpoints.</p>'
    items = [
        f'<li><span class="when">{fmt.duration(one.at_s)}</span><span class="mark {one.severity}"></span>'
        f'<div><div>{escape(one.title)}</div><div class="detail">{escape(one.detail)}</div></div></li>'
        for one in worst_first(report.incidents)[:MOST_ROWS]
    ]
    hidden = len(report.incidents) - MOST_ROWS
    more = f'<p class="quiet">and {hidden} more</p>' if hidden > 0 else ""
    return f'<ol class="story">{"".join(items)}</ol>{more}'


def _numerics(report: Report) -> str:
    if not report.numerics:
        return ""
    rows = [
        f'<tr><td class="n">{row.step}</td><td><span class="badge {row.severity}">{escape(NUMERICS[row.kind])}</span>'
        f'</td><td class="evidence">{escape(row.told)}</td><td class="name">{escape(names_of(row.ranks))}</td></tr>'
        for row in reversed(report.numerics[-MOST_ROWS:])
    ]
    hidden = len(report.numerics) - MOST_ROWS
    heads = [("step", "n"), ("what", ""), ("seen", ""), ("told by", "")]
    table = _table(heads, rows, f"and {hidden} more before them" if hidden > 0 else "")
    return f'<section class="card" id="card-numerics"><div class="head"><h2>Numerics</h2></div>{table}</section>'


def _goodput(report: Report) -> str:
    rows = [
        f'<tr><td class="name">{escape(name)}</td><td class="n">{fmt.share(part)}</td>'
        f'<td class="n">{fmt.duration(seconds)}</td>'
        f'<td class="wide"><span class="bar" style="width:{100 * part:.1f}%"></span></td></tr>'
        for name, seconds, part in summary.wall_time(report.goodput)
    ]
    return _table([("spent on", ""), ("share", "n"), ("time", "n"), ("", "")], rows)


def _checkpoints(report: Report) -> str:
    rows = []
    for row in reversed(report.checkpoints.rows[-MOST_ROWS:]):
        head = (
            f'<tr><td class="n">{row.step}</td><td class="n">{row.attempt}</td><td>{escape(row.tier)}</td>'
            f'<td><span class="badge {STATES[row.state]}">{row.state}</span></td>'
        )
        if row.state == "failed":
            rows.append(f'{head}<td colspan="4" class="evidence">{escape(row.reason)}</td></tr>')
        else:
            rows.append(
                f'{head}<td class="n">{row.ranks}</td><td class="n">{fmt.size(row.size_bytes)}</td>'
                f'<td class="n">{fmt.duration(row.blocked_s)}</td>'
                f'<td class="n">{fmt.duration(row.durable_s)}</td></tr>'
            )
    if not rows:
        return '<p class="quiet">No checkpoint was saved.</p>'
    heads = [("step", "n"), ("attempt", "n"), ("tier", ""), ("state", ""), ("ranks", "n"), ("size", "n")]
    return _table([*heads, ("blocked", "n"), ("durable after", "n")], rows)


def _facts(report: Report) -> str:
    facts, traffic = report.facts, report.traffic
    hosts = facts.hosts
    planned = f" of {facts.steps_planned}" if facts.steps_planned else ""
    pairs = [
        ("directory", report.run_dir),
        ("ranks", str(facts.world_size)),
        ("hosts", ", ".join(hosts) or "unknown"),
        ("device", facts.device or "unknown"),
        ("parameters", f"{facts.parameters:,}".replace(",", " ") if facts.parameters else "unknown"),
        ("communication", facts.comm or "unknown"),
        ("steps", f"{facts.steps_done}{planned}" + (f", {facts.steps_redone} redone" if facts.steps_redone else "")),
        ("attempts", str(len(facts.starts))),
        ("began", fmt.date(facts.began_t)),
        ("wall time", fmt.duration(facts.wall_s)),
        ("tokens", f"{facts.tokens:,}".replace(",", " ") if facts.tokens else "unknown"),
        ("inside collectives", f"{fmt.share(traffic.collective_share)} of the step time, overlapped or not"),
        ("compression", f"{fmt.share(traffic.codec_share)} of the step time, overlapped or not"),
    ]
    for name, norms in (("gradient norm", report.loss.grad_norm), ("update norm", report.loss.update_norm)):
        if any(map(math.isfinite, norms)):
            pairs.append((name, fmt.first_and_last(norms)))
    if traffic.alpha is not None and traffic.residual is not None:
        pairs.append(("error feedback", summary.error_feedback(traffic.alpha, traffic.residual)))
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in pairs) + "</dl>"
