"""``outlast predict``."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.table import Column, Table

from outlast.cli.verb import Verb
from outlast.config import Overrides, require


@dataclass(frozen=True, kw_only=True)
class Predict(Verb):
    """Predict whether compression pays: seconds a step for each method on a link, from codecs measured here."""

    parameters: float
    """Trainable parameters, e.g. 124e6."""
    step_ms: float
    """Milliseconds of a step on one node: forward, backward and update, without any exchange between nodes."""
    link_mbit: float
    """Rate of each node's link in Mbit/s: 10000 for 10 Gbit/s."""
    nodes: int = 2
    """Nodes that exchange. Ranks of one node average among themselves first."""
    latency_ms: float = 0.1
    """Of one small collective between the nodes."""
    backward_share: float = 0.6
    """Share of a step in which the exchange of ready gradients can hide: backward's."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where gradients are; the codecs are measured there. auto: CUDA where there is one."""
    json: bool = False
    """Print JSON."""

    def run(self, overrides: Overrides) -> int:
        """Measure the codecs and print a row for each method."""
        import torch

        from outlast.comm.auto.forecast import forecast
        from outlast.comm.auto.policy import WORTH, Link, Timing

        require(self.step_ms > 0, "step-ms", self.step_ms, "more than 0")
        require(self.link_mbit > 0, "link-mbit", self.link_mbit, "more than 0")
        require(self.latency_ms >= 0, "latency-ms", self.latency_ms, "0 or more")
        require(0 <= self.backward_share <= 1, "backward-share", self.backward_share, "0 to 1")
        cuda = torch.cuda.is_available() if self.device == "auto" else self.device == "cuda"
        require(not cuda or torch.cuda.is_available(), "device", self.device, "auto or cpu: PyTorch finds no GPU here")
        device = torch.device("cuda" if cuda else "cpu")
        step_s = self.step_ms / 1e3
        rows = forecast(
            int(self.parameters),
            self.nodes,
            Link(self.latency_ms / 1e3, self.link_mbit * 1e6 / 8),
            Timing(step_s, self.backward_share * step_s),
            device=device,
        )
        if self.json:
            print(json.dumps({"device": str(device), "methods": [dataclasses.asdict(row) for row in rows]}))
            return 0
        table = Table(Column("method", no_wrap=True), box=None, pad_edge=False)
        for name in ("sent per step", "codec", "on the link", "step", "x dense"):
            table.add_column(name, justify="right")
        dense, *others = rows
        for row in rows:
            table.add_row(
                row.method,
                f"{row.wire_bytes / 1e6:.3g} MB",
                f"{1e3 * row.codec_s:.3g} ms",
                f"{1e3 * row.wire_s:.3g} ms",
                f"{1e3 * row.step_s:.4g} ms",
                f"{row.step_s / dense.step_s:.2f}",
            )
        console = Console(highlight=False)
        console.print(table)
        best = min(others, key=lambda row: row.step_s)
        if best.step_s < WORTH * dense.step_s:
            console.print(f"\nCompression pays: {best.method}, {dense.step_s / best.step_s:.2f} times as many steps.")
        else:
            console.print("\nCompression does not pay on this link: --comm.compressor dense")
        console.print(
            f"Codecs were measured on {device}; docs/compression.md has what each method costs in loss, and"
            ' comm.compressor = "auto" decides by measurement in the job itself.',
            style="dim",
        )
        return 0
