"""``outlast config show|validate CONFIG``."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import ClassVar, Literal

import tyro

from outlast.cli.verb import ConfigFile, Verb, load_config
from outlast.config import Overrides, to_toml


@dataclass(frozen=True, kw_only=True)
class Config(Verb):
    """Show or validate settings as a run would use them: command line, file, environment and defaults joined."""

    takes_settings: ClassVar[bool] = True

    action: tyro.conf.Positional[Literal["show", "validate"]]
    """show: print all settings as TOML; validate: only check them, and
    import what factories they name."""
    config: ConfigFile
    """The TOML file. --section.key VALUE overrides any of its settings."""
    explain: bool = False
    """With show: also print, as TOML comments, what each setting means and which values it takes."""

    def run(self, overrides: Overrides) -> int:
        """Resolve the settings and print them, or that they are valid."""
        config = load_config(self.config, overrides)
        if self.action == "validate":
            from outlast.trainer.factories import search_beside
            from outlast.trainer.parts import check_factories
            from outlast.trainer.sources import check_data

            search_beside(self.config)
            check_factories(config)
            check_data(config)
        sys.stdout.write(to_toml(config, explain=self.explain) if self.action == "show" else f"{self.config}: valid\n")
        return 0
