"""``outlast ckpt ACTION``: look at checkpoints, compare, remove and convert them, without ranks and without a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from outlast.cli.ckpt.convert import Export, Import
from outlast.cli.ckpt.diff import Diff
from outlast.cli.ckpt.inspect import Ls, Show, Verify
from outlast.cli.ckpt.remove import Memory, Prune
from outlast.cli.verb import Verb
from outlast.config import Overrides

Action = (
    Annotated[Ls, tyro.conf.subcommand("ls")]
    | Annotated[Show, tyro.conf.subcommand("show")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
    | Annotated[Diff, tyro.conf.subcommand("diff")]
    | Annotated[Prune, tyro.conf.subcommand("prune")]
    | Annotated[Memory, tyro.conf.subcommand("memory")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Import, tyro.conf.subcommand("import")]
)


@dataclass(frozen=True, kw_only=True)
class Ckpt(Verb):
    """Look at checkpoints, compare, remove and convert them, without ranks and without a GPU."""

    action: Action
    """What to do."""

    def run(self, overrides: Overrides) -> int:
        """Do it."""
        return self.action.run()
