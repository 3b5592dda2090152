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

    For other tools: a trace for Perfetto, and dumps for torch's flight recorder analyser.
    """

    run_dir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """The run's directory."""
    html: Path | None = None
    """Write one self-contained HTML file here."""
    json: bool = False
    """Print the report as JSON instead of tables."""
    trace: Path | None = None
    """Write a trace for https://ui.perfetto.dev here: steps, failures, and who waited for whom. FILE.gz is packed."""
    flight_recorder: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Write the collectives of the newest failure here, for `torchfrtrace DIR`: pickles of plain values, one a rank."""

    def run(self, overrides: Overrides) -> int:
        """Build the report and show it."""
        from outlast.diagnostics import build_report, render_terminal
        from outlast.diagnostics.report.html_file import check_html_target, write_html

        if self.html is not None:
            check_html_target(self.html)
        if self.trace is not None:
            self._write_trace(self.trace)
        if self.flight_recorder is not None:
            self._export_flight_recorder(self.flight_recorder)
        if (self.trace or self.flight_recorder) and self.html is None and not self.json:
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

    def _export_flight_recorder(self, folder: Path) -> None:
        from outlast.diagnostics.trace.flight_recorder import export_flight_recorder

        exported = export_flight_recorder(self.run_dir, folder)
        for note in exported.notes:
            print(note, file=sys.stderr)
        print(f"written: {folder} ({len(exported.ranks)} ranks); torchfrtrace {folder} reads it", file=sys.stderr)
