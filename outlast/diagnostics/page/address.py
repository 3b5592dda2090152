"""The page's address, and the file that says it to the user who trains."""

from __future__ import annotations

import os
import secrets
import socket
from contextlib import suppress
from pathlib import Path

FILE = "page.url"
"""In the run's directory."""
EVERYWHERE = ("0.0.0.0", "::")


def make_token() -> str:
    """A random token, of characters that an address may contain."""
    return secrets.token_urlsafe(32)


def address_of(listening: socket.socket, token: str = "") -> str:
    """``http://HOST:PORT/``, with the token as fragment if one is given."""
    host, port = listening.getsockname()[:2]
    host = socket.gethostname() if host in EVERYWHERE else f"[{host}]" if ":" in host else host
    return f"http://{host}:{port}/{'#' if token else ''}{token}"


def write_address(run_dir: Path, address: str) -> Path:
    """Write it with mode 0600, whole or not at all, in place of an earlier launch's.

    Raises:
        OSError: it cannot be written.
    """
    path = run_dir / FILE
    beside = path.with_name(f".{FILE}.{secrets.token_hex(8)}")
    try:
        fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with open(fd, "w", encoding="utf-8") as file:
            file.write(f"{address}\n")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def remove_address(run_dir: Path, address: str) -> None:
    """Remove the file, unless another launcher's address is in it by now."""
    path = run_dir / FILE
    with suppress(OSError):
        if path.read_text(encoding="utf-8").strip() == address:
            path.unlink()
