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
from outlast.errors import ConfigError


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

    live: bool = False
    """Serve the page over HTTP, computed anew while the run goes on, until Ctrl-C; prints its address."""
    port: int | None = None
    """With --live, the port; by default a free one."""
    host: str | None = None
    """With --live, the address to listen at; by default 127.0.0.1, which only this machine reaches."""
    token_file: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """With --live, a file with the token that whoever looks needs; by default one is made, and is in the address."""

    def run(self, overrides: Overrides) -> int:
        """Build the report and show it."""
        if self._serves():
            return 0
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

    def _serves(self) -> bool:
        """Serve the page, if asked for; whether it was."""
        given = {"--port": self.port, "--host": self.host, "--token-file": self.token_file}
        if not self.live:
            for flag, value in given.items():
                if value is not None:
                    raise ConfigError(f"{flag} {value} is of no use without --live", "add --live, or leave it out")
            return False
        others = {"--html": self.html, "--trace": self.trace, "--flight-recorder": self.flight_recorder}
        for flag, value in {**others, "--json": self.json or None}.items():
            if value is not None:
                raise ConfigError(f"--live and {flag} contradict one another", "leave one of them out")
        from outlast.diagnostics.page.config import PageConfig, is_loopback
        from outlast.diagnostics.page.foreground import serve

        host = self.host or PageConfig.host
        if self.token_file is None and not is_loopback(host):
            raise ConfigError(
                f"--host {host} opens the page to other machines, without a token of yours",
                "openssl rand -hex 32 > FILE, and add --token-file FILE",
            )
        token_file = None if self.token_file is None else str(self.token_file)
        settings = PageConfig(port=self.port or 0, host=host, token_file=token_file)
        serve(self.run_dir, settings, lambda address: print(address, flush=True))
        return True

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
