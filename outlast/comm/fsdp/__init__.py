"""FSDP2: gradients compressed on their way to their shards' owners, or between copies of the shards (HSDP).

During backward, for each group of parameters that ``fully_shard`` made, in the same order on every rank, FSDP2 passes a
flat buffer in the reduce type. It has one row for each rank of the shard group; row r holds rank r's slice of each
parameter's gradient, one after another, each padded with zero rows to the size of the largest slice. So the buffer is
the message of the two-phase transport's first phase before compression. It is compressed slice by slice, with error
feedback under the parameter's name; padding is neither compressed nor sent.

With a two-dimensional mesh the first dimension holds copies of the shards, usually on other nodes. The reduce-scatter
then stays as it is, and the mean over the copies is compressed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from outlast.comm.config import CommConfig
from outlast.comm.ddp.checks import refuse_complex, refuse_sparse
from outlast.comm.direction import Direction
from outlast.comm.exchange.adam_settings import followed
from outlast.comm.exchange.kept_optimizer import KeptOptimizer, check_optimizer
from outlast.comm.exchange.sharded import ShardItem
from outlast.comm.exchange.sharded_session import ShardSession
from outlast.comm.exchange.stats import ReduceStats
from outlast.comm.fsdp.groups import (
    Group,
    copies_of,
    find_groups,
    sharded_param,
    sharded_params,
    unknown_torch,
    with_gradient,
)
from outlast.comm.reducer import Reducer, refuse_loss_scale
from outlast.comm.state.sharded_state import cannot_reshard
from outlast.comm.transport.communicator import CollectiveObserver
from outlast.errors import CommError

_ONCE = (
    "call begin_step() before every step, and set_requires_gradient_sync(False) for all but the last backward of a step"
)
_WRAP = (
    "call set_requires_gradient_sync(False) for all but the last backward of a step, and also for a backward that only "
    "passes through this model on its way to another; where updates are skipped on purpose, call begin_step() before "
    "every step"
)


class ShardedReducer(Reducer):
    """Compresses the gradients of an FSDP2 model; made by :func:`attach_fsdp`.

    It acts in ``backward()``, as FSDP2's own reduce-scatter does. :meth:`begin_step` and :meth:`end_step` are optional,
    as they are for :class:`GradientReducer`. After :meth:`close` the model reduces as before.

    Failure: as :class:`Reducer` says. NaN and Inf in compressed gradients raise on all ranks of the group that
    exchanges them, in the same step.

    Args:
        session: exchanges, and holds the state.
        groups: the model's parameter groups.
        saved_by: (number of ranks that hold a part of the model, or a copy of one; this rank's place among them).
    """

    def __init__(self, session: ShardSession, groups: Sequence[Group], saved_by: tuple[int, int]) -> None:
        self.config = session.config
        self.world_size = session.world_size
        self._session = session
        self._groups = groups
        self._ranks, self._rank = saved_by

    def begin_step(self, step: int, loss_scale: float | None = None) -> None:
        """Say which step (1-based) the next backward belongs to; the warm-up depends on it.

        Optional: without it each synchronised backward is a step, counted from 1 or from the loaded state. Once it has
        been called it must be called before every step.

        Raises:
            CommError: an exchange has failed before, ``step`` < 1, or there is a ``loss_scale``.
        """
        refuse_loss_scale(loss_scale, "FSDP2")
        self._session.begin_step(step)

    def end_step(self) -> ReduceStats:
        """What the exchanges since the step began have cost.

        ``dense_bytes`` is what FSDP2's own collective would send: (n - 1) / n x 4 bytes an entry for the
        reduce-scatter, twice that of the shard for HSDP's all-reduce. On a CPU nothing is hidden: ``exposed_s`` is all
        of it.

        Raises:
            CommError: an exchange has failed.
        """
        return self._session.end_step()

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Error-feedback state for a checkpoint; call it between steps.

        Returns:
            As :meth:`Reducer.state_dict`, with nothing under ``replicated``. A rank's slots have the shape of the whole
            parameter (with HSDP of its shard), those named ``owned_...`` that of its shard.

        Raises:
            CommError: an exchange has failed.
        """
        return self._session.state_dict()

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]], *, strict: bool = True) -> tuple[str, ...]:
        """See :meth:`Reducer.load_state_dict`.

        Raises:
            CommStateMismatch: names what does not fit, another world size included; nothing has been loaded then.
            CommError: an exchange has failed.
        """
        left = self._session.load_state_dict(state, strict=strict)
        if self.kept is not None:
            self.kept.reducer_loaded()
        return left

    def load_resharded(
        self, read: Callable[[int], Mapping[str, Mapping[str, Any]]], ranks: int, *, strict: bool = True
    ) -> tuple[str, ...]:
        """Load the state that ``ranks`` ranks saved, if the world size is the same: sharded state is not redistributed.

        Args:
            read: given a rank of the run that saved, its state. Ranks are counted in the group that shards the model,
                with HSDP in the mesh, row by row: copy 0's ranks first.
            ranks: how many ranks saved.
            strict: see :meth:`Reducer.load_state_dict`, as for what is returned.

        Raises:
            CommStateMismatch: another world size, or what :meth:`load_state_dict` says; nothing has been loaded
                then.
            CommError: an exchange has failed.
        """
        self._session.check()
        if ranks != self._ranks:
            raise cannot_reshard("FSDP2", ranks, self._ranks)
        return self.load_state_dict(read(self._rank), strict=strict)

    def close(self) -> None:
        """Give the model its own collectives back, and end the thread. Closing twice is harmless.

        Raises:
            CommError: a collective did not end within the limit.
        """
        for group in self._groups:
            while group.undo:
                group.undo.pop()()
        try:
            self._session.close()
        finally:
            if self.kept is not None:
                self.kept.release()

    def _scatter(self, group: Group, output: Tensor, buffer: Tensor, op: Any) -> None:
        """One reduce-scatter: ``output`` becomes this rank's row of the mean (or sum, as ``op`` says)."""
        self._session.enter(id(group), group.label, sharded_params(group), _ONCE, _WRAP)
        n = self.world_size
        scale = n / _divisor(op, n, group)
        self._plain_mean(group, buffer.dtype)
        rows = buffer.detach().view(n, -1)
        items, start = [], 0
        for name, _ in with_gradient(group):
            param = self._session.states.params[name]
            sizes = [cut.stop - cut.start for cut in param.cuts]
            parts = [row[start : start + size] for row, size in zip(rows, sizes, strict=True)]
            items.append(ShardItem(param, parts, output[start : start + sizes[self._session.rank]], scale))
            start += max(sizes)
        self._matches(group, start, rows.shape[1])
        output.zero_()  # the padding too
        self._session.exchange(group.label, items)

    def _replicate(self, group: Group, output: Tensor) -> None:
        """One all-reduce between the copies of a shard: ``output``, a row, becomes the mean over them."""
        self._session.enter(id(group), group.label, sharded_params(group), _ONCE, _WRAP)
        self._plain_mean(group, output.dtype)
        items, start = [], 0
        for name, padded in with_gradient(group):
            param = self._session.states.params[name]
            row = output.detach()[start : start + param.cuts[0].stop]
            items.append(ShardItem(param, [row], row))
            start += padded
        self._matches(group, start, output.numel())
        self._session.exchange(group.label, items)

    def _plain_mean(self, group: Group, dtype: torch.dtype) -> None:
        """A direction has no scale that FSDP2 could divide out before the exchange or multiply back after it."""
        inner = group.inner
        if self.config.target == "update" and (
            dtype == torch.float64 or inner.gradient_divide_factor is not None or inner.force_sum_reduction_for_comms
        ):
            raise CommError(
                f"comm.target = 'update', but FSDP2 scales the gradients of {group.label} itself",
                "set target = 'gradient', or leave out set_gradient_divide_factor, set_force_sum_reduction_for_comms "
                "and float64",
            )

    def _matches(self, group: Group, expected: int, actual: int) -> None:
        if expected != actual:
            raise CommError(
                f"FSDP2 passes {actual} entries a rank for {group.label}, but its parameters have {expected}",
                "do not freeze or unfreeze parameters after attach(); call set_reduce_scatter_unused_params(True) "
                "if it was switched off",
            )


def attach_fsdp(
    module: nn.Module,
    config: CommConfig | None = None,
    *,
    replicas: dist.ProcessGroup | None = None,
    observer: CollectiveObserver | None = None,
    direction: Direction | None = None,
    optimizer: Optimizer | None = None,
) -> ShardedReducer:
    """Compress the gradients of an FSDP2 model from the next backward on; a collective call.

    ::

        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
        reducer = outlast.comm.attach(model, optimizer=optimizer, target="update", density=0.02)

    Over a one-dimensional mesh the reduce-scatter is compressed (``FSDPModule.set_custom_reduce_scatter``): each rank
    sends each owner its slice of every parameter, and the owner adds the ranks' slices in rank order in fp32. There is
    no second compression, so this is EF14, EF21, ... exactly as in their papers; EF21's h is kept by the owner.
    ``config.transport`` has no effect: there is only this way.

    Over a two-dimensional mesh (HSDP), or with ``replicas``, the reduce-scatter stays FSDP2's own, and the mean over
    the copies of each shard is compressed (``FSDPModule.set_all_reduce_hook``), by an all-gather. FSDP2 runs that hook
    *after* its own all-reduce. So until :meth:`ShardedReducer.close`, the model's groups see a mesh that has the shard
    dimension alone.

    Parameters that get no gradient in a backward count as zero and get one (``set_reduce_scatter_unused_params``; where
    torch has none, as 2.11, a parameter without a gradient is an error), for what is handed over does not say whose it
    is. Frozen parameters take no part. Gradient accumulation:
    ``set_requires_gradient_sync(False)`` for all but the last backward of a step; else each is a step of its own.
    Mixed precision: the buffers have ``reduce_dtype``, the sums and the state fp32.

    With ``target = "update"`` the optimizer is the AdamW that is handed over, or ``torch.optim.SGD``, on the shards.
    Each rank then keeps Adam's moments of its *whole* gradient, as it keeps the error feedback of it: three times the
    unsharded model in fp32. Of them ``optimizer.state_dict()`` shows the rank's shard, and what it loads is gathered
    first, so that each rank begins with the moments of the whole.

    Args:
        module: the outermost one, after the last call of ``fully_shard``; parameters are named from here.
        config: see :class:`CommConfig`; None takes its defaults.
        replicas: for a model sharded over one dimension, the ranks that hold copies of this rank's shards and must
            agree in their weights; None if the mesh says it or there are none.
        observer: notified of every collective.
        direction: of ``target = "update"``; None takes Adam with beta1 = 0, beta2 = 0.95 (or the optimizer's),
            clip_rms = 1.
        optimizer: see :func:`outlast.comm.attach`.

    Raises:
        CommError: no FSDP2 module; float16; tensor parallel parameters; several meshes; ``compressor = "auto"``;
            ``ranks_per_node`` > 1; complex parameters, or modules that make sparse gradients;
            ``transport = "two-phase"`` between copies; a torch whose FSDP2 is built differently;
            an optimizer that cannot be kept.
    """
    config = config or CommConfig()
    refuse_complex(module.named_parameters())
    refuse_sparse(module)
    groups = find_groups(module)
    params = list(module.parameters())
    follows = followed(optimizer, config, params, direction)
    if optimizer is not None and follows is not None:
        check_optimizer(optimizer, params)
        direction = follows.of(config)
    copies = copies_of(groups, replicas)
    first = groups[0].inner
    if copies is not None and config.transport == "two-phase":
        raise CommError(
            "comm.transport = 'two-phase' between the copies of a shard is not supported",
            "set transport = 'all-gather' or 'auto'",
        )
    if copies is None:
        layout, exchanged = "fsdp", first.mesh_info.shard_process_group
    else:
        layout, exchanged = "hsdp", copies
    session = ShardSession(
        layout,
        config,
        exchanged,
        first.device,
        observer,
        direction,
        lambda n: (n - 1) / n if copies is None else 2 * (n - 1) / n,
    )
    shard_group = first.mesh_info.shard_process_group
    shard, shards = dist.get_rank(shard_group), dist.get_world_size(shard_group)
    saved_by = (shards, shard) if copies is None else (shards * session.world_size, shards * session.rank + shard)
    reducer = ShardedReducer(session, groups, saved_by)
    by_id = {}
    for group in groups:
        for param in group.inner.fsdp_params:
            name = group.names[id(param)]
            session.states.params[name] = sharded_param(name, param, session, of_copy=copies is not None)
            by_id[id(param.sharded_param)] = session.states.params[name]
        _install(reducer, group, copies)
    if optimizer is not None and follows is not None:
        from outlast.comm.fsdp.moments import ShardedMoments  # imports DTensor

        kept = KeptOptimizer(
            optimizer, ShardedMoments(by_id, follows.of(config)), follows, session.check, session.current_step
        )
        reducer.kept = session.steps.kept = kept
    return reducer


class _ReduceScatter:
    """The argument of ``set_custom_reduce_scatter``."""

    def __init__(self, run: Callable[[Tensor, Tensor, Any], None]) -> None:
        self._run = run

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        """Done on return, whether asynchronous or not, so there is no work to wait for."""
        self._run(output_tensor, input_tensor, op)


def _install(reducer: ShardedReducer, group: Group, copies: dist.ProcessGroup | None) -> None:
    inner, module = group.inner, group.module
    if hasattr(inner, "reduce_scatter_unused_params"):  # torch 2.11 has not
        unused = inner.reduce_scatter_unused_params
        module.set_reduce_scatter_unused_params(True, recurse=False)
        group.undo.append(lambda: module.set_reduce_scatter_unused_params(unused, recurse=False))
    if copies is None:
        before = inner._reduce_scatter_comm
        module.set_custom_reduce_scatter(_ReduceScatter(lambda out, buf, op: reducer._scatter(group, out, buf, op)))
        group.undo.append(lambda: module.set_custom_reduce_scatter(before))
        return
    hook = inner._all_reduce_hook
    module.set_all_reduce_hook(lambda output: reducer._replicate(group, output))
    group.undo.append(lambda: setattr(inner, "_all_reduce_hook", hook))
    whole = inner.mesh_info
    if hasattr(whole, "replicate_process_group"):
        try:
            from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo
        except ImportError as error:
            raise unknown_torch("no FSDPMeshInfo") from error
        sharded = FSDPMeshInfo(mesh=whole.mesh, shard_mesh_dim=whole.shard_mesh_dim)
        if hasattr(whole, "reduce_scatter_process_group"):
            sharded.reduce_scatter_process_group = whole.reduce_scatter_process_group
        # FSDP2 compares the two: as long as they are one object, forward and backward use the same shards.
        together = inner.post_forward_mesh_info is whole
        inner.mesh_info = sharded
        if together:
            inner.post_forward_mesh_info = sharded
        group.undo.append(lambda: _restore_mesh(inner, whole, together))


def _restore_mesh(inner: Any, whole: Any, together: bool) -> None:
    inner.mesh_info = whole
    if together:
        inner.post_forward_mesh_info = whole


def _divisor(op: Any, n: int, group: Group) -> float:
    """The divisor of the sum over ranks."""
    if op == dist.ReduceOp.AVG:
        return float(n)
    if op == dist.ReduceOp.SUM:
        return 1.0
    factor = group.inner.gradient_divide_factor
    if factor is None:
        raise unknown_torch(f"reduce-scatter with {op}")
    return float(factor)
