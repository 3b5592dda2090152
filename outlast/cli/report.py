"""``outlast report RUN``."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from outlast.cli.verb import Verb
from outlast.config import Overrides


@dataclass(frozen=True, kw_only=True)
class Report(Verb):
    """Show what happened in a run and which ranks were late, computed from its events: as text, HTML or JSON.

    For other tools: a trace for Perfetto.
    """

    run_dir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """The run's directory."""
    html: Path | None = None
    """Write one self-contained HTML file here."""
    json: bool = False
    """Print the report as JSON instead of tables."""
    trace: Path | None = None
    """Write a trace for https://ui.perfetto.dev here: steps, failures, and who waited for whom. FILE.gz is packed."""

    def run(self, overrides: Overrides) -> int:
        """Build the report and show it."""
        from outlast.diagnostics import build_report, render_terminal
        from outlast.diagnostics.report.html_file import check_html_target, write_html

        if self.html is not None:
            check_html_target(self.html)
        if self.trace is not None:
            self._write_trace(self.trace)
            if self.html is None and not self.json:
                return 0
        report = build_report(self.run_dir)
        if self.html is not None:
            write_html(report, self.html)
            print(f"written: {self.html}", file=sys.stderr)
        if self.json:
            print(json.dumps(report.to_json()))
        elif self.html is None:
            render_terminal(report, Console())
        return 0

    def _write_trace(self, path: Path) -> None:
        from outlast.diagnostics.trace.run_trace import write_trace

        written = write_trace(self.run_dir, path)
        for one in written.missing:
            print(f"missing: {one}", file=sys.stderr)
        print(f"written: {path} ({written.events} events, {written.arrows} arrows)", file=sys.stderr)
