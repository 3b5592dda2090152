"""Sends orders to worker processes as JSON lines on their stdin, and reads the answers from their stdout."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from typing import Any


def ask(processes: Sequence[subprocess.Popen[str]], **order: Any) -> list[dict[str, Any]]:
    """Send all ranks an order and wait for their answers, in rank order.

    Raises:
        SystemExit: a rank has exited.
    """
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(json.dumps(order) + "\n")
        process.stdin.flush()
    answers = []
    for rank, process in enumerate(processes):
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"rank {rank} exited with status {process.wait()} during {order}")
        answers.append(json.loads(line))
    return answers
