"""The starts of somebody's program in a run's directory: numbered, and one job at a time.

The trainer's rank 0 takes the run's directory by itself. A program does not know of it, so the launcher of the node
that leads the rendezvous does it.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

from outlast.checkpoint.ownership import JOB
from outlast.launch.attempt import Attempt, steps_taken
from outlast.launch.place import GENERATION
from outlast.launch.run_directory import RunDirectory
from outlast.launch.runner import ATTEMPT, LOOK_EVERY_S, RUN_DIR, STEPS_TAKEN


class KeyValueStore(Protocol):
    """What is needed of a rendezvous' store."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...


class ProgramRuns:
    """Numbers the attempts of one launch.

    Args:
        run_dir: the run's directory.
        look_every_s: seconds between two looks at a rank's collectives, or ``auto``.
    """

    def __init__(self, run_dir: Path, look_every_s: float | str) -> None:
        self._run_dir = run_dir.absolute()
        self._look_every_s = look_every_s
        self._attempt: Attempt | None = None
        self._directory = RunDirectory(self._run_dir, "--run-dir OTHER")
        self._stack = ExitStack()
        self._holds = False

    def agree(self, store: KeyValueStore, *, job: str, generation: int, leads: bool) -> dict[str, str]:
        """Variables for the ranks that start next.

        Collective over the agents of the job. If the one that leads fails, the others raise after the store's timeout.

        Args:
            store: of this round, shared by all agents.
            job: its name, the same in all rounds.
            generation: how often its ranks were started before.
            leads: whether this agent decides; exactly one does.

        Raises:
            RunDirectoryError: another job trains in the directory, or it cannot be written.
        """
        if leads:
            if not self._holds:
                os.environ[JOB], os.environ[GENERATION] = job, str(generation)  # whose lease it is
                self._directory.take(self._stack)
                self._holds = True
            attempt = self._directory.begin(self._attempt)
            store.set("outlast/attempt", f"{attempt.number} {steps_taken(self._run_dir)}")
        else:
            self.close()
        number, taken = map(int, store.get("outlast/attempt").split())
        self._attempt = Attempt(self._run_dir, number)
        return {
            RUN_DIR: str(self._run_dir),
            ATTEMPT: str(number),
            STEPS_TAKEN: str(taken),
            LOOK_EVERY_S: str(self._look_every_s),
        }

    def close(self) -> None:
        """Give the directory back, if this launcher holds it."""
        self._stack.close()
        self._holds = False
