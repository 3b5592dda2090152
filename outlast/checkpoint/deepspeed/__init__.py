"""outlast as DeepSpeed's checkpoint engine, ZeRO stages 0 to 3: the state is copied while training goes on.

DeepSpeed collects the state and puts it back; :class:`Checkpointer` copies, writes, commits and verifies it. DeepSpeed
has few extension points, so besides ``engine.checkpoint_engine`` four methods of one *object* are replaced, after a
check of their signatures:

* ``engine.save_checkpoint``: runs DeepSpeed's own, and saves what that passes to ``save`` as one step. A
  ``CheckpointEngine`` is never told when a decoupled checkpoint has all its files.
* ``engine.load_checkpoint``: chooses a tag that is committed and undamaged on all ranks. DeepSpeed trusts a file
  ``latest``, which it overwrites in place.
* ``engine._get_all_ckpt_names``: DeepSpeed finds its files by a glob.
* ``engine._copy_recovery_script``: what DeepSpeed copies there does not read these checkpoints.

The wait before the update needs no replaced method: right before it updates anything, ``engine.step`` asks a decoupled
engine for what it has to commit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from outlast.checkpoint.config import CheckpointConfig
from outlast.checkpoint.deepspeed.engine import DeepSpeedCheckpointEngine as DeepSpeedCheckpointEngine
from outlast.checkpoint.deepspeed.passing import SEAMS
from outlast.deepspeed_compat import TESTED_VERSION, check_engine, check_method, import_deepspeed, known_attributes
from outlast.errors import CheckpointError
from outlast.events import Event

__all__ = ["DeepSpeedCheckpointEngine", "attach"]

_CALLED = {
    "_get_ckpt_name": ("checkpoints_path", "tag", "mp_placeholder", "pp_placeholder"),
    "_commit_decoupled_checkpoint": (),
}


def attach(
    engine: Any,
    config: CheckpointConfig | None = None,
    *,
    on_event: Callable[[Event], None] | None = None,
) -> DeepSpeedCheckpointEngine:
    """Have a DeepSpeed engine save and load through outlast from now on.

    ::

        engine, _, _, _ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)
        with outlast.checkpoint.deepspeed.attach(engine):
            engine.load_checkpoint("runs/mine/checkpoints")
            for step in range(engine.global_steps, 1000):
                engine.backward(engine(batch(step)))
                engine.step()
                if (step + 1) % 10 == 0:
                    engine.save_checkpoint("runs/mine/checkpoints")

    Parameters and optimizer state are copied while the next forward and backward run; buffers, and what
    ``client_state`` holds, before ``save_checkpoint`` returns. ``engine.step`` waits for what is not copied yet, right
    before the update.

    Args:
        engine: what ``deepspeed.initialize`` returned.
        config: None takes the defaults; ``every_steps`` and ``url`` are ignored. ``keep_last`` counts steps, whatever
            their tags.
        on_event: takes events, from the training thread and from background threads; without it, failed saves are still
            logged (logger ``outlast``).

    Raises:
        MissingDependency: deepspeed is not installed.
        CheckpointError: DeepSpeed is configured for something that cannot be saved: pipelines, experts, offload to
            NVMe, ZenFlow, SuperOffload, node-local storage, universal checkpoints, its own checkpoint writers; or its
            version differs too much from 0.19.8.
    """
    deepspeed, base_module = import_deepspeed("runtime.checkpoint_engine.checkpoint_engine")
    check_engine(engine, deepspeed, CheckpointError)
    with known_attributes(deepspeed, CheckpointError):
        base = base_module.CheckpointEngine
        _refuse(engine)
    for method, arguments in (SEAMS | _CALLED).items():
        check_method(engine, method, arguments, CheckpointError)
    unknown = [name for name in dir(base) if name[0] != "_" and not hasattr(DeepSpeedCheckpointEngine, name)]
    if unknown:
        raise CheckpointError(
            f"the CheckpointEngine of deepspeed {deepspeed.__version__} has methods that outlast does not know: "
            f"{', '.join(unknown)}",
            f"use deepspeed {TESTED_VERSION}",
        )
    base.register(DeepSpeedCheckpointEngine)
    return DeepSpeedCheckpointEngine(engine, config or CheckpointConfig(), on_event)


def _refuse(engine: Any) -> None:
    """Raise :class:`CheckpointError` for a configuration that outlast cannot save, see :func:`attach`."""
    former = engine.checkpoint_engine
    offloaded = [engine.zero_offload_param(), engine.zero_offload_optimizer()]
    checks: list[tuple[bool, str, str]] = [
        (former is None, "an engine without an optimizer", "save its weights with save_16bit_model"),
        (
            former is not None and former.is_decoupled(),
            f"{type(former).__name__}, which writes checkpoints itself",
            "leave out checkpoint.writer and datastates, and attach once",
        ),
        (engine.pipeline_parallelism, "pipeline parallelism", "use data parallelism alone"),
        (engine.has_moe_layers, "experts (MoE)", "use DeepSpeed's own checkpoints"),
        (
            any(to is not None and str(getattr(to.device, "value", to.device)) == "nvme" for to in offloaded),
            "offload to NVMe, whose files it copies itself",
            "offload to the CPU",
        ),
        (bool(engine.zenflow), "ZenFlow, which updates outside of engine.step", "leave out zenflow"),
        (engine.super_offload(), "SuperOffload, which updates during the backward", "leave out super_offload"),
        (engine.use_node_local_storage(), "node-local storage", "set checkpoint.use_node_local_storage = false"),
        (engine.load_universal_checkpoint(), "universal checkpoints", "set checkpoint.load_universal = false"),
    ]
    for refused, what, fix in checks:
        if refused:
            raise CheckpointError(f"checkpoints cannot be saved by outlast with DeepSpeed's {what}", fix)
