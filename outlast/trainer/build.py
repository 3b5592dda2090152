"""Builds every part of a run on one rank, restores its checkpoint, and announces the start."""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from dataclasses import replace

import torch

from outlast.comm import Choice
from outlast.diagnostics.live.step_delays import StepDelays
from outlast.diagnostics.numerics import NumericsEvent, NumericsWatch
from outlast.errors import DataError
from outlast.events import CommChosen, EventLog, RunStarted
from outlast.launch import Notice, Place
from outlast.launch.attempt import Attempt
from outlast.launch.rank_records import RankRecords
from outlast.session.agreement import StepAgreement
from outlast.session.scheduled_checkpoints import ScheduledCheckpoints
from outlast.trainer.blocks import compile_model
from outlast.trainer.config import Config
from outlast.trainer.engines.base import Engine
from outlast.trainer.engines.build import build_engine
from outlast.trainer.parts import build_model, flops_per_token
from outlast.trainer.progress import Progress
from outlast.trainer.rng import seed_all
from outlast.trainer.run import Run
from outlast.trainer.sources import build_sources

_LOG = logging.getLogger("outlast")


def build_run(
    config: Config,
    place: Place,
    device: torch.device,
    attempt: Attempt,
    notice: Notice,
    agreement: StepAgreement,
    stack: ExitStack,
) -> Run:
    """Build every part; ``stack`` closes those that hold resources."""
    ring_capacity = config.diagnostics.ring_capacity
    records = RankRecords(attempt, place.rank, place.generation, ring_capacity=ring_capacity)
    stack.callback(records.close)
    records.heartbeat.beat("setup", 0)
    events, recorder = records.events, records.recorder
    delays = StepDelays(events)
    delays.open()
    stack.callback(delays.close)

    training, held_out = build_sources(config, place.rank, place.world_size)
    fingerprint = str(training.state().get("fingerprint", ""))
    if not agreement.all_equal(int(fingerprint[:15] or "0", 16)):
        raise DataError(
            f"the training data of rank {place.rank} differ from its peers' ({training.describe()}, fingerprint "
            f"{fingerprint})",
            "make sure every node has the same files",
        )
    if held_out is None and place.rank == 0:
        _LOG.info("no data are held out: nothing is evaluated")
    seed_all(config.run.seed, place.rank)
    model = build_model(config).to(device)
    if config.trainer.compile:
        compile_model(model)
    engine = build_engine(
        model, config, device, observer=recorder, on_choice=lambda choice: _log_choice(choice, events)
    )
    stack.callback(engine.close)
    checkpoints = ScheduledCheckpoints(
        config.checkpoint, attempt, place, agreement, device=device, events=events, recorder=recorder
    )
    checkpointer = stack.enter_context(checkpoints.checkpointer)
    if config.trainer.engine != "deepspeed":  # which takes the parameters themselves away
        checkpointer.watch(model)
    return Run(
        config=config,
        place=place,
        attempt=attempt,
        engine=engine,
        loader=training,
        held_out=held_out,
        checkpoints=checkpoints,
        records=records,
        delays=delays,
        notice=notice,
        agreement=agreement,
        numerics=_numerics(engine, config, place, records, stack),
        progress=Progress(
            every_steps=config.trainer.log_every_steps,
            last_step=config.trainer.steps,
            world_size=place.world_size,
            flops_per_token=flops_per_token(model),
            peak_tflops=config.trainer.peak_tflops,
            quiet=place.rank != 0,
        ),
    )


def _numerics(engine: Engine, config: Config, place: Place, records: RankRecords, stack: ExitStack) -> NumericsWatch:
    """The watch on the run's numbers; what it finds becomes events, and a line in the log of rank 0."""
    settings = config.numerics
    if config.trainer.engine == "deepspeed":  # which has gradients and copies of parameters of its own
        settings = replace(settings, not_finite="off", rerun_batches=0, replicas_every_steps=0, drift_every_steps=0)

    def tell(event: NumericsEvent) -> None:
        records.events.write(event)
        if place.rank == 0:
            _LOG.warning("step %d: %s", event.step, event.told)

    watch = NumericsWatch(
        engine.model,
        engine.optimizer,
        settings,
        on_event=tell,
        ranks=tuple(range(place.world_size)),
        recorder=records.recorder,
        follows_updates=False,
    )
    stack.callback(watch.close)
    return watch


def restore(run: Run, device: torch.device, resume: str) -> None:
    """Restore a checkpoint if asked to, and announce the start."""
    start_s = time.perf_counter()
    restored = run.restore(resume) if resume != "never" else None
    begun = run.begin_from() if restored is None and run.config.run.start_from is not None else None
    trained = [parameter for parameter in run.engine.model.parameters() if parameter.requires_grad]
    parameters = sum(int(getattr(one, "ds_numel", one.numel())) for one in trained)  # ZeRO 3 has taken the entries away
    comm = run.config.comm.describe()
    run.records.events.write(
        RunStarted(
            attempt=run.attempt.number,
            world_size=run.place.world_size,
            device=str(device),
            first_step=run.first_step,
            last_step=run.last_step,
            parameters=parameters,
            comm=comm,
        )
    )
    if run.place.rank == 0:
        _LOG.info(
            "%s: attempt %d, %d ranks (%s) on %s",
            run.attempt.run,
            run.attempt.number,
            run.place.world_size,
            run.place.source,
            device,
        )
        _LOG.info(
            "model: %.1f M parameters; %s; gradients: %s",
            parameters / 1e6,
            run.loader.describe(),
            comm,
        )
        if restored is not None:
            _LOG.info("restored step %d in %.2f s", restored.step, time.perf_counter() - start_s)
        if begun is not None:
            _LOG.info("begins with the parameters of step %d of %s", begun.step, run.config.run.start_from)
            for mismatch in begun.not_taken:
                _LOG.info("not taken: %s", mismatch)


def _log_choice(choice: Choice, events: EventLog) -> None:
    """Record what ``comm.compressor = "auto"`` resolved to."""
    events.write(CommChosen(comm=choice.config.describe(), why=choice.why))
    _LOG.info("comm.compressor = auto: %s", choice.why)
