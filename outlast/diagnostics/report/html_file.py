"""The report as a file: whole or not at all, and never written through a link that leads nowhere."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from outlast.diagnostics.report.html import render_html
from outlast.diagnostics.report.model import Report
from outlast.errors import DiagnosticsError


def check_html_target(path: Path) -> None:
    """Raise :class:`DiagnosticsError` unless a report can be written there; an earlier file may be replaced."""
    if path.is_symlink() and not path.exists():
        raise DiagnosticsError(
            f"{path} is a symbolic link to {os.readlink(path)}, which does not exist",
            "remove the link, or pass the file that is to be made",
        )
    if path.exists() and not path.is_file():
        what = "a folder" if path.is_dir() else "no regular file"
        raise DiagnosticsError(f"{path} cannot be written: it is {what}", "pass another file")
    folder = path.resolve().parent
    if not folder.is_dir():
        raise DiagnosticsError(f"{path} cannot be written: the folder {folder} does not exist", "make it")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise DiagnosticsError(f"{path} cannot be written: Permission denied in {folder}", "choose another folder")


def write_html(report: Report, path: Path) -> None:
    """Write a report as one HTML file; readers see the old one or the new one.

    Raises:
        DiagnosticsError: it cannot be written; nothing is left of the attempt.
    """
    check_html_target(path)
    final = path.resolve()
    temporary = final.parent / f".{final.name[:50]}.{secrets.token_hex(4)}.tmp"
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(render_html(report))
        os.replace(temporary, final)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DiagnosticsError(f"{path} cannot be written: {error.strerror}", "choose another file") from error
