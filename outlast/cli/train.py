"""``outlast train CONFIG``."""

from __future__ import annotations

from dataclasses import dataclass

from outlast.cli.verb import TrainingVerb, load_config
from outlast.config import Overrides, to_toml


@dataclass(frozen=True, kw_only=True)
class Train(TrainingVerb):
    """Train on one rank, which reads its place among the others from torchrun's, srun's or mpirun's environment."""

    def run(self, overrides: Overrides) -> int:
        """Train."""
        from outlast.launch import find_place
        from outlast.trainer.main import start_rank

        overrides = self.all_overrides(overrides)
        if not self.dry_run:
            return start_rank(self.config, overrides)
        print(to_toml(load_config(self.config, overrides)), end="")
        print(f"# place: {find_place()}")
        return 0
