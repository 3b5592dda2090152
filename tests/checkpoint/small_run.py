"""A small training with error feedback, whose every step is a function of step and rank; for checkpoints that are kept.

``tests/data/checkpoint_v2`` has its step 2 as two ranks saved it with format version 2, and ``after_4_steps.json`` its
parameters after step 4, as the same processes went on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from outlast.comm import CommConfig, GradientReducer

WORLD_SIZE = 2
COMM = CommConfig(target="gradient", feedback="ef21", density=0.1, dense_below=0)
CHECKPOINT = {"chunk_mb": 0.001, "pack_below_kb": 1.2, "keep_last": 0}
"""Some tensors in several chunks, some packed."""


class Run:
    """One rank's part of the run, from the beginning."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.step = 0
        self.model = nn.ParameterDict(
            {
                "weight": nn.Parameter(torch.linspace(-1, 1, 384).reshape(24, 16)),
                "bias": nn.Parameter(torch.linspace(0, 1, 24)),
            }
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01, weight_decay=0.1)
        self.reducer = GradientReducer(self.model.named_parameters(), COMM)

    def train(self, steps: int) -> None:
        """Take steps; every gradient differs between ranks and steps, and no sum decides its last bits."""
        for _ in range(steps):
            self.step += 1
            for number, parameter in enumerate(self.model.values(), 1):
                places = torch.arange(parameter.numel(), dtype=torch.float32).reshape(parameter.shape)
                target = torch.sin(places * number + 3 * self.rank + self.step)
                parameter.grad = (parameter.detach() - target) / 8
            self.reducer.reduce()
            self.optimizer.step()

    def replicated(self) -> dict[str, Any]:
        """What all ranks have alike."""
        comm = self.reducer.state_dict()
        return {
            "model": dict(self.model.state_dict()),
            "optimizer": self.optimizer.state_dict()["state"],
            "comm": {"aggregate": comm["replicated"], "meta": comm["meta"]},
            "half": {"weight": self.model["weight"].detach().to(torch.bfloat16)},
            "values": {"step": self.step, "best": math.inf, "betas": (0.9, 0.999), "name": "größer/kleiner"},
        }

    def local(self) -> dict[str, Any]:
        """This rank's own: its error feedback, and a generator's state."""
        generator = torch.Generator().manual_seed(1000 * self.step + self.rank)
        return {"comm": self.reducer.state_dict()["local"], "rng": {"cpu": generator.get_state()[:64].clone()}}

    def load(self, replicated: Mapping[str, Any], local: Mapping[str, Any]) -> None:
        """Go on from what was saved."""
        self.step = replicated["values"]["step"]
        self.model.load_state_dict(replicated["model"])
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": replicated["optimizer"], "param_groups": groups})
        comm = replicated["comm"]
        self.reducer.load_state_dict({"replicated": comm["aggregate"], "meta": comm["meta"], "local": local["comm"]})
