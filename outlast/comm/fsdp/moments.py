"""The moments of a sharded model, as the state of an optimizer that has the shards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from outlast.comm.direction import Direction
from outlast.comm.state.adam_moments import AdamState, first_moment, taken
from outlast.comm.state.shards import ShardedParam


class ShardedMoments:
    """See :class:`~outlast.comm.state.adam_moments.Moments`.

    A rank has the moments of its whole gradient. Seen as the optimizer's they are those of its own shard.

    Args:
        params: by the identity of the parameter as the optimizer has it.
        direction: whose moments they are.
    """

    def __init__(self, params: Mapping[int, ShardedParam], direction: Direction) -> None:
        self._params = params
        self._direction = direction

    def has(self, param: Tensor) -> bool:
        """See the protocol."""
        return id(param) in self._params

    def read(self, param: Tensor) -> AdamState | None:
        """See the protocol. The moments are DTensors like the parameter."""
        assert isinstance(param, DTensor)
        sharded = self._params[id(param)]
        own = sharded.moments.get(sharded.own)
        if own is not None:
            return AdamState(own["t"], _like(param, first_moment(own)), _like(param, own["v"]))
        step = self._any_step()
        if step is None or not param.requires_grad or param.to_local().numel():
            return None
        # This rank's shard is empty. It has a state all the same, as with AdamW: ranks' states have the same names.
        nothing = _like(param, torch.zeros_like(param.to_local(), dtype=sharded.dtype))
        return AdamState(step, nothing, nothing)

    def write(self, param: Tensor, state: AdamState | None) -> None:
        """See the protocol; collective where the rank compresses the gradients of other ranks' shards."""
        sharded = self._params[id(param)]
        sharded.moments = {}
        if state is None:
            return
        assert isinstance(param, DTensor)
        every = sharded.compress and len(sharded.cuts) > 1
        flat = {slot: _whole(tensor) if every else _own(tensor) for slot, tensor in state._asdict().items()}
        for index, cut in enumerate(sharded.cuts):
            if cut.stop == cut.start or not (every or index == sharded.own):
                continue

            def part(slot: str, start: int = cut.start if every else 0, cut: Any = cut) -> Tensor:
                return flat[slot][start : start + cut.stop - cut.start].view(cut.shape)

            here = AdamState(state.step, part("exp_avg"), part("exp_avg_sq"))
            sharded.moments[index] = taken(here, self._direction.slots, sharded.dtype, sharded.device)

    def _any_step(self) -> Tensor | None:
        """All parameters with gradients get one in each step."""
        every = (moments["t"] for one in self._params.values() for moments in one.moments.values())
        return next(every, None)


def _like(param: DTensor, local: Tensor) -> DTensor:
    return DTensor.from_local(
        local.view(param.to_local().shape),
        param.device_mesh,
        param.placements,
        run_check=False,
        shape=param.shape,
        stride=param.stride(),
    )


def _whole(tensor: Tensor) -> Tensor:
    """The ranks' shards, one after another, flat; collective."""
    if not isinstance(tensor, DTensor):
        return tensor.reshape(-1)  # the step
    full = tensor.full_tensor()
    placement = tensor.placements[-1]
    if isinstance(placement, Shard) and placement.dim:
        full = torch.cat(full.chunk(tensor.device_mesh.size(-1), placement.dim))
    return full.reshape(-1)


def _own(tensor: Tensor) -> Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).reshape(-1)
