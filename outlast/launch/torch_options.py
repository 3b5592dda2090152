"""torchrun's flags that torchelastic carries out by itself: checked here, and handed to its WorkerSpec."""

from __future__ import annotations

import dataclasses
import logging
import re
import shutil
from typing import Any

from outlast.errors import ConfigError, OutOfRange
from outlast.launch.flags import LaunchFlags

log = logging.getLogger("outlast.launch")


def local_ranks(nproc_per_node: str) -> int:
    """How many ranks ``--nproc-per-node`` starts here.

    Raises:
        OutOfRange: it is no number and no device's name, there is no such device, or the number is less than 1.
    """
    from torch.distributed.run import determine_local_world_size

    try:
        ranks = int(determine_local_world_size(nproc_per_node))
    except ValueError as error:
        raise OutOfRange(f"--nproc-per-node {nproc_per_node}: {error}", "give a number, auto, cpu or gpu") from error
    if ranks < 1:
        raise OutOfRange(f"--nproc-per-node {nproc_per_node} starts no ranks", "give 1 or more, auto, cpu or gpu")
    return ranks


def tell_missing_ranks(flags: LaunchFlags, ranks: int) -> None:
    """One line for each flag that names local ranks which this node does not have; nodes may differ in size."""
    for flag, text in (
        ("--redirects", flags.redirects),
        ("--tee", flags.tee),
        ("--local-ranks-filter", flags.local_ranks_filter),
    ):
        named = re.findall(r"(\d+):" if flag != "--local-ranks-filter" else r"\d+", text)
        missing = [one for one in named if int(one) >= ranks]
        if missing:
            log.warning(
                "outlast: %s %s names local rank %s; this node has %s",
                flag,
                text,
                ", ".join(missing),
                "local rank 0 alone" if ranks == 1 else f"local ranks 0 to {ranks - 1}",
            )


def torch_options(flags: LaunchFlags) -> dict[str, Any]:
    """Arguments for torchelastic's WorkerSpec; only those that were asked for.

    Raises:
        ConfigError: this machine, or this version of torch, cannot do what was asked for.
    """
    from torch import __version__
    from torch.distributed.elastic.agent.server.api import WorkerSpec

    options: dict[str, Any] = {}
    for name in ("duplicate_stdout_filters", "duplicate_stderr_filters"):
        if text := getattr(flags, name):
            options[name] = split_words(text)
    if flags.virtual_local_rank:
        options["virtual_local_rank"] = True
    if flags.event_log_handler != "null":
        options["event_log_handler"] = _event_log_handler(flags.event_log_handler)
    if flags.numa_binding:
        options["numa_options"] = _numa_options(flags.numa_binding)
    known = {field.name for field in dataclasses.fields(WorkerSpec)}
    for name in options:
        if name not in known:
            raise ConfigError(f"torch {__version__} has no --{name.replace('_', '-')}", "leave it out, or update torch")
    return options


def split_words(text: str) -> list[str]:
    """``a,b`` as two words; two commas are one that is meant."""
    return [word.replace("\0", ",") for word in text.replace(",,", "\0").split(",") if word]


def _event_log_handler(name: str) -> str:
    from torch.distributed.elastic.events.handlers import get_logging_handler

    try:
        get_logging_handler(name)
    except KeyError as error:
        raise ConfigError(f"--event-log-handler {name}: torch has no handler of this name", "use console") from error
    return name


def _numa_options(mode: str) -> Any:
    from torch import __version__, cuda

    try:
        from torch.numa.binding import AffinityMode, NumaOptions
    except ImportError as error:
        raise ConfigError(f"torch {__version__} has no --numa-binding", "leave it out, or update torch") from error
    if not cuda.is_available():
        raise ConfigError(
            f"--numa-binding {mode} binds ranks to CPUs near their GPUs, and this machine has no GPU",
            "leave it out; numactl or taskset bind a command to CPUs: --no-python numactl … python train.py",
        )
    if shutil.which("numactl") is None:
        raise ConfigError(
            f"--numa-binding {mode} needs numactl, which is not installed", "install it: apt-get install numactl"
        )
    return NumaOptions(affinity_mode=AffinityMode(mode))
