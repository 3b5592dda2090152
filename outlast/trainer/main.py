"""One rank from start to end: find its place, join the process group, restore, train."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from outlast.config import Overrides, load, split_overrides, to_toml
from outlast.diagnostics import build_report
from outlast.diagnostics.report.html_file import write_html
from outlast.errors import ConfigError, DiagnosticsError, EndedEarly, NotDurable, OutlastError
from outlast.events import GoodputMeasured
from outlast.launch import Notice, Place, find_place
from outlast.launch.failures import NO_RESTART_STATUS, RESUME_STATUS, WATCHED
from outlast.launch.place import Single
from outlast.session import Session, process_group
from outlast.session.agreement import StepAgreement
from outlast.session.place import RunPlace
from outlast.trainer import logs
from outlast.trainer.build import build_run, restore
from outlast.trainer.config import Config
from outlast.trainer.factories import search_beside
from outlast.trainer.loop import train
from outlast.trainer.parts import check_factories
from outlast.trainer.run_directory import run_directory
from outlast.trainer.sources import check_data
from outlast.trainer.summary import render_summary

_LOG = logging.getLogger("outlast")


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m outlast.trainer CONFIG [--resume R] [--section.key VALUE …]``; returns the exit status."""
    try:
        file, overrides = _parse(sys.argv[1:] if arguments is None else arguments)
    except ConfigError as error:
        return _report_failure(error)
    return start_rank(file, overrides)


def start_rank(file: Path, overrides: Overrides) -> int:
    """Train on this rank with the settings of a file; returns the exit status.

    0: the last step was done. 1: it failed. 2: a setting is wrong. ``RESUME_STATUS``: a notice ended it, and what was
    done is durable. ``NO_RESTART_STATUS`` (under a launcher, in place of 1 and 2): it failed, and would fail again if
    it were restarted.
    """
    get_error_handler().initialize()
    try:
        config = load(Config, file, overrides=overrides)
        search_beside(file)
        done = run_rank(config, find_place())
    except Exception as error:
        return _report_failure(error)
    return 0 if done else RESUME_STATUS


def _parse(arguments: Sequence[str]) -> tuple[Path, dict[str, str]]:
    rest, overrides = split_overrides(arguments)
    if "--resume" in rest and rest.index("--resume") + 1 < len(rest):
        at = rest.index("--resume")
        overrides = {"run.resume": rest[at + 1]} | overrides
        del rest[at : at + 2]
    if len(rest) != 1 or rest[0].startswith("-"):
        raise ConfigError(
            f"expected one CONFIG file, got {rest}",
            "usage: python -m outlast.trainer CONFIG [--resume R] [--section.key VALUE …]",
        )
    return Path(rest[0]), overrides


def run_rank(config: Config, place: Place) -> bool:
    """Train with resolved settings at a known place; to be called in the main thread. Collective over all ranks.

    Returns:
        Whether the last step was done; False: a notice ended the run before, at a step that is durable.

    Raises:
        OutlastError: see the tree in :mod:`outlast.errors`.
    """
    if config.export.targets and WATCHED not in os.environ:
        raise ConfigError(
            f"[export] asks for {', '.join(config.export.targets)}, but no outlast launch runs here, which exports",
            "start the ranks with outlast launch (on Slurm: slurm/launch.sbatch), or leave [export] out",
        )
    if config.page.port is not None and WATCHED not in os.environ:
        raise ConfigError(
            "[page] asks for a page, but no outlast launch runs here, which serves it",
            "start the ranks with outlast launch, or leave [page] out: outlast report RUN --live serves it too",
        )
    with ExitStack() as stack:
        logs.set_up_terminal(place.rank)
        stack.callback(logs.shut_down)
        notice = stack.enter_context(Notice(config.launch.notice_grace_s))
        _tell_left_over(place)
        check_factories(config)
        check_data(config)
        trainer = config.trainer
        if trainer.deterministic:
            process_group.make_deterministic()
        device = process_group.choose_device(trainer.device, place, shared=trainer.backend == "gloo")
        process_group.start(place, device, timedelta(seconds=trainer.timeout_s), trainer.backend)
        stack.callback(dist.destroy_process_group)
        agreement = StepAgreement(place.rank, place.world_size, notice)
        place = agreement.of_this_start(place)
        if place.generation == 0 and agreement.came():  # later, memory may hold what storage lacks
            _LOG.warning("%s came before the run had begun", notice.name or "a notice to another node")
            return False
        start = stack.enter_context(
            RunPlace(
                run_directory(config),
                place,
                agreement,
                resuming=config.run.resume != "never",
                settings=to_toml(config),
                loop_tells=True,
                ring_capacity=config.diagnostics.ring_capacity,
            )
        )
        logs.set_up_file(start.attempt.log_path(place.rank), place.rank, stacks=WATCHED in os.environ)
        resume: Any = int(config.run.resume) if config.run.resume.isdecimal() else config.run.resume
        try:
            with _leaving_is_an_error(start, config):
                run = build_run(config, start, device)
            with Session(start, run, checkpoint=config.checkpoint, numerics=config.numerics, resume=resume) as session:
                with _leaving_is_an_error(start, config):
                    restore(session, run)
                    train(session, run)
                session.end()
        except NotDurable:
            _write_report(start, session)
            raise
        except Exception:
            _LOG.exception("rank %d failed", place.rank)
            raise
        _write_report(start, session)
        if session.ended_by and place.rank == 0:
            saved = f"step {session.done_step} is durable" if session.done_step else "no step had been done"
            _LOG.warning("ended by a %s: %s; --resume auto goes on from there", session.ended_by, saved)
        return not session.ended_by


@contextmanager
def _leaving_is_an_error(start: RunPlace, config: Config) -> Iterator[None]:
    """What a factory or a dataset ends by ``sys.exit()`` is not done."""
    try:
        yield
    except SystemExit as error:
        if error.code not in (None, 0):
            raise
        rank, step = start.place.rank, start.recorder.step if start.recorder is not None else 0
        raise EndedEarly(
            f"rank {rank} called sys.exit() in step {step} of {config.trainer.steps}, before training was done",
            "its traceback is in this rank's log; end a run early with fewer trainer.steps, or with SIGTERM",
        ) from error


def _tell_left_over(place: Place) -> None:
    """A process that no launcher started may be thought to be one of many."""
    found = [f"{key}={os.environ[key]}" for key in Single.IGNORED if os.environ.get(key)]
    if place.source == "single" and found and os.environ.get("WORLD_SIZE") != "1":
        _LOG.warning("%s: ignored, because no RANK is set: this process trains alone", " ".join(found))


def _write_report(start: RunPlace, session: Session) -> None:
    """Write the report and print its summary; on rank 0, after all ranks have finished.

    After a notice every second counts; the report can be made later. One that cannot be made ends no run whose work is
    done: it can be made again from the events.
    """
    if start.place.rank != 0 or session.ended_by:
        return
    path = start.path / "report.html"
    try:
        report = build_report(start.path)
        goodput = report.goodput
        start.events.write(GoodputMeasured(wall_s=goodput.wall_s, seconds=goodput.parts_s()))
        write_html(report, path)
        render_summary(report, Console(), path)
    except (DiagnosticsError, OSError) as error:  # a pipe that nobody reads, or a terminal's log on a full disk, too
        what = error.what if isinstance(error, DiagnosticsError) else error
        _LOG.warning("no report was written (`outlast report %s` makes it later): %s", start.path, what)


def _report_failure(error: Exception) -> int:
    """Tell the launcher and the user (with a traceback only for what outlast did not raise); return the exit status."""
    try:
        get_error_handler().record_exception(error)
    except OSError as problem:  # the error itself matters more
        print(f"outlast: the launcher cannot be told: {problem}", file=sys.stderr, flush=True)
    print(f"outlast: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    if not isinstance(error, OutlastError):
        sys.excepthook(type(error), error, error.__traceback__)
    restartable = not isinstance(error, OutlastError) or error.restartable
    if not restartable and "TORCHELASTIC_RUN_ID" in os.environ:
        return NO_RESTART_STATUS
    return 2 if isinstance(error, ConfigError) else 1
