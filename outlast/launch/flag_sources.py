"""Where the launcher's flags come from: the command line, and torchrun's environment variables (``PET_NNODES`` …)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from outlast.errors import ConfigError
from outlast.launch.flags import NO_FLAGS, LaunchFlags

PREFIX = "PET_"
"""Of the environment variables that torchrun reads, and Kubeflow sets: ``PET_NNODES`` stands for ``--nnodes``."""
OTHER_NAMES = {"--shutdown-timeout": "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"}
"""Variables that stand for a flag if neither the flag nor ``PET_…`` is given."""
SWITCHES = ("--standalone", "--virtual-local-rank")
"""Flags without a value."""
BACKENDS = ("c10d", "static")
TRUE, FALSE = ("1", "true", "yes"), ("0", "false", "no", "")

log = logging.getLogger("outlast.launch")


@dataclass(frozen=True)
class Given:
    """A flag's value and where it stands."""

    value: str
    source: str
    """``--nnodes 2`` or ``PET_NNODES=2``."""


def arguments_from_environment(given: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """torchrun's variables as flags, but for those that stand on the command line.

    The command line comes before a variable of the same flag, as with torchrun; one line says so if they differ.

    Args:
        given: the command line, with long names.
        environ: the environment.

    Raises:
        ConfigError: a flag of torchrun's that does not exist here, or two that contradict one another; the message
            names both, and where they stand.
    """
    named = _from_command_line(given)
    found = dict(named)
    added: list[str] = []
    for flag in (*(flag_of(field.name) for field in fields(LaunchFlags)), *NO_FLAGS):
        variable = next((name for name in _variables(flag) if environ.get(name)), None)
        if variable is None:
            continue
        value, source = environ[variable], f"{variable}={environ[variable]}"
        if flag in SWITCHES and not read_switch(variable, value):
            continue
        if flag in named:
            if named[flag].value != value and flag not in SWITCHES:
                log.warning("outlast: %s, on the command line, is taken; %s is not", named[flag].source, source)
            continue
        found[flag] = Given(value, source)
        added += [flag] if flag in SWITCHES else [flag, value]
    for flag, (why, instead) in NO_FLAGS.items():
        if flag in found:
            raise ConfigError(f"{found[flag].source}: outlast launch has no {flag}, because {why}", instead)
    backend = found.get("--rdzv-backend")
    if backend is not None and backend.value not in BACKENDS:
        raise ConfigError(
            f"{backend.source}: restarts and notices over several nodes need torch's own store, which a "
            f"launcher holds; rendezvous over {backend.value} has none",
            "use c10d with --rdzv-endpoint HOST:PORT, the same on all nodes; no other service has to run",
        )
    refuse_contradictions(found)
    _tell_unused(found, environ)
    return added


def name_variables(text: str, given: Sequence[str], environ: Mapping[str, str]) -> str:
    """Which of the flags that a message speaks of stand in variables, as a line; empty if none does."""
    named = _from_command_line(given)
    found = {
        flag: variable
        for flag in (flag_of(field.name) for field in fields(LaunchFlags))
        if flag in text.replace("=", " ").split() and flag not in named
        for variable in _variables(flag)
        if environ.get(variable)
    }
    return ", ".join(f"{flag} is set by {variable}={environ[variable]}" for flag, variable in found.items())


def flag_of(name: str) -> str:
    """``--node-rank`` for the field ``node_rank``."""
    return f"--{name.replace('_', '-')}"


def read_switch(variable: str, value: str) -> bool:
    """Whether a variable that stands for a flag without a value sets it.

    Raises:
        ConfigError: the value is neither true nor false.
    """
    if value.lower() not in (*TRUE, *FALSE):
        raise ConfigError(f"{variable}={value} is neither true nor false", "set it to 1 or 0")
    return value.lower() in TRUE


def refuse_contradictions(found: Mapping[str, Given]) -> None:
    """Raise ConfigError for two flags that cannot both be meant, naming both."""

    def contradict(one: str, other: str, why: str) -> None:
        raise ConfigError(
            f"{found[one].source} and {found[other].source} contradict one another: {why}", "leave one of them out"
        )

    several = "--nnodes" in found and found["--nnodes"].value not in ("1", "1:1")
    if "--standalone" in found:
        if several:
            contradict("--standalone", "--nnodes", "with the first, this node trains by itself")
        if "--rdzv-endpoint" in found:
            contradict("--standalone", "--rdzv-endpoint", "with the first, no other node is met")
        if found.get("--node-rank", Given("0", "")).value != "0":
            contradict("--standalone", "--node-rank", "with the first, there is no other node")
        if found.get("--rdzv-backend", Given("c10d", "")).value != "c10d":
            contradict("--standalone", "--rdzv-backend", "with the first, the backend is c10d")
    if "--rdzv-endpoint" in found:
        host, port = _host_and_port(found["--rdzv-endpoint"].value)
        address, node_port = found.get("--master-addr"), found.get("--master-port")
        if address is not None and address.value.strip("[]") != host:
            contradict("--rdzv-endpoint", "--master-addr", "both say where the nodes meet")
        if node_port is not None and port and node_port.value != port:
            contradict("--rdzv-endpoint", "--master-port", "both say where the nodes meet")
    rank = found.get("--node-rank")
    conf = dict(item.strip().partition("=")[::2] for item in found.get("--rdzv-conf", Given("", "")).value.split(","))
    if rank is not None:
        if conf.get("rank", rank.value) != rank.value:
            contradict("--node-rank", "--rdzv-conf", "both number this node")
        hosts = conf.get("is_host", "").lower()
        if several and hosts and (hosts in ("1", "true", "t", "yes", "y")) != (rank.value == "0"):
            contradict("--node-rank", "--rdzv-conf", "node 0, and no other, hosts the rendezvous")


def _tell_unused(found: Mapping[str, Given], environ: Mapping[str, str]) -> None:
    """One line for settings that look as if they were meant for this launch, and have no effect on it."""
    alone = "--standalone" in found
    if alone and "--master-addr" in found:
        log.warning("outlast: %s is not used with --standalone", found["--master-addr"].source)
    nodes = any(flag in found for flag in ("--nnodes", "--rdzv-endpoint", "--master-addr", "--standalone"))
    world = environ.get("WORLD_SIZE", "")
    if not nodes and world.isdecimal() and int(world) > 1 and "MASTER_ADDR" in environ and "RANK" in environ:
        log.warning(
            "outlast: RANK=%s, WORLD_SIZE=%s and MASTER_ADDR=%s are set as in a job of several nodes, but without "
            "--nnodes this node trains by itself; for one job: --nnodes $WORLD_SIZE --node-rank $RANK --master-addr "
            "$MASTER_ADDR",
            environ["RANK"],
            world,
            environ["MASTER_ADDR"],
        )


def _variables(flag: str) -> tuple[str, ...]:
    own = f"{PREFIX}{flag[2:].replace('-', '_').upper()}"
    return (own, OTHER_NAMES[flag]) if flag in OTHER_NAMES else (own,)


def _from_command_line(words: Sequence[str]) -> dict[str, Given]:
    """The flags among the words, by their names with dashes; the last one of each counts."""
    found: dict[str, Given] = {}
    queue = list(words)
    while queue:
        word = queue.pop(0)
        if not word.startswith("--") or "." in word.partition("=")[0]:
            continue
        name, equals, value = word.partition("=")
        flag = name.replace("_", "-")
        if flag in SWITCHES:
            found[flag] = Given("1", flag)
        elif equals or queue:
            value = value if equals else queue.pop(0)
            found[flag] = Given(value, f"{flag} {value}")
    return found


def _host_and_port(endpoint: str) -> tuple[str, str]:
    host, colon, port = endpoint.rpartition(":")
    return (host.strip("[]"), port) if colon else (port, "")
