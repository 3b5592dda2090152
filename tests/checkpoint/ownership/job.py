"""A job of one process that saves at a URL as it is told on its standard input; run as a module."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch

ROOT = Path(__file__).parents[3]


def main(url: str, settings: dict[str, Any]) -> None:
    """Obey: ``save STEP``, ``restore WHICH``, ``step``, ``claim``, ``close``; answer each with one line of JSON."""
    from outlast.checkpoint import CheckpointConfig, attach
    from outlast.errors import OutlastError
    from outlast.events import CheckpointFailed, CheckpointSaved, Event

    seen: list[Event] = []
    weight = torch.zeros(1000)
    job = attach(url, CheckpointConfig(**{"commit_timeout_s": 30.0, **settings}), on_event=seen.append)
    print(json.dumps({"pid": os.getpid()}), flush=True)
    for line in sys.stdin:
        word, *rest = line.split()
        answer: dict[str, Any] = {}
        try:
            if word == "save":
                weight.fill_(float(rest[0]))
                job.save(int(rest[0]), replicated={"weight": weight})
                job._finish()
            elif word == "restore":
                found = job.restore("auto" if rest[0] == "auto" else int(rest[0]))
                answer["step"] = found.step if found is not None else None
                if found is not None:
                    assert torch.equal(found.replicated["weight"], torch.full((1000,), float(found.step)))
            elif word == "step":
                job.wait_copied()
            elif word == "claim":
                job.claim()
            elif word == "close":
                job.close()
        except OutlastError as error:
            answer["error"] = f"{type(error).__name__}: {error}"
        answer["saved"] = [event.step for event in seen if isinstance(event, CheckpointSaved) and event.committed]
        answer["failed"] = [event.reason for event in seen if isinstance(event, CheckpointFailed)]
        print(json.dumps(answer), flush=True)
        if word == "close":
            return


class Job:
    """Such a job, as a process of its own.

    Args:
        url: of the checkpoints.
        environ: added to its environment.
        settings: of checkpointing.
    """

    def __init__(self, url: Path | str, environ: Mapping[str, str] | None = None, **settings: Any) -> None:
        words = [sys.executable, "-m", __name__, str(url), json.dumps(settings)]
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "OUTLAST"))}
        self._process = subprocess.Popen(
            words,
            cwd=ROOT,
            env={**inherited, **(environ or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid: int = self._answer()["pid"]

    def tell(self, order: str) -> dict[str, Any]:
        """Give an order, and wait for the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{order}\n")
        self._process.stdin.flush()
        return self._answer()

    def kill(self, how: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal; after SIGKILL, wait for the end."""
        self._process.send_signal(how)
        if how == signal.SIGKILL:
            self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.communicate()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
