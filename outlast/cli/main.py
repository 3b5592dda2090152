"""Reads the command line, runs a verb, and turns errors into messages and an exit status."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from outlast import __version__
from outlast.cli.ckpt import Ckpt
from outlast.cli.config import Config
from outlast.cli.doctor import Doctor
from outlast.cli.launch import Launch
from outlast.cli.launch_program import LaunchProgram, split_program
from outlast.cli.predict import Predict
from outlast.cli.report import Report
from outlast.cli.status import Status
from outlast.cli.tokenize import Tokenize
from outlast.cli.train import Train
from outlast.cli.verb import Verb
from outlast.config import split_overrides
from outlast.errors import ConfigError, OutlastError
from outlast.launch.flag_sources import arguments_from_environment, name_variables
from outlast.plain_text import plain_text

DESCRIPTION = """Data-parallel PyTorch training that outlasts its machines.

--section.key VALUE overrides a setting of CONFIG, anywhere on the command line.

Exit status: 0 only if the work was done; 2 for wrong settings or arguments; 75 if a notice such as SIGTERM ended a run
at a durable step (go on with --resume auto); 1 for every other failure."""

AnyVerb = (
    Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Launch, tyro.conf.subcommand("launch")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Status, tyro.conf.subcommand("status")]
    | Annotated[Ckpt, tyro.conf.subcommand("ckpt")]
    | Annotated[Doctor, tyro.conf.subcommand("doctor")]
    | Annotated[Predict, tyro.conf.subcommand("predict")]
    | Annotated[Tokenize, tyro.conf.subcommand("tokenize")]
    | Annotated[Config, tyro.conf.subcommand("config")]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit status. Errors that outlast raises on purpose are printed without a traceback.

    Raises:
        SystemExit: ``--help``, or arguments that are wrong (status 2).
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if list(arguments) in (["--version"], ["version"]):
        print(f"outlast {__version__}")
        return 0
    own: list[str] = []
    try:
        program = None
        if arguments and arguments[0] == "launch":
            own, program = split_program(arguments[1:], os.environ)
            arguments = ["launch", *arguments_from_environment(own, os.environ), *own]
        rest, overrides = split_overrides(arguments)
        verb: Verb
        if program is not None:
            verb = tyro.cli(LaunchProgram, prog="outlast launch", args=rest[1:], config=(tyro.conf.OmitArgPrefixes,))
            verb = dataclasses.replace(verb, program=program)
        else:
            verb = tyro.cli(
                AnyVerb, prog="outlast", description=DESCRIPTION, args=rest, config=(tyro.conf.OmitArgPrefixes,)
            )
        if overrides and not verb.takes_settings:
            raise ConfigError(f"outlast {arguments[0]} takes no settings, got {', '.join(overrides)}")
        return verb.run(overrides)
    except OutlastError as error:
        text = f"outlast: {type(error).__name__}: {error}"
        if isinstance(error, ConfigError) and arguments[0] == "launch":
            text = "\n  ".join(filter(None, (text, name_variables(text, own, os.environ))))
        print(plain_text(text, keep="\n"), file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        return 130
