"""Orders to the processes that measure: JSON lines on their standard input, answers on their standard output."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from typing import Any


def ask(processes: Sequence[subprocess.Popen[str]], **order: Any) -> list[dict[str, Any]]:
    """Hand all ranks an order, and wait for their answers, by rank.

    Raises:
        SystemExit: a rank ended.
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
            raise SystemExit(f"rank {rank} ended with status {process.wait()} while it measured {order}")
        answers.append(json.loads(line))
    return answers
