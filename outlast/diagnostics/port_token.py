"""The token that a request to one of outlast's HTTP ports must carry."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from outlast.errors import ConfigError

LEAST_CHARACTERS = 16


def read_token(path: Path | str, setting: str) -> str:
    """The token in a file.

    Args:
        path: the file; ``~`` is the user's home.
        setting: names it in messages, e.g. ``export.prometheus_token_file``.

    Raises:
        ConfigError: the file cannot be read, or holds no token of one line of printable ASCII.
    """
    try:
        token = Path(path).expanduser().read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{setting} = {str(path)!r} cannot be read: {error}", "write a token into it: openssl rand -hex 32 > FILE"
        ) from error
    if len(token) < LEAST_CHARACTERS or not token.isprintable() or " " in token:
        raise ConfigError(
            f"{setting} = {str(path)!r} holds no token: one line of {LEAST_CHARACTERS} or more printable characters",
            "write one into it: openssl rand -hex 32 > FILE",
        )
    return token


def carries(environ: Mapping[str, Any], token: str) -> bool:
    """Whether a WSGI request carries ``Authorization: Bearer TOKEN``, compared in constant time."""
    given = str(environ.get("HTTP_AUTHORIZATION", "")).encode(errors="replace")
    return hmac.compare_digest(given, f"Bearer {token}".encode())
