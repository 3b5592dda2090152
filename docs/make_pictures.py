"""Draws the pictures of the docs: ``python docs/make_pictures.py [FOLDER]``, without a folder beside this file.

The packages are drawn from the tree, the curves from ``comm_benchmark.json``.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from pathlib import Path

from rooms_picture import rooms
from svg import box, line, svg, text

EVERY_STEP = (
    "every step, every collective that outlast issues, and the phase each rank is in: readable after the process dies"
)


def step() -> str:
    """One step's way through the packages, left to right; a row for each thread."""
    return svg(
        1060,
        496,
        "One training step through the packages",
        [
            text(20, 34, "training thread", "head"),
            box(20, 50, 96, 60, "batch", ["of this step"], "run"),
            box(140, 50, 100, 60, "forward", [], "run"),
            box(264, 50, 180, 60, "backward", ["buckets get ready"], "run"),
            box(596, 50, 128, 60, "wait copied", ["by the optimizer"], "checkpoint"),
            box(748, 50, 112, 60, "update", ["x −= lr · d"], "run"),
            box(884, 50, 156, 60, "save, if due", ["returns at once"], "checkpoint"),
            line("116,80 140,80"),
            line("240,80 264,80"),
            line("444,80 596,80", "averages", (494, 72)),
            line("724,80 748,80"),
            line("860,80 884,80"),
            text(20, 186, "comm's threads", "head"),
            text(20, 206, "a process group of their own,", "small"),
            text(20, 223, "one order on every rank", "small"),
            box(264, 164, 128, 76, "compress", ["g or Adam's d,", "by parameter"], "comm"),
            box(416, 164, 128, 76, "exchange", ["messages of all", "ranks"], "comm"),
            box(568, 164, 156, 76, "aggregate", ["sum in rank order:", "same on every rank"], "comm"),
            line("320,110 320,164", "bucket", (328, 142)),
            line("392,202 416,202"),
            line("544,202 568,202"),
            line("646,164 646,138 520,138 520,84", dash=True),
            text(20, 306, "checkpoint's threads", "head"),
            box(20, 322, 240, 64, "copy, with CRC32C", ["while forward and backward run"], "checkpoint"),
            box(290, 322, 210, 64, "write each tier due", ["synced, past the page cache"], "checkpoint"),
            box(530, 322, 210, 64, "vote once durable", ["files, sizes, checksums"], "checkpoint"),
            box(770, 322, 270, 64, "commit record", ["rank 0, when all votes are there"], "checkpoint"),
            line("260,354 290,354"),
            line("500,354 530,354"),
            line("740,354 770,354"),
            line("962,110 962,282 220,282 220,322", dash=True),
            box(20, 412, 1020, 64, "events · recorder ring · heartbeat", [EVERY_STEP], "diagnostics"),
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
        parts.append(
            f'<line x1="{x(seconds):.1f}" x2="{x(seconds):.1f}" y1="{top}" y2="{top + height}" stroke="#e3e8ed"/>'
        )
        parts.append(
            f'<text class="small" text-anchor="middle" x="{x(seconds):.1f}" y="{top + height + 18}">{seconds} s</text>'
        )
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
        at, right = top + 14 + 20 * row, left + width + 16
        parts.append(f'<path d="M{right} {at - 4} h24" stroke="{colour}" stroke-width="3"/>')
        parts.append(text(right + 32, at, label, "small"))
    return svg(860, 410, "Held-out loss against seconds on links of 200 Mbit/s, by method", parts)


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    (folder / "rooms.svg").write_text(rooms(), encoding="utf-8")
    (folder / "step.svg").write_text(step(), encoding="utf-8")
    (folder / "time_to_loss.svg").write_text(learning("200mbit"), encoding="utf-8")
