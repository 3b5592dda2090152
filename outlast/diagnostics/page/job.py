"""What the process that serves a run's page is told."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PageJob:
    """Which run, and where; the token comes on its standard input."""

    run_dir: str
    refresh_s: float
    socket_fd: int
    """The socket of the port, which listens."""

    def to_json(self) -> str:
        """As an argument of a command line; there is no secret in it."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> PageJob:
        """Read what :meth:`to_json` wrote."""
        return cls(**json.loads(text))
