"""What kept ranks from their work, step by step, as the ranks themselves told it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from outlast.diagnostics.report.load import DELAYS, Floats, Loaded, Steps

Delayed = tuple[Floats, Floats, Floats]
"""[steps, ranks] each: seconds, how many, and the highest generation; 0 where nothing was told."""


@dataclass(frozen=True, slots=True)
class Delays:
    """By what it was, for the execution of every step that counts."""

    by_what: Mapping[str, Delayed]

    def seconds(self, what: str) -> Floats | None:
        """[steps, ranks]; None if it never was so."""
        found = self.by_what.get(what)
        return found[0] if found is not None else None


def delays_of(loaded: Loaded, steps: Steps) -> Delays:
    """The delays of the steps that count; those of executions that were discarded are left out."""
    table = np.frombuffer(loaded.delays, dtype=np.float64).reshape(-1, 8) if loaded.delays else np.empty((0, 8))
    row_of = {step: row for row, step in enumerate(steps.steps)}
    column_of = {rank: column for column, rank in enumerate(steps.ranks)}
    found: dict[str, Delayed] = {}
    shape = len(steps.steps), len(steps.ranks)
    for attempt, generation, rank, step, what, seconds, count, oldest in table.tolist():
        row, column = row_of.get(int(step)), column_of.get(int(rank))
        if row is None or column is None or (steps.attempt[row], steps.generation[row]) != (attempt, generation):
            continue
        name = DELAYS[int(what)]
        if name not in found:
            found[name] = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        for values, value in zip(found[name], (seconds, count, oldest), strict=True):
            values[row, column] = value
    return Delays(found)
