"""Every feedback with every compressor goes on bit for bit, and gives the same bits on every rank."""

from __future__ import annotations

import hashlib
import itertools
from typing import Any

import pytest
from torch import Tensor

from outlast.comm.compressors import COMPRESSORS
from outlast.comm.config import FEEDBACKS
from tests.comm.ranks import Ranks
from tests.comm.toy import backward, estimates, gradients, wrap

STEPS = 4
METHODS = [
    {"feedback": feedback, "compressor": compressor}
    for feedback, compressor in itertools.product(FEEDBACKS, COMPRESSORS)
    if feedback != "none" and compressor != "dense"
]


def copied(tree: Any) -> Any:
    """A state dict with tensors of its own."""
    if isinstance(tree, dict):
        return {key: copied(value) for key, value in tree.items()}
    return tree.clone() if isinstance(tree, Tensor) else tree


def digest(rank: int, settings: dict[str, Any], until: int) -> str:
    """Of all estimates of steps 3 and 4, of a run that begins anew from its state after step ``until``."""
    ddp, reducer = wrap(settings)
    found = hashlib.sha256()
    for step in range(1, STEPS + 1):
        backward(ddp, gradients(step, rank))
        if step > 2:
            for name, data in sorted(estimates(ddp.module).items()):
                found.update(name.encode() + data)
        if step == until:
            saved = copied(reducer.state_dict())
            reducer.close()
            ddp, reducer = wrap(settings)
            reducer.load_state_dict(saved)
    reducer.close()
    return found.hexdigest()


def run(rank: int, methods: list[dict[str, Any]], until: int) -> list[str]:
    return [digest(rank, settings, until) for settings in methods]


@pytest.mark.parametrize("target", [pytest.param("gradient", marks=pytest.mark.soak), "update"])
def test_every_method_goes_on_bit_for_bit(three_ranks: Ranks, target: str) -> None:
    methods = []
    for method in METHODS:
        if target == "update" and method["feedback"] not in ("ef14", "ef21"):
            continue  # what is fed to it is all that differs
        transport = "two-phase" if method["feedback"] == "ef21-bc" else "all-gather"
        methods.append({**method, "target": target, "transport": transport, "values": "int8", "rank": 2})
    straight = three_ranks.run(run, methods, 0)
    resumed = three_ranks.run(run, methods, 2)
    for index, method in enumerate(methods):
        of_ranks = {found[index] for found in straight}
        assert len(of_ranks) == 1, f"{method}: ranks differ"
        assert {found[index] for found in resumed} == of_ranks, f"{method}: a resumed run differs"
    assert len({found for found in straight[0]}) > len(methods) / 2, "methods must differ for this to say anything"


@pytest.mark.parametrize("feedback", ["ef14", "ef21"])
def test_other_transports_and_compact_residuals_too(three_ranks: Ranks, feedback: str) -> None:
    methods: list[dict[str, Any]] = []
    for compressor in ("topk", "randk", "lowrank"):
        methods.append({"feedback": feedback, "compressor": compressor, "transport": "two-phase", "rank": 2})
    if feedback == "ef14":
        methods.append({"feedback": feedback, "residual": "int8"})
        methods.append({"feedback": feedback, "residual": "int8", "transport": "two-phase"})
    straight, resumed = three_ranks.run(run, methods, 0), three_ranks.run(run, methods, 2)
    assert straight == resumed
    assert all(found == straight[0] for found in straight)
