"""Error-feedback state of a sharded model's parameters, by the parameter's name."""

from __future__ import annotations

from typing import Any

import torch

from outlast.comm.compressors import Shape
from outlast.comm.config import CommConfig
from outlast.comm.direction import Direction
from outlast.comm.feedback import Feedback
from outlast.comm.state.shards import ShardedParam
from outlast.comm.state.slots import State, check_meta, read_slots
from outlast.errors import CommStateMismatch

VERSION = 1


class ShardedStates:
    """All parameters of a sharded model, with the state that a checkpoint holds.

    Args:
        layout: how gradients are cut; state of one layout does not load in another.
        config: settings.
        feedback: None when nothing is compressed.
        direction: None when gradients themselves are averaged.
        world_size: ranks that exchange.
    """

    def __init__(
        self,
        layout: str,
        config: CommConfig,
        feedback: Feedback | None,
        direction: Direction | None,
        world_size: int,
    ) -> None:
        self.params: dict[str, ShardedParam] = {}
        """By name; the adapter fills it, because it knows how they are cut."""
        self._layout = layout
        self._config = config
        self._feedback = feedback
        self._direction = direction
        self._world_size = world_size

    def compresses(self, shape: Shape) -> bool:
        """Whether a parameter of ``shape`` is compressed outside warm-up."""
        numel = torch.Size(shape).numel()
        return self._feedback is not None and len(shape) > 1 and numel >= max(self._config.dense_below, 1)

    def state_dict(self, step: int) -> dict[str, dict[str, Any]]:
        """Live tensors; nothing is copied, and nothing is the same on every rank."""
        local = {name: slots for name, param in self.params.items() if (slots := param.saved())}
        return {"local": local, "replicated": {}, "meta": self._meta(step)}

    def load_state_dict(self, state: State, left: list[str] | None = None) -> int:
        """Copy the state in, all of it or (on an error) none; returns the step it was saved after.

        Args:
            state: a state dict.
            left: see :func:`read_slots`.

        Raises:
            CommStateMismatch: names the setting, parameter, slot, shape or type that does not fit.
        """
        depends_on_ranks = self._feedback is not None or self._direction is not None
        keys = ["version", "layout", "compressor", "feedback", "target", *(["world_size"] if depends_on_ranks else [])]
        check_meta(state["meta"], self._meta(0), keys)
        step = int(state["meta"]["step"])
        schemas = {name: param.schema(self._feedback, self._direction) for name, param in self.params.items()}
        for name, (local, _) in read_slots(state, schemas, step, left).items():
            self.params[name].load(local)
        return step

    def _meta(self, step: int) -> dict[str, Any]:
        return {
            "version": VERSION,
            "layout": self._layout,
            "compressor": self._config.compressor,
            "feedback": self._config.feedback if self._feedback else "none",
            "target": self._config.target,
            "world_size": self._world_size,
            "step": step,
        }


def cannot_reshard(what: str, saved: int, ranks: int) -> CommStateMismatch:
    """The refusal of state that another world size saved."""
    return CommStateMismatch(
        f"error-feedback state of {saved} ranks cannot be redistributed over {ranks} ranks: {what} cuts gradients into "
        "shards",
        f"continue with {saved} ranks, or start without the saved error-feedback state",
    )
