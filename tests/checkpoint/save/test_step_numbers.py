"""Integers of any kind are steps; what is not one is an error at once, before anything is saved or looked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from outlast.checkpoint import load
from outlast.errors import CheckpointError
from tests.checkpoint.damage import steps_at
from tests.checkpoint.helpers import checkpointer
from tests.checkpoint.states import local, state

STEPS: list[Any] = [np.int64(5), np.uint8(5), np.array(5), torch.tensor(5), 5]
WRONG: list[Any] = [True, np.True_, torch.tensor(True), "6", "20", "", 6.0, np.float64(6), None, [6], -1, np.int64(-1)]


@pytest.mark.parametrize("step", STEPS, ids=lambda step: type(step).__name__)
def test_integers_of_any_kind(tmp_path: Path, step: Any) -> None:
    with checkpointer(tmp_path) as one:
        one.save(step, replicated=state(5), local=local(5))
    assert steps_at(tmp_path) == ["step_00000005"]
    with checkpointer(tmp_path, attempt_id="second") as one:
        back = one.restore(step)
    assert back is not None
    assert (back.step, type(back.step)) == (5, int)
    assert load(tmp_path, step).step == 5


@pytest.mark.parametrize("step", WRONG, ids=repr)
def test_others_are_an_error_at_once(tmp_path: Path, step: Any) -> None:
    with checkpointer(tmp_path) as one:
        with pytest.raises(
            CheckpointError, match=r"save: a step is an integer >= 0, got .*\n.*pass the number of the step$"
        ):
            one.save(step, replicated=state(5), local=local(5))
        with pytest.raises(
            CheckpointError, match=r'restore: a step is an integer >= 0, got .*\n.*number .*, or "auto"$'
        ):
            one.restore(step)
        with pytest.raises(
            CheckpointError, match=r'load: a step is an integer >= 0, got .*\n.*number .*, or "newest"$'
        ):
            load(tmp_path, step)
        one.save(6, replicated=state(6), local=local(6))
    assert steps_at(tmp_path) == ["step_00000006"]
