"""Runs a command as ranks on torchelastic's agent, and keeps them running."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outlast.errors import ConfigError, LaunchError, RunDirectoryError
from outlast.events import EventLog
from outlast.launch.attempt import steps_taken
from outlast.launch.failures import RESUME_STATUS, first_line, ranks_failed
from outlast.launch.flags import DEFAULT_PORT
from outlast.launch.goodput import tell_goodput
from outlast.launch.notice import NOTICE_FILE
from outlast.launch.orphans import Guard
from outlast.launch.plan import worker_environment
from outlast.launch.ports import check_port, is_free, is_own_address
from outlast.launch.rendezvous import Rendezvous, resolve
from outlast.launch.spec import LaunchSpec
from outlast.launch.standby.process import check_wanted
from outlast.launch.torch_options import local_ranks, tell_missing_ranks, torch_options

if TYPE_CHECKING:
    from torch.distributed.elastic.rendezvous import RendezvousHandler

    from outlast.launch.notice_relay import NoticeRelay
    from outlast.launch.program_runs import ProgramRuns
    from outlast.launch.rank_output import RankOutput
    from outlast.launch.serving_page import ServingPage

PARENT_DEATH = Path(__file__).with_name("parent_death.py")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT)

TORCHELASTIC_NOISE = (
    "torch.distributed.elastic.multiprocessing.api",  # logs the first failed rank that it sees as the cause
    "torch.distributed.elastic.agent.server.api",
    "torch.distributed.elastic.rendezvous.dynamic_rendezvous",  # logs tracebacks where a store is lost
)
"""Loggers whose messages the agent's and the launcher's own replace."""
CPP_LOG_LEVEL = "TORCH_CPP_LOG_LEVEL"
SPARED = "outlast: the other nodes finished the job before this one was needed"

log = logging.getLogger("outlast.launch")


def launch(spec: LaunchSpec) -> None:
    """Run ``spec.command`` as ranks on this node until all succeed; restart them when one fails or hangs.

    With several nodes, call it once on each. Call it from the main thread: torchelastic handles signals there, and the
    kernel kills the ranks when the thread that started them ends.

    Returns only when all ranks of this node exited with status 0. SIGTERM, SIGINT, SIGHUP, SIGUSR1 and SIGUSR2 are a
    notice. Ranks that obey it (``spec.obeys_notice``) have ``notice_grace_s`` to save and to end; then ``SystemExit``
    is raised, with ``RESUME_STATUS`` if nothing is lost. After the grace or a second signal, the ranks are killed, a
    line says what is durable, and ``SystemExit(128 + signal)`` is raised. SIGQUIT, and any of these where ranks do not
    obey notices, ends all ranks at once (SIGTERM, after ``stop_grace_s`` SIGKILL) and raises the same. If the launcher
    itself is killed, the kernel kills its ranks.

    Raises:
        RanksFailed: ranks failed and no restart was left, or one exited with ``NO_RESTART_STATUS``. The message names
            the ranks, their exit status or signal, their logs and last lines.
        PortInUse: something else listens on the endpoint's port on this host.
        LaunchError: the rendezvous failed, or its store was lost.
        RunDirectoryError: the run's directory cannot be created.
        ConfigError: the flags contradict one another.
        MissingDependency, PortInUse: see ``spec.export`` and ``spec.page``.
    """
    if threading.current_thread() is not threading.main_thread():
        raise LaunchError("launch() was called outside the main thread", "call it from the main thread")
    load_torch()
    rendezvous = resolve(spec.flags)
    if rendezvous.backend == "static" and spec.effective().max_restarts > 0:
        raise ConfigError(
            "a static rendezvous cannot be repeated, so ranks cannot be restarted",
            "use --rdzv-backend c10d, or --max-restarts 0",
        )
    check_wanted(spec)
    ranks = local_ranks(spec.flags.nproc_per_node)
    tell_missing_ranks(spec.flags, ranks)
    options = torch_options(spec.flags)
    _check_log_dir(spec.flags.log_dir)
    host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    events_dir = spec.run_dir / "events"
    try:
        events_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunDirectoryError(
            f"run directory {spec.run_dir} cannot be created: {error.strerror}", "choose another run.dir"
        ) from error
    _check_port(rendezvous)
    agent = events_dir / f"agent_{host}.jsonl"
    from outlast.launch.exporting import start_exporting  # reading a command line imports no numpy
    from outlast.launch.serving_page import serving_page

    with (
        serving_page(spec.page, spec.run_dir, alone=rendezvous.max_nodes == 1) as page,
        start_exporting(spec.export, spec.run_dir, agent, steps_done=steps_taken(spec.run_dir)),
        EventLog(agent, rank=-1) as events,
        _environment(worker_environment(spec, ranks, rendezvous)),
    ):
        _run_agent(spec, rendezvous, ranks, options, host, events, page)


def _run_agent(
    spec: LaunchSpec,
    rendezvous: Rendezvous,
    ranks: int,
    options: Mapping[str, Any],
    host: str,
    events: EventLog,
    page: ServingPage | None,
) -> None:
    from torch.distributed.elastic.multiprocessing.api import SignalException

    from outlast.launch.notice_relay import NoticeRelay
    from outlast.launch.rank_output import RankOutput

    output = RankOutput(spec.flags.log_dir or spec.run_dir / "launcher", host, spec.flags)
    if isinstance(sys.stdout, io.TextIOWrapper):  # ranks' lines, whatever they hold, at once
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    with (
        _signals_restored(spec.flags.signals_to_handle),
        _quiet(*TORCHELASTIC_NOISE),
        NoticeRelay(spec) as relay,
        closing(Guard(output.mark)) as guard,
        _program_runs(spec) as runs,
        _environment({} if relay.file is None else {NOTICE_FILE: str(relay.file)}),
    ):
        try:
            _supervise(spec, rendezvous, ranks, options, host, events, output, relay, guard, runs, page)
        except SignalException as error:
            signum = error.sigval
            if relay.obeyed and signum == relay.notice and not relay.loses:
                log.warning(
                    "outlast: %s came before the ranks had begun a step; there was nothing to save", signum.name
                )
                raise SystemExit(RESUME_STATUS) from error
            if relay.obeyed and relay.notice is not None:
                why = f"the {relay.grace_s:g} s are over" if relay.grace_is_over else "a second signal came"
                _tell_loss(relay.notice, f"{why} before the ranks had ended", spec)
            raise SystemExit(128 + int(signum)) from error


def _check_log_dir(folder: Path | None) -> None:
    """That output can be written where the user wants it; made here, before anything else is."""
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigError(
            f"--log-dir {folder}: no output can be written there: {error.strerror}",
            "give another folder; the launcher reads there why a rank failed",
        ) from error


def _tell_loss(notice: signal.Signals, what: str, spec: LaunchSpec) -> None:
    from outlast.launch.notice_relay import describe_progress

    progress = describe_progress(spec.run_dir) if spec.obeys_notice else "the program knows what is durable"
    log.error("outlast: %s: %s; %s", notice.name, what, progress)


def _supervise(
    spec: LaunchSpec,
    rendezvous: Rendezvous,
    ranks: int,
    options: Mapping[str, Any],
    host: str,
    events: EventLog,
    output: RankOutput,
    relay: NoticeRelay,
    guard: Guard,
    runs: ProgramRuns | None,
    page: ServingPage | None,
) -> None:
    import torch.distributed as dist
    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousError

    from outlast.launch.agent import WatchedAgent
    from outlast.launch.processes import NO_PAUSE_S
    from outlast.launch.rendezvous_errors import rendezvous_failed
    from outlast.launch.trusted_rendezvous import AuthenticatedHandler

    config = spec.effective()
    handler = _handler(rendezvous, spec.run_dir)
    close = True  # close the rendezvous for all nodes when this launcher ends
    master_addr, master_port = rendezvous.host_and_port() if rendezvous.backend == "static" else (None, None)
    agent = WatchedAgent(
        WorkerSpec(
            role=spec.flags.role,
            local_world_size=ranks,
            rdzv_handler=handler,
            entrypoint=sys.executable,
            args=tuple(
                # torchelastic fills in ${local_rank}; "$$" is its plain "$".
                word.replace("$", "$$")
                for word in ("-I", "-S", str(PARENT_DEATH), str(os.getpid()), relay.ignored, *spec.command)
            ),
            max_restarts=config.max_restarts,
            monitor_interval=NO_PAUSE_S,
            master_addr=master_addr,
            master_port=master_port,
            local_addr=rendezvous.local_addr,
            **options,
        ),
        output,
        config,
        spec.run_dir,
        events,
        host,
        relay,
        guard,
        runs,
        page,
    )
    try:
        result = agent.run()
        if runs is not None and relay.notice is None and 0 in agent.ranks:
            tell_goodput(spec.run_dir, events)
        if result is None:  # the job ended while this node was a spare
            log.warning(SPARED)
        elif result.is_failed() and relay.notice is not None and agent.only_killed:
            close = False
            if not relay.loses:
                raise SystemExit(RESUME_STATUS)
            _tell_loss(relay.notice, "ranks died before they had saved", spec)
            raise SystemExit(128 + relay.notice)
        elif result.is_failed():
            # With a variable number of nodes the others may go on without this one.
            close = rendezvous.min_nodes == rendezvous.max_nodes
            raise ranks_failed(
                host,
                agent.failures,
                restarts=agent.restarts,
                allowed=config.max_restarts,
                run_dir=spec.run_dir,
            )
        agent.remove_shared_memory()
        if agent.resumable:
            # All nodes end; a closed rendezvous in a store that lasts could not be joined by the same job's next start.
            close = rendezvous.backend == "c10d"
            raise SystemExit(RESUME_STATUS)
    except SignalException:
        close = False
        agent.remove_shared_memory()
        raise
    except (RendezvousError, dist.DistError) as error:
        if relay.notice is not None:  # the node that holds the store has ended before this one
            close = False
            raise SignalException(f"the rendezvous was lost: {error}", sigval=relay.notice) from error
        spare = not agent.joined and isinstance(handler, AuthenticatedHandler) and handler.spare
        if spare and isinstance(error, RendezvousClosedError):
            log.warning(SPARED)
            return
        for failure in agent.untold:
            log.error("outlast: rank %d (pid %d) %s", failure.rank, failure.pid, failure.reason)
        raise rendezvous_failed(error, rendezvous, handler) from error
    finally:
        agent.close()
        if close and agent.joined:  # never that of another job, or one that goes on without this node
            handler.shutdown()


def _handler(rendezvous: Rendezvous, run_dir: Path) -> RendezvousHandler:
    from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousParameters
    from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

    from outlast.launch.trusted_rendezvous import dynamic_handler

    try:
        params = RendezvousParameters(
            backend=rendezvous.backend,
            endpoint=rendezvous.endpoint,
            run_id=rendezvous.run_id,
            min_nodes=rendezvous.min_nodes,
            max_nodes=rendezvous.max_nodes,
            local_addr=rendezvous.local_addr,
            **{key: int(value) if key == "rank" else value for key, value in _conf(rendezvous).items()},
        )
        if rendezvous.backend == "c10d":
            return dynamic_handler(params, run_dir)
        return get_rendezvous_handler(params)
    except RendezvousError as error:
        raise LaunchError(
            f"no connection to the rendezvous at {rendezvous.endpoint}: {first_line(error.__cause__ or error)}",
            "make sure the launcher on that host is running, its port is open, and its name resolves here",
        ) from error
    except ValueError as error:
        raise ConfigError(f"the rendezvous flags are wrong: {error}") from error


def _check_port(rendezvous: Rendezvous) -> None:
    """Detect a port in use before torch does: torch's client waits for ever if the server there stays silent."""
    host, port = rendezvous.host_and_port()
    if port == -1:
        port = DEFAULT_PORT if rendezvous.backend == "static" else 29400  # torch's own default of c10d
    if rendezvous.backend == "static":
        if rendezvous.conf["rank"] == "0":
            check_port(host, port, may_join=False)
    elif rendezvous.backend == "c10d" and rendezvous.conf.get("store_type", "tcp") == "tcp":
        hosts = rendezvous.conf.get("is_host", "").lower()
        if hosts in ("1", "true", "t", "yes", "y"):
            check_port(host, port, may_join=False)
        elif not hosts and _is_this_host(host):
            check_port(host, port, may_join=True)


def _is_this_host(host: str) -> bool:
    """As torchelastic decides it, which fails where this host's own name does not resolve."""
    from torch.distributed.elastic.rendezvous.utils import _matches_machine_hostname

    try:
        return bool(_matches_machine_hostname(host))
    except OSError:
        return is_own_address(host)


def _conf(rendezvous: Rendezvous) -> dict[str, str]:
    """The rendezvous' options; who holds the store is decided here where torchelastic cannot."""
    conf = dict(rendezvous.conf)
    if rendezvous.backend != "c10d" or "is_host" in conf:
        return conf
    try:
        socket.getaddrinfo(socket.gethostname(), None)
    except OSError:
        host, port = rendezvous.host_and_port()
        conf["is_host"] = str(is_own_address(host) and (port <= 0 or is_free(port)))
    return conf


def _program_runs(spec: LaunchSpec) -> contextlib.AbstractContextManager[ProgramRuns | None]:
    from outlast.launch.program_runs import ProgramRuns

    if not spec.is_program:
        return contextlib.nullcontext()
    return closing(ProgramRuns(spec.run_dir, spec.config.look_every_s))


@contextlib.contextmanager
def _environment(added: dict[str, str]) -> Iterator[None]:
    """Add variables to this process's environment for a while; torchelastic passes it on to the ranks."""
    os.environ.update(added)
    try:
        yield
    finally:
        for key in added:
            os.environ.pop(key, None)


@contextlib.contextmanager
def _quiet(*names: str) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for logger in map(logging.getLogger, names):
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL)
        yield


def load_torch() -> None:
    """Load torch without its stores' warnings, which are frames of C++ for each lost connection. Ranks keep theirs."""
    if "torch" in sys.modules or CPP_LOG_LEVEL in os.environ:
        return
    os.environ[CPP_LOG_LEVEL] = "ERROR"
    try:
        import torch.distributed  # noqa: F401
    finally:
        del os.environ[CPP_LOG_LEVEL]


@contextlib.contextmanager
def _signals_restored(handled: str) -> Iterator[None]:
    """Restore the signal handlers that torchelastic replaces: of these, by name, and of its own."""
    named = {signal.Signals[name.strip()] for name in handled.split(",")}
    before = {one: signal.getsignal(one) for one in {*SIGNALS, *named}}
    try:
        yield
    finally:
        for one, handler in before.items():
            if handler is not None:
                signal.signal(one, handler)
