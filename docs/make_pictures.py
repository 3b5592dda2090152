"""Draws the pictures beside it, one of them from ``comm_benchmark.json``: ``python docs/make_pictures.py``."""

from __future__ import annotations

import json
import math
import statistics
from html import escape
from pathlib import Path

STYLE = """
  text { font: 14px system-ui, sans-serif; fill: #1c2733 }
  .small { font-size: 12px; fill: #51606f }
  .head { font-weight: 600 }
  .box { fill: #f6f8fa; stroke: #9fb0c0; stroke-width: 1.2; rx: 8 }
  .comm { fill: #e3f0fd; stroke: #4a90d9 } .ckpt { fill: #e5f6e8; stroke: #4aa564 }
  .diag { fill: #fdf0dd; stroke: #d9963a } .run { fill: #efe9fb; stroke: #8465c9 }
  .line { stroke: #6b7c8d; stroke-width: 1.4; fill: none; marker-end: url(#tip) }
  .dash { stroke-dasharray: 5 4 }
"""
TIP = (
    '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto-start-reverse">'
    '<path d="M0 0 L8 4 L0 8 z" fill="#6b7c8d"/></marker>'
)


def box(x: int, y: int, w: int, h: int, title: str, lines: list[str], kind: str = "") -> str:
    """A labelled box; ``lines`` stand under its title."""
    out = [f'<rect class="box {kind}" x="{x}" y="{y}" width="{w}" height="{h}" rx="8"/>']
    out.append(f'<text class="head" x="{x + 12}" y="{y + 24}">{escape(title)}</text>')
    out += [f'<text class="small" x="{x + 12}" y="{y + 44 + 17 * i}">{escape(t)}</text>' for i, t in enumerate(lines)]
    return "\n".join(out)


def line(points: str, label: str = "", at: tuple[int, int] = (0, 0), dash: bool = False) -> str:
    """An arrow through ``points``, with a label at ``at``."""
    text = f'<text class="small" x="{at[0]}" y="{at[1]}">{escape(label)}</text>' if label else ""
    return f'<polyline class="line{" dash" if dash else ""}" points="{points}"/>{text}'


def svg(width: int, height: int, title: str, parts: list[str]) -> str:
    """A picture on white, so that it reads on dark pages too."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n<defs>{TIP}</defs>\n"
        f'<rect width="{width}" height="{height}" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def rooms() -> str:
    """The floors; arrows point the way imports go, dashed ones the way processes and files are used."""
    return svg(
        860,
        520,
        "The rooms of outlast and who imports whom",
        [
            box(330, 14, 200, 56, "cli", ["outlast VERB"]),
            box(150, 110, 400, 76, "trainer", ["model · data · engine · the loop", "joins the rooms; usable in parts"], "run"),
            box(590, 156, 256, 76, "launch", ["environments · torchelastic agent", "hang watch · restarts"], "run"),
            box(14, 280, 262, 92, "comm", ["compressor × feedback × transport", "DDP adapter", "state by parameter name"], "comm"),
            box(296, 280, 262, 92, "checkpoint", ["lazy snapshot · Zarr v3 writer", "two-phase commit", "verified restore"], "ckpt"),
            box(578, 280, 268, 92, "diagnostics", ["recorder ring · heartbeat", "stall verdict · report", "doctor"], "diag"),
            box(14, 432, 832, 66, "config · events · errors", ["the ground floor: settings, typed records, one tree of errors"]),
            line("400,70 380,110"),
            line("530,50 700,50 718,156"),
            line("550,160 590,176"),
            line("230,186 160,280"),
            line("400,186 420,280"),
            line("500,186 660,280"),
            line("720,232 720,280"),
            line("145,372 145,432"),
            line("427,372 427,432"),
            line("712,372 712,432"),
            line("590,216 568,216 568,240 350,240 350,186", "starts ranks as processes", (384, 258), dash=True),
        ],
    )


def step() -> str:
    """One step's way through the rooms, left to right."""
    return svg(
        980,
        400,
        "One training step through the rooms",
        [
            '<text class="head" x="14" y="28">training thread</text>',
            box(14, 44, 90, 56, "batch", ["by step"], "run"),
            box(128, 44, 110, 56, "forward", [], "run"),
            box(262, 44, 170, 56, "backward", ["buckets get ready"], "run"),
            box(560, 44, 110, 56, "wait copied", [], "ckpt"),
            box(694, 44, 110, 56, "update", ["clip, AdamW"], "run"),
            box(828, 44, 138, 56, "save, if due", ["returns at once"], "ckpt"),
            line("104,72 128,72"),
            line("238,72 262,72"),
            line("432,72 560,72", "gradients", (470, 64)),
            line("670,72 694,72"),
            line("804,72 828,72"),
            '<text class="head" x="14" y="196">comm thread</text>',
            '<text class="small" x="14" y="216">its own process group,</text>',
            '<text class="small" x="14" y="233">one fixed order on every rank</text>',
            box(262, 172, 120, 72, "compress", ["C(g − h)", "by parameter"], "comm"),
            box(400, 172, 120, 72, "exchange", ["all-gather of", "messages"], "comm"),
            box(538, 172, 132, 72, "aggregate", ["sum in rank order", "h += mean"], "comm"),
            line("330,100 320,172", "bucket", (272, 140)),
            line("382,208 400,208"),
            line("520,208 538,208"),
            line("604,172 604,140 500,140 500,76", dash=True),
            '<text class="head" x="14" y="300">checkpoint thread</text>',
            box(14, 316, 220, 64, "copy what stays still", ["while the next backward runs"], "ckpt"),
            box(258, 316, 200, 64, "write arrays + CRC32C", ["fsync, then vote"], "ckpt"),
            box(482, 316, 200, 64, "commit record", ["when all votes are there"], "ckpt"),
            box(706, 316, 260, 64, "events · ring · heartbeat", ["readable after the process is dead"], "diag"),
            line("234,348 258,348"),
            line("458,348 482,348"),
            line("897,100 897,280 200,280 200,316", dash=True),
        ],
    )


CURVES = {
    "dense DDP": "#51606f",
    "DDP fp16 hook": "#a0aab4",
    "PowerSGD rank 4": "#d9963a",
    "PowerSGD rank 8": "#8465c9",
    "outlast, its defaults (1 %)": "#1668c4",
    "outlast, density 0.5 %": "#4aa564",
}


def learning(link: str) -> str:
    """Held-out loss, mean over seeds, against seconds on ``link``: what ``python -m benchmarks.comm`` measured."""
    found = json.loads((Path(__file__).parent / "comm_benchmark.json").read_text())
    left, top, width, height = 64, 40, 560, 330
    least_s, most_s, low, high = 5.0, 700.0, 2.4, 3.4

    def x(seconds: float) -> float:
        return left + width * (math.log(seconds / least_s) / math.log(most_s / least_s))

    def y(loss: float) -> float:
        return top + height * (high - loss) / (high - low)

    parts = [f'<text class="head" x="{left}" y="24">Held-out loss against seconds, links of 200 Mbit/s</text>']
    for seconds in (5, 10, 20, 50, 100, 200, 500):
        parts.append(f'<line x1="{x(seconds):.1f}" x2="{x(seconds):.1f}" y1="{top}" y2="{top + height}" stroke="#e3e8ed"/>')
        parts.append(f'<text class="small" text-anchor="middle" x="{x(seconds):.1f}" y="{top + height + 18}">{seconds} s</text>')
    for loss in (2.4, 2.6, 2.8, 3.0, 3.2, 3.4):
        stroke = 'stroke="#c0392b" stroke-dasharray="5 4"' if loss == found["target"] else 'stroke="#e3e8ed"'
        parts.append(f'<line x1="{left}" x2="{left + width}" y1="{y(loss):.1f}" y2="{y(loss):.1f}" {stroke}/>')
        parts.append(f'<text class="small" text-anchor="end" x="{left - 8}" y="{y(loss) + 4:.1f}">{loss:g}</text>')
    for row, (label, colour) in enumerate(CURVES.items()):
        step_s = statistics.median(found["steps"][label][link]["step_s"])
        seeds = list(found["losses"][label].values())
        curve = [(seeds[0][i][0] * step_s, statistics.mean(s[i][1] for s in seeds)) for i in range(len(seeds[0]))]
        points = " ".join(f"{x(t):.1f},{y(loss):.1f}" for t, loss in curve if loss <= high and t >= least_s)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2.2"/>')
        at = top + 14 + 20 * row
        parts.append(f'<line x1="{left + width + 16}" x2="{left + width + 40}" y1="{at - 4}" y2="{at - 4}" stroke="{colour}" stroke-width="3"/>')
        parts.append(f'<text class="small" x="{left + width + 48}" y="{at}">{escape(label)}</text>')
    return svg(860, 410, "Held-out loss against seconds on links of 200 Mbit/s, by method", parts)


if __name__ == "__main__":
    here = Path(__file__).parent
    (here / "rooms.svg").write_text(rooms(), encoding="utf-8")
    (here / "step.svg").write_text(step(), encoding="utf-8")
    (here / "time_to_loss.svg").write_text(learning("200mbit"), encoding="utf-8")
