"""``outlast launch [torchrun's flags] CONFIG``."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from outlast.cli.verb import TrainingVerb, load_config
from outlast.config import Overrides, override_arguments
from outlast.launch.flags import LaunchFlags
from outlast.launch.launcher import load_torch
from outlast.launch.notice_signals import early_notices


@dataclass(frozen=True, kw_only=True)
class Launch(TrainingVerb):
    """Start, watch and restart the ranks of this node, on torchelastic's agent. Flags have torchrun's names."""

    flags: Annotated[LaunchFlags, tyro.conf.arg(name="")] = dataclasses.field(default_factory=LaunchFlags)
    """How many ranks, and where they meet."""

    def run(self, overrides: Overrides) -> int:
        """Launch. A wrong setting is found here, before any process is started."""
        with early_notices():
            return self._run(overrides)

    def _run(self, overrides: Overrides) -> int:
        load_torch()
        from outlast.launch import LaunchSpec, dry_run, launch
        from outlast.trainer.run_directory import run_directory

        overrides = self.all_overrides(overrides)
        config = load_config(self.config, overrides)
        spec = LaunchSpec(
            command=(sys.executable, "-m", "outlast.trainer", str(self.config), *override_arguments(overrides)),
            run_dir=run_directory(config).path,
            config=config.launch,
            export=config.export,
            page=config.page,
            flags=self.flags,
            obeys_notice=True,
        )
        if self.dry_run:
            print(dry_run(spec))
            return 0
        least, most = self.flags.node_range()
        # A node that joins late finds a used directory, and rightly so; rank 0 checks again in any case.
        run_directory(config).check_usable(resuming=config.run.resume != "never" or least < most)
        launch(spec)
        return 0
