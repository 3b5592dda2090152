"""``outlast VERB``.

::

    outlast train  CONFIG [--resume R] [--section.key VALUE …]           one rank
    outlast launch [torchrun's flags] CONFIG [--section.key VALUE …]     all ranks of this node
    outlast report RUN [--html FILE] [--json]
    outlast ckpt   ls|show|verify URL [--step N] [--json]
    outlast ckpt   diff URL [OTHER] [--step N] [--other-step M] [--json]    exit status 1 if they differ
    outlast ckpt   prune URL --keep-last K [--aside] [--dry-run] [--json]
    outlast ckpt   export URL TARGET --format safetensors|dcp|torch [--step N] [--part model] [--force] [--json]
    outlast ckpt   import SOURCE URL --format safetensors|dcp|torch [--step N] [--part model] [--json]
    outlast doctor [--dir DIR] [--json]
    outlast config show|validate CONFIG [--section.key VALUE …]

Exit status 0 only if the work was done; 2 for settings or arguments that are wrong, 1 for everything else that failed.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from outlast import __version__
from outlast.cli import ckpt_args
from outlast.config import split_overrides, to_toml
from outlast.errors import ConfigError, OutlastError
from outlast.launch.flags import LaunchFlags


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train on one rank; under torchrun, srun or mpirun it finds its place by itself."""

    config: tyro.conf.Positional[Path]
    """The TOML file. Any of its settings is overridden with --section.key VALUE."""
    resume: str | None = None
    """auto, never, or the number of a checkpointed step; stands for --run.resume."""
    dry_run: bool = False
    """Print the resolved settings and the place this rank finds, and do nothing."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Start, watch and restart the ranks of this node, on torchelastic's agent; flags are named as torchrun's are."""

    config: tyro.conf.Positional[Path]
    """The TOML file. Any of its settings is overridden with --section.key VALUE."""
    flags: Annotated[LaunchFlags, tyro.conf.arg(name="")] = dataclasses.field(default_factory=LaunchFlags)
    """How many ranks, where they meet."""
    resume: str | None = None
    """auto, never, or the number of a checkpointed step; stands for --run.resume."""
    dry_run: bool = False
    """Print what would run, and run nothing."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What happened in a run, and who was late: on the terminal, as HTML, as JSON; from its events alone."""

    run: tyro.conf.Positional[Path]
    """The run's directory."""
    html: Path | None = None
    """Write one self-contained HTML file here."""
    json: bool = False
    """Print the report as JSON in place of tables."""


@dataclass(frozen=True, kw_only=True)
class Ckpt:
    """Look at checkpoints, compare, remove and convert them, without ranks and without a GPU."""

    action: ckpt_args.Action
    """What to do."""


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Check this machine: versions, backends, network, shared memory, disk, limits, and a live two-rank all-reduce."""

    dir: Path = Path("runs")
    """Where runs would be written; its disk is checked."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True, kw_only=True)
class ConfigVerb:
    """Show or validate settings as they would be used, with command line, file, environment and defaults joined."""

    action: tyro.conf.Positional[Literal["show", "validate"]]
    """show: print all of them as TOML; validate: say only whether they are right."""
    config: tyro.conf.Positional[Path]
    """The TOML file. Any of its settings is overridden with --section.key VALUE."""


Verb = (
    Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Launch, tyro.conf.subcommand("launch")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Ckpt, tyro.conf.subcommand("ckpt")]
    | Annotated[Doctor, tyro.conf.subcommand("doctor")]
    | Annotated[ConfigVerb, tyro.conf.subcommand("config")]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit status. Errors that outlast raises on purpose are printed without a traceback."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words in (["--version"], ["version"]):
        print(f"outlast {__version__}")
        return 0
    try:
        rest, settings = split_overrides(words)
        verb = tyro.cli(Verb, prog="outlast", description=__doc__, args=rest, config=(tyro.conf.OmitArgPrefixes,))
        if settings and not isinstance(verb, (Train, Launch, ConfigVerb)):
            raise ConfigError(f"outlast {words[0]} takes no settings, got {' '.join(settings)}")
        run: Callable[..., int] = _VERBS[type(verb)]
        return run(verb, settings)
    except OutlastError as error:
        print(f"outlast: {type(error).__name__}: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        return 130


def _settings_words(config: Path, resume: str | None, settings: Sequence[str]) -> list[str]:
    """What the trainer is started with: the config file, then every override as ``--section.key=value``."""
    words = [str(config)]
    values = list(settings)
    if resume is not None:
        values = ["--run.resume", resume, *values]
    index = 0
    while index < len(values):
        flag = values[index]
        end = index + 1
        while end < len(values) and not values[end].startswith("--"):
            end += 1
        words.append(f"{flag}={','.join(values[index + 1 : end])}")
        index = end
    return words


def _train(verb: Train, settings: list[str]) -> int:
    from outlast.launch import find_place
    from outlast.trainer.main import main as train_main
    from outlast.trainer.main import resolve

    words = _settings_words(verb.config, verb.resume, settings)
    if verb.dry_run:
        print(to_toml(resolve(words)), end="")
        print(f"# place: {find_place()}")
        return 0
    return train_main(words)


def _launch(verb: Launch, settings: list[str]) -> int:
    from outlast.launch import LaunchSpec, dry_run, launch
    from outlast.trainer.main import resolve
    from outlast.trainer.run_directory import check_usable, run_path

    words = _settings_words(verb.config, verb.resume, settings)
    config = resolve(words, prog="outlast launch CONFIG")  # a wrong setting is found here, before anything is started
    spec = LaunchSpec(
        command=(sys.executable, "-m", "outlast.trainer", *words),
        run_dir=run_path(config),
        config=config.launch,
        flags=verb.flags,
    )
    if verb.dry_run:
        print(dry_run(spec))
        return 0
    least, most = verb.flags.node_range()
    # Where nodes may join late, a used directory is what they should find; rank 0 looks again in any case.
    check_usable(config, resuming=config.run.resume != "never" or least < most)
    launch(spec)
    return 0


def _report(verb: Report, settings: list[str]) -> int:
    from outlast.diagnostics import build_report, render_html, render_terminal

    report = build_report(verb.run)
    if verb.html is not None:
        try:
            verb.html.write_text(render_html(report), encoding="utf-8")
        except OSError as error:
            raise OutlastError(f"{verb.html} cannot be written: {error.strerror}", "give another file") from error
        print(f"written: {verb.html}", file=sys.stderr)
    if verb.json:
        print(json.dumps(report.to_json()))
    elif verb.html is None:
        render_terminal(report, Console())
    return 0


def _ckpt(verb: Ckpt, settings: list[str]) -> int:
    from outlast.cli import ckpt

    console, action = Console(), verb.action
    match action:
        case ckpt_args.Diff():
            return ckpt.diff(action, console)
        case ckpt_args.Prune():
            return ckpt.prune(action, console)
        case ckpt_args.Memory():
            return ckpt.memory(action, console)
        case ckpt_args.Export():
            return ckpt.export(action, console)
        case ckpt_args.Import():
            return ckpt.import_(action, console)
        case _:
            return ckpt.show(action, console)


def _doctor(verb: Doctor, settings: list[str]) -> int:
    from outlast.diagnostics.doctor import checks

    found = checks.run_checks(verb.dir)
    if verb.json:
        print(json.dumps([dataclasses.asdict(check) for check in found]))
    else:
        checks.render(found, Console())
    return 1 if any(check.status == "FAIL" for check in found) else 0


def _config(verb: ConfigVerb, settings: list[str]) -> int:
    from outlast.trainer.main import resolve

    config = resolve(_settings_words(verb.config, None, settings), prog=f"outlast config {verb.action} CONFIG")
    sys.stdout.write(to_toml(config) if verb.action == "show" else f"{verb.config}: valid\n")
    return 0


_VERBS: dict[type, Callable[..., int]] = {
    Train: _train,
    Launch: _launch,
    Report: _report,
    Ckpt: _ckpt,
    Doctor: _doctor,
    ConfigVerb: _config,
}
