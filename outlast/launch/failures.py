"""Why ranks failed, in words."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from outlast.errors import RanksFailed

LAST_LINES = 3
LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe")
"""How gloo and the store say that another rank has gone."""
WATCHED = "OUTLAST_WATCHED"
"""Set in the environment of ranks whose shared memory the launcher reads, and removes when they have ended."""

NO_RESTART_STATUS = 93
"""Exit status of a rank that knows that starting it again would end the same way, e.g. for a wrong setting."""


@dataclass(frozen=True, kw_only=True)
class RankFailure:
    """One rank that failed of itself or was killed for hanging; not one that was ended because a peer had failed."""

    rank: int
    pid: int
    status: int
    """Exit status; ``-N`` for signal N."""
    said: str = ""
    """What it left in its error file or last wrote, in a few lines."""
    log: Path | None = None
    """Where more is to be read."""
    hang: str = ""
    """Evidence, where the launcher killed it because it hung."""

    def order(self) -> tuple[bool, bool, bool, bool, int]:
        """Sorts the likely cause first: who hung, then who was killed, and last those who say that they lost a peer."""
        lost_peer = any(phrase in self.said for phrase in LOST_PEER)
        return not self.hang, lost_peer, self.status >= 0, not self.said, self.rank

    @property
    def reason(self) -> str:
        """One line, e.g. ``killed by SIGKILL``, ``exited with status 1: ValueError: …``."""
        if self.hang:
            return f"hung, killed by the launcher: {self.hang}"
        lines = self.said.splitlines()
        # An error's own line is not indented; frames of a traceback and advice are.
        telling = [line for line in lines if line and not line[0].isspace()] or lines
        return describe_exit(self.status) + (f": {telling[-1].strip()}" if telling and self.status > 0 else "")


def describe_exit(status: int) -> str:
    """``exited with status 3``, or ``killed by SIGSEGV`` for -11."""
    if status >= 0:
        return f"exited with status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"


def last_words(error_file: Path | None, logs: Sequence[Path], since: float) -> tuple[str, Path | None]:
    """What a rank said last, and where more is to be read.

    Args:
        error_file: torchelastic's, which a rank writes that uses its ``record``; preferred.
        logs: files the rank may have written, best first; those not written to since are passed over.
        since: seconds since the epoch at which the rank was started.
    """
    found = next((log for log in logs if log.is_file() and log.stat().st_size and log.stat().st_mtime >= since), None)
    if error_file is not None and error_file.is_file():
        message = _error_message(error_file)
        if message:
            return message, found or error_file
    if found is None:
        return "", None
    with found.open("rb") as file:
        file.seek(max(0, found.stat().st_size - 8192))
        lines = [line.rstrip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    return "\n".join(lines[-LAST_LINES:]), found


def is_torn(error_file: str) -> bool:
    """Whether a rank's error file is there and is not whole: the rank died while it wrote it."""
    try:
        json.loads(Path(error_file).read_bytes())
    except FileNotFoundError:
        return False
    except ValueError:
        return True
    return False


def _error_message(error_file: Path) -> str:
    """torchelastic writes ``{"message": {"message": text, …}}``, or ``{"message": text}``."""
    try:
        message = json.loads(error_file.read_text())["message"]
    except (ValueError, KeyError, TypeError):
        return ""
    if isinstance(message, dict):
        message = message.get("message", "")
    return "\n".join(str(message).strip().splitlines()[-LAST_LINES:])


def ranks_failed(
    host: str, failures: Sequence[RankFailure], *, restarts: int, allowed: int, run_dir: Path
) -> RanksFailed:
    """The error for ranks that are not started again.

    Args:
        host: where they ran.
        failures: the last ones.
        restarts: how often ranks had been restarted here.
        allowed: how often they might have been.
        run_dir: the run's directory.
    """
    lines: list[str] = []
    shown: set[str] = set()
    for one in failures:
        lines.append(f"rank {one.rank} on {host} (pid {one.pid}): {one.reason}")
        lines += [f"    | {line}" for line in one.said.splitlines() if one.said not in shown]
        shown.add(one.said)
        if one.log is not None:
            lines.append(f"    log: {one.log}")
    if not lines:
        lines.append(f"the ranks on {host} failed, and none says why")
    if any(one.status == NO_RESTART_STATUS for one in failures):
        head = "ranks failed in a way that starting them again would not mend"
        fix = "mend what they say above, then start again"
    else:
        head = f"ranks failed, and {restarts} of {allowed} restarts were used"
        fix = f"read the logs and the events in {run_dir / 'events'}; --max-restarts allows more restarts"
    return RanksFailed("\n  ".join([head, *lines]), fix)
