"""``outlast launch [flags] SCRIPT [args…]``, ``-m MODULE [args…]`` and ``--no-python PROGRAM [args…]``."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import tyro

from outlast.cli.verb import Verb
from outlast.config import Overrides, load
from outlast.errors import ConfigError
from outlast.launch.flag_sources import PREFIX, read_switch
from outlast.launch.flags import LaunchFlags
from outlast.launch.program import Kind, Program

_LOG = logging.getLogger("outlast.launch")
KINDS: dict[str, Kind] = {"-m": "module", "--module": "module", "--no-python": "program", "--run-path": "script"}
"""Flags that say what the target is; without one it is a script."""
SHORT = {"-r": "--redirects", "-t": "--tee"}
SETTINGS = {"--standby": ("--launch.standby", "on"), "--no-standby": ("--launch.standby", "off")}
"""Flags without a value that stand for a setting with one."""
SWITCHES = {
    "-h",
    "--help",
    *(f"--{no}{name}" for name in ("standalone", "virtual-local-rank", "dry-run") for no in ("", "no-")),
}
"""Flags without a value: what follows may be the target."""


@dataclass(frozen=True, kw_only=True)
class LaunchProgram(Verb):
    """Start, watch and restart a program as the ranks of this node, on torchelastic's agent.

    --standby and --no-standby are short for --launch.standby on and off.
    """

    takes_settings: ClassVar[bool] = True

    run_dir: Path | None = None
    """Where attempts, events, logs and the report go; by default runs/NAME, with the script's or module's name."""
    config: Path | None = None
    """A TOML file with sections [launch], [export], [page] and [diagnostics]; --launch.key VALUE overrides one."""
    dry_run: bool = False
    """Print what would run, and run nothing."""
    flags: Annotated[LaunchFlags, tyro.conf.arg(name="")] = dataclasses.field(default_factory=LaunchFlags)
    """How many ranks, and where they meet."""
    program: tyro.conf.Suppress[Program | None] = None
    """What to run; the part of the command line from the target on."""

    def run(self, overrides: Overrides) -> int:
        """Launch. What is wrong with the program's name or the settings is found here, before any process starts."""
        from outlast.cli.program_config import ProgramConfig
        from outlast.launch import LaunchSpec, dry_run, launch

        assert self.program is not None
        self.program.check()
        config = load(ProgramConfig, self.config, overrides=overrides)
        settings = config.launch
        watched = self.program.kind != "program" and settings.look_every_s != 0
        if not watched:
            settings = dataclasses.replace(settings, watch=False)  # nothing in it tells of progress
        spec = LaunchSpec(
            command=self.program.command(watched=watched),
            run_dir=(self.run_dir or Path("runs") / self.program.name).absolute(),
            config=settings,
            flags=self.flags,
            export=config.export,
            page=config.page,
            is_program=True,
        )
        if self.dry_run:
            print(dry_run(spec))
            return 0
        if not watched:
            _LOG.warning(
                "outlast: %s is not watched, because %s: ranks that end are noticed and restarted, but no hang and no "
                "straggler is found",
                self.program.target,
                "it does not start through Python" if settings.look_every_s != 0 else "launch.look_every_s is 0",
            )
        launch(spec)
        return 0


def split_program(
    arguments: Sequence[str], environ: Mapping[str, str] | None = None
) -> tuple[list[str], Program | None]:
    """Separate the launcher's arguments from a program and its own; None for outlast's trainer, or no target at all.

    Everything after the target is the program's, whatever it looks like. Of the launcher's own, short names and
    underscores become the long names with dashes.

    Args:
        arguments: what follows ``outlast launch``.
        environ: the environment, for torchrun's PET_MODULE, PET_NO_PYTHON and PET_RUN_PATH.

    Raises:
        ConfigError: two of ``-m``, ``--no-python`` and ``--run-path``, or one of them without a target.
    """
    own: list[str] = []
    kinds: dict[str, Kind] = {}
    for flag, kind in KINDS.items():
        variable = f"{PREFIX}{flag[2:].replace('-', '_').upper()}"
        if flag.startswith("--") and environ and environ.get(variable) and read_switch(variable, environ[variable]):
            kinds[f"{variable}={environ[variable]}"] = kind
    queue = list(arguments)
    while queue:
        word = queue.pop(0)
        if word == "-":
            raise ConfigError("standard input cannot be the script: each rank reads it", "write it into a file")
        if word == "--":
            if not queue:
                break
            return own, _program(kinds, queue)
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            name = name if "." in name else name.replace("_", "-")
        elif len(word) > 1 and word[:2] in SHORT:
            name, equals, value = SHORT[word[:2]], word[2:], word[2:].removeprefix("=")
        if name in SETTINGS and not equals:
            own += SETTINGS[name]
        elif name in KINDS and not equals:
            kinds[name] = KINDS[name]
        elif word.startswith("-"):
            own.append(f"{name}={value}" if equals else name)
            if name not in SWITCHES and not equals and queue:
                own.append(queue.pop(0))
        elif not kinds and word.endswith(".toml"):
            return [*own, word, *queue], None
        else:
            program = _program(kinds, [word, *queue])
            if word.endswith(".toml") and program.kind == "module":
                raise ConfigError(f"{next(iter(kinds))} and {word} contradict one another", "a TOML file is no module")
            return own, program
    if kinds:
        _program(kinds, [])
    return own, None


def _program(kinds: Mapping[str, Kind], words: Sequence[str]) -> Program:
    if len(set(kinds.values())) > 1:
        raise ConfigError(f"{' and '.join(kinds)} contradict one another", "leave one of them out")
    kind: Kind = next(iter(kinds.values()), "script")
    if not words:
        what = {"module": "a module's name", "program": "a program", "script": "a script"}[kind]
        raise ConfigError(f"no target: {next(iter(kinds))} needs {what}")
    return Program(kind=kind, target=words[0], arguments=tuple(words[1:]))
