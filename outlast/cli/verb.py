"""What every verb of the command line has: arguments as fields, and ``run``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import tyro

from outlast.config import Overrides, load

if TYPE_CHECKING:
    from outlast.trainer import Config

ConfigFile = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CONFIG")]


@dataclass(frozen=True, kw_only=True)
class Verb(ABC):
    """A verb; tyro fills its fields from the command line."""

    takes_settings: ClassVar[bool] = False
    """Whether ``--section.key VALUE`` is allowed."""

    @abstractmethod
    def run(self, overrides: Overrides) -> int:
        """Do it; returns the exit status.

        Args:
            overrides: settings from the command line; empty unless ``takes_settings``.

        Raises:
            OutlastError: printed without a traceback; exit status 1, or 2 for a ConfigError.
        """


@dataclass(frozen=True, kw_only=True)
class TrainingVerb(Verb):
    """A verb that trains with the settings of a TOML file."""

    takes_settings: ClassVar[bool] = True

    config: ConfigFile
    """The TOML file; --section.key VALUE overrides a setting. All of them: outlast config show CONFIG --explain"""
    resume: str | None = None
    """auto, never, or the number of a checkpointed step; short for --run.resume."""
    dry_run: bool = False
    """Print what would run, and run nothing."""

    def all_overrides(self, overrides: Overrides) -> Overrides:
        """The settings from the command line, --resume included; --run.resume beats it."""
        return overrides if self.resume is None else {"run.resume": self.resume, **overrides}


def load_config(file: Path, overrides: Overrides) -> Config:
    """A run's settings, resolved from command line, file, environment and defaults.

    Raises:
        ConfigError: a setting is wrong.
    """
    from outlast.trainer.config import Config

    return load(Config, file, overrides=overrides)
