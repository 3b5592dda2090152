"""Which compression a session puts under its models, and what it costs a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from outlast.comm import CommConfig, Reducer, ReduceStats, attach
from outlast.errors import CommError
from outlast.session.models import Trained, kind_of

Comm = CommConfig | Mapping[str, Any] | Literal[False] | None
"""How a session's ``comm`` may be given."""
GRADIENTS: dict[str, Any] = {"target": "gradient", "feedback": "ef21"}
"""Error feedback on gradients, which suits any optimizer. With Adam and AdamW their updates are compressed."""


def attach_reducers(trained: Sequence[Trained], comm: Comm, world_size: int) -> dict[str, Reducer]:
    """A reducer for each model whose gradients ranks average, by the model's name. Collective.

    Where updates are compressed, AdamW stays what it is to the program, and its moments are the reducer's.

    Raises:
        UnknownKey, UnknownCompressor, OutOfRange, CommError: see :func:`outlast.comm.attach`.
    """
    if comm is False or world_size == 1:
        return {}
    reducers: dict[str, Reducer] = {}
    for one in trained:
        kind = kind_of(one.model)
        if kind == "alone":
            continue
        adam = type(one.optimizer) in (torch.optim.Adam, torch.optim.AdamW)
        settings: Mapping[str, Any] = {}
        if comm is None and not adam:
            settings = GRADIENTS
        elif comm is not None and not isinstance(comm, CommConfig):
            settings = comm
        config = comm if isinstance(comm, CommConfig) else CommConfig()
        target = settings.get("target", config.target)
        one.is_kept = adam and target == "update"
        try:
            reducers[one.name] = attach(one.model, config, optimizer=one.optimizer if one.is_kept else None, **settings)
        except CommError as error:
            for made in reducers.values():
                made.close()
            if kind != "deepspeed":
                raise
            leave = "leave averaging to DeepSpeed: comm=False"
            raise CommError(error.what, f"{error.fix}; or {leave}" if error.fix else leave) from error
    return reducers


def of_gradients(comm: Comm) -> Comm:
    """For programs that clip what ranks average: gradients are compressed, unless ``comm`` names a target."""
    if comm is False or isinstance(comm, CommConfig) or (comm is not None and "target" in comm):
        return comm
    return {**GRADIENTS, **(comm or {})}


def is_of_updates(comm: Comm) -> bool:
    """Whether ``comm`` asks for updates by name."""
    if isinstance(comm, CommConfig):
        return comm.target == "update"
    return isinstance(comm, Mapping) and comm.get("target") == "update"


def cost_of_step(reducers: Mapping[str, Reducer]) -> ReduceStats:
    """What the exchanges since the last call cost, over all models; waits for those under way.

    Measures (alpha, residual) are the first model's. Without reducers all is zero.

    Raises:
        CommError: one failed.
    """
    stats = [reducer.end_step() for reducer in reducers.values()]
    return ReduceStats(
        wire_bytes=sum(one.wire_bytes for one in stats),
        dense_bytes=sum(one.dense_bytes for one in stats),
        codec_s=sum(one.codec_s for one in stats),
        collective_s=sum(one.collective_s for one in stats),
        exposed_s=sum(one.exposed_s for one in stats),
        collectives=sum(one.collectives for one in stats),
        alpha=stats[0].alpha if stats else None,
        residual=stats[0].residual if stats else None,
    )
