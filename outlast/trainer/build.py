"""Builds every part of a run on one rank, restores its checkpoint, and announces the start."""

from __future__ import annotations

import logging
import time

import torch

from outlast.comm import Choice
from outlast.errors import DataError
from outlast.events import CommChosen
from outlast.session import Session
from outlast.session.place import RunPlace
from outlast.trainer.blocks import compile_model
from outlast.trainer.config import Config
from outlast.trainer.engines.build import build_engine
from outlast.trainer.parts import build_model, flops_per_token
from outlast.trainer.progress import Progress
from outlast.trainer.rng import seed_all
from outlast.trainer.run import Run
from outlast.trainer.sources import build_sources

_LOG = logging.getLogger("outlast")


def build_run(config: Config, start: RunPlace, device: torch.device) -> Run:
    """Build every part. Collective."""
    place = start.place
    training, held_out = build_sources(config, place.rank, place.world_size)
    fingerprint = str(training.state().get("fingerprint", ""))
    if not start.agreement.all_equal(int(fingerprint[:15] or "0", 16)):
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

    def on_choice(choice: Choice) -> None:
        """What ``comm.compressor = "auto"`` resolved to."""
        start.events.write(CommChosen(comm=choice.config.describe(), why=choice.why))
        _LOG.info("comm.compressor = auto: %s", choice.why)

    engine = build_engine(model, config, device, observer=start.recorder, on_choice=on_choice)
    progress = Progress(
        every_steps=config.trainer.log_every_steps,
        last_step=config.trainer.steps,
        world_size=place.world_size,
        flops_per_token=flops_per_token(model),
        peak_tflops=config.trainer.peak_tflops,
        quiet=place.rank != 0,
    )
    return Run(config, start, engine, training, held_out, device, progress)


def restore(session: Session, run: Run) -> None:
    """Restore a checkpoint if there is one to go on from, and say what begins. Collective."""
    start_s = time.perf_counter()
    done_step = session.resume()
    begun = run.begin_from() if done_step == 0 and run.config.run.start_from is not None else None
    if session.rank != 0:
        return
    place, attempt = run.place, run.start.attempt
    _LOG.info(
        "%s: attempt %d, %d ranks (%s) on %s", attempt.run, attempt.number, place.world_size, place.source, run.device
    )
    _LOG.info("model: %.1f M parameters; %s; gradients: %s", run.parameters() / 1e6, run.loader.describe(), run.comm)
    if done_step:
        _LOG.info("restored step %d in %.2f s", done_step, time.perf_counter() - start_s)
    if begun is not None:
        _LOG.info("begins with the parameters of step %d of %s", begun.step, run.config.run.start_from)
        for mismatch in begun.not_taken:
            _LOG.info("not taken: %s", mismatch)
