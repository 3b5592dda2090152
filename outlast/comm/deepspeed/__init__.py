"""DeepSpeed, ZeRO stages 0, 1 and 2: gradients averaged by outlast where DeepSpeed would all-reduce or reduce them.

DeepSpeed has no public hook for it, so one method of one *object* is replaced, once its signature has been checked:

* ZeRO 0, and ZeRO 1 in bf16 with fp32 accumulation: ``engine.buffered_allreduce_fallback``, called once a step after
  all its gradients are accumulated. They are averaged whole, on every rank, by a :class:`GradientReducer`.
* Otherwise, ZeRO 1 and 2: ``engine.optimizer.average_tensor``, called with each bucket of gradients before DeepSpeed
  copies this rank's partition out of it. Each partition is averaged by its owner alone, as in
  :mod:`outlast.comm.fsdp`.

Clipping, the optimizer and the all-gather of weights are DeepSpeed's own and follow the exchange.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist

from outlast.comm.config import CommConfig
from outlast.comm.ddp.checks import refuse_complex
from outlast.comm.deepspeed.integrations import Integration, Partitions, WholeGradients
from outlast.comm.direction import Direction
from outlast.comm.exchange.stats import ReduceStats
from outlast.comm.exchange.update_optimizer import refuse_other_than_sgd
from outlast.comm.reducer import Reducer, refuse_loss_scale
from outlast.comm.transport.communicator import CollectiveObserver
from outlast.deepspeed_compat import check_engine, check_method, import_deepspeed, known_attributes
from outlast.errors import CommError


class DeepSpeedReducer(Reducer):
    """Averages a DeepSpeed engine's gradients, compressed; made by :func:`attach_deepspeed`.

    It acts inside ``engine.backward()`` of a step's last micro-batch (``engine.step()`` with
    ``managed_gradient_accumulation = false``). A step is DeepSpeed's: ``engine.global_steps + 1``.

    Failure: as :class:`Reducer` says; what goes wrong is raised by ``engine.backward()``.

    Args:
        engine: DeepSpeed's.
        config: the settings.
        integration: what replaces DeepSpeed's averaging.
    """

    def __init__(self, engine: Any, config: CommConfig, integration: Integration) -> None:
        self.config = config
        self.world_size = dist.get_world_size(engine.data_parallel_group)
        self._engine = engine
        self._integration = integration

    def begin_step(self, step: int, loss_scale: float | None = None) -> None:
        """Check that the next backward belongs to ``step``. DeepSpeed counts the steps, so this only compares.

        Raises:
            CommError: an exchange has failed before, DeepSpeed's next step is another one, or ``loss_scale`` is given.
        """
        refuse_loss_scale(loss_scale, "DeepSpeed")
        self._integration.check()
        expected = self._engine.global_steps + 1
        if step != expected:
            raise CommError(
                f"begin_step({step}), but the next step of the DeepSpeed engine is {expected}",
                "count as engine.global_steps does, from the checkpoint that the engine has loaded; or leave out "
                "begin_step()",
            )

    def end_step(self) -> ReduceStats:
        """What the last step's exchange has cost; call it, if at all, after ``engine.step()``.

        ``dense_bytes`` is what a ring would have sent in fp32: 2 (n - 1) / n x 4 bytes an entry for an all-reduce, half
        of it where only the partition's owner needs the sum.

        Raises:
            CommError: an exchange has failed.
        """
        return self._integration.end_step()

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Error-feedback state for a checkpoint; call it between steps.

        Returns:
            As :meth:`Reducer.state_dict`. Where partitions are averaged, nothing is replicated, a parameter's local
            slots have its shape, and ``owned_...`` that of this rank's part of it. ``engine.save_checkpoint`` does not
            save it: save it beside, on each rank.

        Raises:
            CommError: an exchange has failed, or the step is not complete.
        """
        return self._integration.state_dict()

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]], *, strict: bool = True) -> tuple[str, ...]:
        """See :meth:`Reducer.load_state_dict`.

        Raises:
            CommStateMismatch: names what does not fit (also: another world size, another ZeRO stage, another assignment
                of parameters to ranks); nothing has been loaded then.
            CommError: an exchange has failed.
        """
        return self._integration.load_state_dict(state, strict=strict)

    def load_resharded(
        self, read: Callable[[int], Mapping[str, Mapping[str, Any]]], ranks: int, *, strict: bool = True
    ) -> tuple[str, ...]:
        """See :meth:`Reducer.load_resharded`. Where whole gradients are averaged, the number of ranks may change.

        Args:
            read: given a rank of the run that saved, in its data-parallel group, its state.
            ranks: how many ranks saved.
            strict: see :meth:`Reducer.load_state_dict`, as for what is returned.

        Raises:
            CommStateMismatch: another world size where partitions are averaged, or what :meth:`load_state_dict`
                says; nothing has been loaded then.
            CommError: an exchange has failed.
        """
        return self._integration.load_resharded(read, ranks, strict=strict)

    def close(self) -> None:
        """Give the engine its own averaging back, and end the threads. Closing twice is harmless.

        Raises:
            CommError: a collective did not end within the limit.
        """
        self._integration.close()


def attach_deepspeed(
    engine: Any,
    config: CommConfig | None = None,
    *,
    observer: CollectiveObserver | None = None,
    direction: Direction | None = None,
) -> DeepSpeedReducer:
    """Compress a DeepSpeed engine's gradients from the next backward on; a collective call.

    ::

        engine, _, _, _ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)
        reducer = attach_deepspeed(engine, CommConfig(target="gradient", feedback="ef21", density=0.05))

    With gradient accumulation only the sum of a step's micro-batches is exchanged, also with ZeRO 2: where DeepSpeed
    would reduce each micro-batch, they are accumulated on each rank, in fp32 (memory: one more gradient). With ZeRO 1
    and 2 a rank's error feedback is as large as its whole gradient, so partitioned gradients save no memory.

    Args:
        engine: what ``deepspeed.initialize`` returned, before its first backward.
        config: see :class:`CommConfig`; None takes its defaults. With ``target = "update"`` the engine's optimizer is
            ``torch.optim.SGD``, and ``gradient_clipping`` is 0 (DeepSpeed's default is 1). Where partitions are
            averaged, ``transport`` has no effect, and ``ranks_per_node`` is 1.
        observer: notified of every collective.
        direction: of ``target = "update"``; None takes Adam with beta1 = 0, beta2 = 0.95, clip_rms = 1.

    Raises:
        MissingDependency: deepspeed is not installed.
        CommError: DeepSpeed's settings cannot be combined with compression: ZeRO 3, fp16 (its loss scale), offload,
            pipelines, experts, sequence parallelism, Muon, sparse gradients, ``overlap_comm = true``,
            ``contiguous_gradients = false``, sums instead of means, an optimizer that communicates itself; or a
            DeepSpeed that is built differently from 0.19.8.
    """
    deepspeed, zero, bf16 = import_deepspeed("runtime.zero.stage_1_and_2", "runtime.bf16_optimizer")
    check_engine(engine, deepspeed, CommError)
    config = config or CommConfig()
    refuse_complex(engine.module.named_parameters())
    optimizer = engine.optimizer
    with known_attributes(deepspeed, CommError):
        partitioned, in_bf16 = zero.DeepSpeedZeroOptimizer, bf16.BF16_Optimizer
        _refuse(engine, optimizer)
    stage = int(engine.zero_optimization_stage())
    if config.target == "update" and engine.gradient_clipping() > 0:
        raise CommError(
            f"comm.target = 'update' with gradient_clipping = {engine.gradient_clipping():g}: what is averaged is an "
            "update, which must not be clipped like a gradient",
            "set gradient_clipping = 0, or target = 'gradient'",
        )
    if config.target == "update":
        refuse_other_than_sgd(engine.basic_optimizer)
    integration: Integration
    if type(optimizer) is partitioned:
        check_method(optimizer, "average_tensor", ("tensor", "communication_data_type"), CommError)
        integration = Partitions(engine, config, observer, direction)
    elif stage == 0 or isinstance(optimizer, in_bf16):
        check_method(engine, "buffered_allreduce_fallback", ("grads", "elements_per_buffer"), CommError)
        integration = WholeGradients(engine, config, observer, direction)
    else:
        raise CommError(f"{type(optimizer).__name__} is not supported", "use ZeRO stage 0, 1 or 2 without offload")
    return DeepSpeedReducer(engine, config, integration)


def _refuse(engine: Any, optimizer: Any) -> None:
    """Refuse settings that compression cannot follow.

    Raises:
        CommError: see :func:`attach_deepspeed`.
    """
    stage = int(engine.zero_optimization_stage())
    checks: list[tuple[bool, str, str]] = [
        (stage > 2, f"ZeRO stage {stage}", "use stage 0, 1 or 2, or FSDP2"),
        (engine.fp16_enabled(), "fp16, whose loss scale error feedback cannot follow here", "use bf16"),
        (engine.pipeline_parallelism, "pipeline parallelism", "use data parallelism alone"),
        (engine.has_moe_layers, "experts (MoE)", "average their gradients densely"),
        (engine.sequence_parallel_size > 1, "sequence parallelism", "use data parallelism alone"),
        (not engine.gradient_average, "sums in place of means", "leave out gradient_allreduce_op"),
        (
            any(getattr(part, "sparse", False) is True for part in engine.module.modules()),
            "sparse gradients",
            "make embeddings with sparse=False",
        ),
        (
            not engine.enable_backward_allreduce,
            f"{type(optimizer).__name__}, which averages gradients itself",
            "use an optimizer that leaves communication to the engine",
        ),
        (
            engine.is_deepcompile_enabled(),
            "DeepCompile, which reduces gradients itself",
            "set compile.deepcompile = false",
        ),
        (
            getattr(optimizer, "torch_autocast_gradscaler", None) is not None
            or engine.torch_autocast_z0_gradscaler is not None,
            "float16 autocast, whose loss scale error feedback cannot follow here",
            "set torch_autocast.dtype = bfloat16",
        ),
        ("muon" in type(engine.basic_optimizer).__name__.lower(), "Muon", "use another optimizer"),
    ]
    if stage in (1, 2):
        option = "zero_optimization"
        checks += [
            (getattr(optimizer, "cpu_offload", False), "optimizer offload", f"leave out {option}.offload_optimizer"),
            (getattr(optimizer, "zenflow", False), "ZenFlow", f"leave out {option}.zenflow"),
            (getattr(optimizer, "overlap_comm", False), "overlap_comm", f"set {option}.overlap_comm = false"),
            (
                not getattr(optimizer, "contiguous_gradients", True),
                "contiguous_gradients = false",
                f"set {option}.contiguous_gradients = true",
            ),
            (
                stage == 2 and not engine.managed_gradient_accumulation(),
                "ZeRO 2 with managed_gradient_accumulation = false, which reduces before it knows the step's end",
                "use managed gradient accumulation, or ZeRO 1",
            ),
        ]
    for refused, what, fix in checks:
        if refused:
            raise CommError(f"gradients cannot be compressed with DeepSpeed's {what}", fix)
