"""``outlast launch [flags] SCRIPT [args…]``, ``-m MODULE [args…]`` and ``--no-python PROGRAM [args…]``."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import tyro

from outlast.cli.verb import Verb
from outlast.config import Overrides, load
from outlast.errors import ConfigError
from outlast.launch.flags import LaunchFlags
from outlast.launch.program import Kind, Program

_LOG = logging.getLogger("outlast.launch")
KINDS: dict[str, Kind] = {"-m": "module", "--module": "module", "--no-python": "program"}
"""Flags that say what the target is; without one it is a script."""
SWITCHES = {"-h", "--help", "--standalone", "--no-standalone", "--dry-run", "--no-dry-run"}
"""Flags without a value: what follows may be the target."""


@dataclass(frozen=True, kw_only=True)
class LaunchProgram(Verb):
    """Start, watch and restart a program as the ranks of this node, on torchelastic's agent."""

    takes_settings: ClassVar[bool] = True

    run_dir: Path | None = None
    """Where attempts, events, logs and the report go; by default runs/NAME, with the script's or module's name."""
    config: Path | None = None
    """A TOML file with sections [launch], [export] and [diagnostics]; --launch.key VALUE overrides a setting."""
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
        if self.program.kind == "program":
            settings = dataclasses.replace(settings, watch=False)  # nothing in it tells of progress
        spec = LaunchSpec(
            command=self.program.command,
            run_dir=(self.run_dir or Path("runs") / self.program.name).absolute(),
            config=settings,
            flags=self.flags,
            export=config.export,
            is_program=True,
        )
        if self.dry_run:
            print(dry_run(spec))
            return 0
        if self.program.kind == "program":
            _LOG.warning(
                "outlast: %s is not watched, because it does not start through Python: ranks that end are noticed and "
                "restarted, but no hang and no straggler is found",
                self.program.target,
            )
        launch(spec)
        return 0


def split_program(arguments: Sequence[str]) -> tuple[list[str], Program | None]:
    """Separate the launcher's arguments from a program and its own; None for outlast's trainer, or no target at all.

    Everything after the target is the program's, whatever it looks like.

    Raises:
        ConfigError: two of ``-m`` and ``--no-python``, or one of them without a target.
    """
    own: list[str] = []
    kind: Kind | None = None
    queue = list(arguments)
    while queue:
        word = queue.pop(0)
        name = "--" + word[2:].partition("=")[0].replace("_", "-") if word.startswith("--") else word
        if word == "--":
            if not queue:
                break
            return own, Program(kind=kind or "script", target=queue[0], arguments=tuple(queue[1:]))
        if name in KINDS:
            if kind is not None:
                raise ConfigError("-m and --no-python contradict one another", "leave one of them out")
            kind = KINDS[name]
        elif word.startswith("-"):
            own.append(word)
            if name not in SWITCHES and "=" not in word and queue:
                own.append(queue.pop(0))
        elif kind is None and word.endswith(".toml"):
            return [*own, word, *queue], None
        else:
            return own, Program(kind=kind or "script", target=word, arguments=tuple(queue))
    if kind is not None:
        what = "a module's name" if kind == "module" else "a program"
        raise ConfigError(f"no target: {'-m' if kind == 'module' else '--no-python'} needs {what}")
    return own, None
