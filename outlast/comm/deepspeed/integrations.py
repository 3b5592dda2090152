"""The two ways to replace DeepSpeed's averaging; see :mod:`outlast.comm.deepspeed`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from outlast.comm.compressors import Shape
from outlast.comm.compressors.base import numel_of, wire_dtype
from outlast.comm.config import CommConfig
from outlast.comm.ddp.reducer import GradientReducer
from outlast.comm.direction import Direction
from outlast.comm.exchange.sharded import ShardItem
from outlast.comm.exchange.sharded_session import ShardSession
from outlast.comm.exchange.stats import ReduceStats
from outlast.comm.slices import Cut
from outlast.comm.state.sharded_state import cannot_reshard
from outlast.comm.state.shards import ShardedParam
from outlast.comm.transport.communicator import CollectiveObserver
from outlast.errors import CommError


class Integration(Protocol):
    """One of them. Its methods are those of :class:`outlast.comm.Reducer`."""

    def check(self) -> None:
        """Raise what has gone wrong before, if anything has."""

    def end_step(self) -> ReduceStats: ...

    def state_dict(self) -> dict[str, dict[str, Any]]: ...

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]], *, strict: bool = True) -> tuple[str, ...]: ...

    def load_resharded(
        self, read: Callable[[int], Mapping[str, Mapping[str, Any]]], ranks: int, *, strict: bool = True
    ) -> tuple[str, ...]: ...

    def close(self) -> None: ...


class WholeGradients:
    """Replaces ``engine.buffered_allreduce_fallback``: every rank needs the whole mean.

    Args:
        engine: DeepSpeed's.
        config: see :class:`CommConfig`.
        observer: notified of every collective.
        direction: of ``target = "update"``.
    """

    def __init__(
        self, engine: Any, config: CommConfig, observer: CollectiveObserver | None, direction: Direction | None
    ) -> None:
        self._engine = engine
        self._holders: list[tuple[Tensor, Tensor]] = []
        """(parameter, gradient) if DeepSpeed keeps gradients in another type than the parameters."""
        named = list(engine.module.named_parameters())
        optimizer = engine.optimizer
        if hasattr(optimizer, "fp32_groups_gradients"):
            names = {id(param): name for name, param in named}
            named = []
            for params, grads in zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True):
                for param, grad in zip(params, grads, strict=True):
                    # It has no entries of its own; it only carries a shape, a type and a .grad.
                    holder = grad.new_empty(()).expand(param.shape).detach().requires_grad_()
                    self._holders.append((holder, grad.view(param.shape)))
                    named.append((names[id(param)], holder))
        self._reducer = GradientReducer(
            named, config, group=engine.data_parallel_group, observer=observer, direction=direction
        )
        engine.buffered_allreduce_fallback = self._average

    def check(self) -> None:
        self._reducer.check()

    def end_step(self) -> ReduceStats:
        return self._reducer.end_step()

    def state_dict(self) -> dict[str, dict[str, Any]]:
        return self._reducer.state_dict()

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]], *, strict: bool = True) -> tuple[str, ...]:
        return self._reducer.load_state_dict(state, strict=strict)

    def load_resharded(
        self, read: Callable[[int], Mapping[str, Mapping[str, Any]]], ranks: int, *, strict: bool = True
    ) -> tuple[str, ...]:
        return self._reducer.load_resharded(read, ranks, strict=strict)

    def close(self) -> None:
        vars(self._engine).pop("buffered_allreduce_fallback", None)
        self._reducer.close()

    def _average(self, grads: Any = None, elements_per_buffer: int = 0) -> None:
        if grads is not None:
            raise CommError(
                "DeepSpeed asks to average gradients of its own choice", "do not call its all-reduce yourself"
            )
        self._reducer.begin_step(self._engine.global_steps + 1)
        for holder, grad in self._holders:
            holder.grad = grad
        self._reducer.reduce()
        for holder, _ in self._holders:
            holder.grad = None


class Partitions:
    """Replaces ``engine.optimizer.average_tensor``: each rank needs its partition of the mean.

    Args:
        engine: DeepSpeed's.
        config: see :class:`CommConfig`.
        observer: notified of every collective.
        direction: of ``target = "update"``.
    """

    def __init__(
        self, engine: Any, config: CommConfig, observer: CollectiveObserver | None, direction: Direction | None
    ) -> None:
        self._engine = engine
        self._optimizer = optimizer = engine.optimizer
        group = optimizer.dp_process_group
        device = optimizer.bit16_groups[0][0].device
        self._session = ShardSession("zero", config, group, device, observer, direction, lambda n: (n - 1) / n)
        names = {id(param): name for name, param in engine.module.named_parameters()}
        self._names: dict[int, str] = {}
        for index, params in enumerate(optimizer.bit16_groups):
            for param in params:
                param_id = optimizer.get_param_id(param)
                name = names.get(id(param))
                if name is None:
                    raise CommError(
                        f"the optimizer has a parameter of shape {tuple(param.shape)} that the model does not have",
                        "optimize the parameters of the model that deepspeed.initialize was given",
                    )
                self._names[param_id] = name
                self._session.states.params[name] = self._sharded(name, param, index, param_id)
        self._kept: dict[str, Tensor] = {}
        """Sums over a step's micro-batches before the last, for ZeRO 2, which keeps none: flat, fp32."""
        self._exchanged_at: int | None = None
        """DeepSpeed's count of micro-batches at the last exchange."""
        self._bucket = 0
        optimizer.average_tensor = self._average

    def check(self) -> None:
        self._session.check()

    def end_step(self) -> ReduceStats:
        self._complete()
        return self._session.end_step()

    def state_dict(self) -> dict[str, dict[str, Any]]:
        self._complete()
        return self._session.state_dict()

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]], *, strict: bool = True) -> tuple[str, ...]:
        self._complete()
        return self._session.load_state_dict(state, strict=strict)

    def load_resharded(
        self, read: Callable[[int], Mapping[str, Mapping[str, Any]]], ranks: int, *, strict: bool = True
    ) -> tuple[str, ...]:
        self._session.check()
        if ranks != self._session.world_size:
            raise cannot_reshard("ZeRO", ranks, self._session.world_size)
        return self.load_state_dict(read(self._session.rank), strict=strict)

    def close(self) -> None:
        vars(self._optimizer).pop("average_tensor", None)
        self._session.close()

    @torch.no_grad()
    def _average(self, tensor: Tensor, communication_data_type: torch.dtype) -> None:
        """``tensor`` (entries,) holds the gradients of the bucket's parameters end to end. This rank's part of each
        becomes the mean; the rest stays as it is, because nobody reads it."""
        optimizer, session = self._optimizer, self._session
        session.check()
        micro = self._engine.micro_steps
        if self._exchanged_at not in (None, micro):
            self._complete()
            self._exchanged_at = None
        bucket = optimizer.ipg_buckets[communication_data_type]
        placed, start = [], 0
        for group, _, param_id in bucket.params:
            sharded = session.states.params[self._names[param_id]]
            row = tensor[start : start + numel_of(sharded.shape)]
            start += row.numel()
            placed.append((group, param_id, sharded, row))
        if start != tensor.numel():
            raise CommError(
                f"DeepSpeed passes {tensor.numel()} entries for a bucket of {start}",
                "outlast does not know this version of DeepSpeed",
            )
        if not optimizer.is_gradient_accumulation_boundary():
            for _, _, sharded, row in placed:
                kept = self._kept.get(sharded.name)
                if kept is None:
                    self._kept[sharded.name] = row.to(sharded.dtype, copy=True)
                else:
                    kept.add_(row)
            tensor.zero_()  # DeepSpeed adds its mean to the step's sum
            return
        if not placed:
            return
        if self._exchanged_at is None:
            self._exchanged_at, self._bucket = micro, 0
            session.at_step(self._engine.global_steps + 1)
        items, sums = [], []
        for group, param_id, sharded, row in placed:
            whole = row
            if (kept := self._kept.pop(sharded.name, None)) is not None:
                whole = kept.add_(row)
            cut = sharded.cuts[session.rank]
            total = None
            if cut.stop > cut.start:
                # If DeepSpeed sums in fp32 what it exchanges in bf16, it reads the mean from here, not from the row.
                total = optimizer._get_compact_grad_partition_slice(group, session.rank, param_id, cut.stop - cut.start)
            out = row[cut.start : cut.stop] if total is None else torch.empty_like(total, dtype=sharded.dtype)
            if total is not None:
                sums.append((total, out))
            items.append(ShardItem(sharded, [whole[one.start : one.stop] for one in sharded.cuts], out))
        session.exchange(f"bucket {self._bucket}", items)
        self._bucket += 1
        for total, out in sums:
            total.add_(out)

    def _complete(self) -> None:
        """Between steps, everything that was accumulated must have been exchanged.

        Raises:
            CommError: something was not.
        """
        if self._kept:
            raise CommError(
                f"gradients of {', '.join(sorted(self._kept))} were accumulated and not exchanged",
                "call this between steps; a parameter that gets a gradient in some micro-batch of a step must get one "
                "in its last, as with ZeRO 1",
            )

    def _sharded(self, name: str, param: Tensor, group: int, param_id: int) -> ShardedParam:
        """How DeepSpeed's partitions cut a parameter, which may be at any entry."""
        optimizer, session = self._optimizer, self._session
        shape, numel = tuple(param.shape), param.numel()
        offsets = optimizer.grad_start_offset[group]
        owners = sorted(optimizer.param_to_partition_ids[group][param_id])
        starts = [int(offsets[owner][param_id]) for owner in owners]
        ends = [*starts[1:], numel]
        owned = {owner: (a, b) for owner, a, b in zip(owners, starts, ends, strict=True)}
        cuts = []
        for rank in range(session.world_size):
            start, stop = owned.get(rank, (0, 0) if rank < owners[0] else (numel, numel))
            cuts.append(Cut(start, stop, _cut_shape(shape, start, stop)))
        compress = session.states.compresses(shape)
        return ShardedParam(name, shape, wire_dtype(param.dtype), param.device, compress, tuple(cuts), session.rank)


def _cut_shape(shape: Shape, start: int, stop: int) -> Shape:
    """Rows if the entries are whole rows, else a flat run."""
    row = numel_of(shape[1:])
    if len(shape) > 1 and stop > start and start % row == 0 and stop % row == 0:
        return ((stop - start) // row, *shape[1:])
    return (stop - start,)
