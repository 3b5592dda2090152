"""Why ranks failed: exit status, last output, and the error that names both."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from outlast.errors import RanksFailed

if TYPE_CHECKING:
    from outlast.diagnostics.syndromes.blame import BlameKey

LAST_LINES = 3
TAIL_BYTES = 64 << 10
"""How much of the end of a log is read: the stacks of many threads fit."""
LOST_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
    "left the exchange",
)
"""Phrases of gloo, the store and the reducer for a connection that another rank closed."""
MISMATCH = "op.preamble.length <= op.nbytes"
"""gloo's words where a rank receives more than its own collective holds."""
WATCHED = "OUTLAST_WATCHED"
"""Set in the environment of ranks whose shared memory the launcher reads, and removes once they have ended."""

NO_RESTART_STATUS = 93
"""Exit status of a rank whose failure a restart cannot fix, e.g. a wrong setting."""
RESUME_STATUS = 75
"""Exit status of a rank, and of the launcher, that ended because of a notice and lost nothing (EX_TEMPFAIL of
sysexits.h: try again)."""


@dataclass(frozen=True, kw_only=True)
class RankFailure:
    """A rank that failed by itself or was killed because it hung; not one that was ended because a peer had failed."""

    rank: int
    pid: int
    status: int
    """Exit status; ``-N`` for signal N."""
    message: str = ""
    """The message in its error file, or the last lines of its log."""
    log: Path | None = None
    """The log that has more."""
    hang: str = ""
    """The evidence, if the launcher killed it because it hung."""
    ended_alone: bool = False
    """Its process ended by itself with an unknown status; ``status`` is that of what had started it."""

    early: str = ""
    """Where it was, if it ended with status 0 and its peers were not done; they fail because of it."""

    desync: str = ""
    """The evidence, if it left the common order of collectives, and its peers failed because of it."""

    memory: str = ""
    """What the kernel's OOM killer did meanwhile."""

    def sort_key(self) -> tuple[BlameKey, int]:
        """Sorts the likely cause first: ranks that left, hung ones, killed ones; last those that report a lost peer."""
        from outlast.diagnostics.syndromes.blame import blame_key  # reading a command line imports no numpy

        blame = blame_key(
            left=bool(self.desync or self.early),
            hung=bool(self.hang),
            lost_peer=self.lost_peer,
            status=self.status,
            has_message=bool(self.message),
        )
        return blame, self.rank

    @property
    def lost_peer(self) -> bool:
        """Whether it reports that another rank was lost, and so is a victim."""
        return any(phrase in self.message for phrase in LOST_PEER) and not self.hang and not self.desync

    @property
    def mismatched(self) -> bool:
        """Whether gloo has aborted it and said why: what it received was larger than its own collective."""
        return self.status == -signal.SIGABRT and MISMATCH in self.message

    @property
    def reason(self) -> str:
        """One line, e.g. ``killed by SIGKILL``, ``exited with status 1: ValueError: …``."""
        if self.hang:
            return f"hung, killed by the launcher: {self.hang}"
        if self.desync:
            return f"{self.desync} ({describe_exit(self.status)})" if self.status else self.desync
        if self.early:
            return f"exited with status 0 {self.early}, before training was done (sys.exit or os._exit in its program?)"
        lines = self.message.splitlines()
        # An error's own line is not indented; frames of a traceback and advice are.
        telling = [line for line in lines if line and not line[0].isspace()] or lines
        words = f": {telling[-1].strip()}" if telling and (self.status > 0 or self.ended_alone) else ""
        memory = f": {self.memory}" if self.memory and not self.lost_peer else ""
        return ("its process ended" if self.ended_alone else describe_exit(self.status)) + memory + words


def describe_exit(status: int) -> str:
    """``exited with status 3``, or ``killed by SIGSEGV`` for -11."""
    if status >= 0:
        return f"exited with status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"


def first_line(error: BaseException) -> str:
    """An error's kind and the first line of what it says: torch's errors go on with frames of C++."""
    words = str(error).strip().splitlines()
    return f"{type(error).__name__}: {words[0]}" if words else type(error).__name__


def last_output(error_file: Path | None, logs: Sequence[Path], since: float) -> tuple[str, Path | None]:
    """A rank's last message, and the log that has more.

    Args:
        error_file: torchelastic's, written by ranks that use its ``record``; preferred.
        logs: files the rank may have written, best first; those not written to since ``since`` are skipped.
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
        file.seek(max(0, found.stat().st_size - TAIL_BYTES))
        lines = [line.rstrip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    return "\n".join(_innermost_frames(lines) or lines[-LAST_LINES:]), found


def _innermost_frames(lines: Sequence[str]) -> list[str]:
    """Of its main thread, if ``lines`` end with a dump of faulthandler's, which lists the innermost frame first."""
    if not lines or not lines[-1].startswith("  File "):
        return []
    heads = [at for at, line in enumerate(lines) if line.endswith("(most recent call first):")]
    if not heads:
        return []
    head = next((at for at in reversed(heads) if lines[at].startswith("Current thread")), heads[-1])
    return [line for line in lines[head + 1 : head + 1 + LAST_LINES] if line.startswith("  ")]


def is_torn(error_file: str) -> bool:
    """Whether a rank's error file exists but is incomplete: the rank died while writing it."""
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
    """The error for ranks that are not restarted.

    Args:
        host: where they ran.
        failures: the newest ones.
        restarts: how often they were restarted before.
        allowed: how many restarts were allowed.
        run_dir: the run's directory.
    """
    lines: list[str] = []
    shown: set[str] = set()
    for one in failures:
        lines.append(f"rank {one.rank} on {host} (pid {one.pid}): {one.reason}")
        lines += [f"    | {line}" for line in one.message.splitlines() if one.message not in shown]
        shown.add(one.message)
        if one.log is not None:
            lines.append(f"    log: {one.log}")
    if not lines:
        lines.append(f"the ranks on {host} failed without a message")
    if any(one.status == NO_RESTART_STATUS for one in failures):
        head = "ranks failed, and a restart would not fix it"
        fix = "fix the errors above, then start again"
    else:
        head = f"ranks failed after {restarts} of {allowed} restarts"
        fix = f"read the logs and the events in {run_dir / 'events'}; allow more with --max-restarts"
    return RanksFailed("\n  ".join([head, *lines]), fix)
