"""DeepSpeed engines in a session: they update themselves, count their own steps, and collect their own state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from outlast.checkpoint.deepspeed.files import HEADER
from outlast.checkpoint.deepspeed.state import DeepSpeedState
from outlast.deepspeed_compat import is_engine
from outlast.errors import SessionError
from outlast.session.models import State, Trained


@dataclass(slots=True)
class TrainedEngine(Trained):
    """A DeepSpeed engine, which has its optimizer inside; ZeRO 0 to 3."""

    saved: DeepSpeedState | None = None
    """Its state, if there are checkpoints."""

    @property
    def updates(self) -> int:
        """DeepSpeed's count, which skipped updates (of fp16) are in."""
        return int(self._engine.global_steps)

    @property
    def lr(self) -> float | None:
        """Of the first group."""
        rates = self._engine.get_lr()
        return float(rates[0]) if rates else None

    def check_step(self, step: int) -> None:
        """Raise SessionError if the step has left micro-batches behind that no update has taken yet."""
        engine = self._engine
        if (
            not engine.managed_gradient_accumulation()
            or getattr(engine, "_is_gradient_accumulation_boundary", None) is not None
        ):
            return  # the program says itself which of them is the last
        accumulated = int(engine.gradient_accumulation_steps())
        left = int(engine.micro_steps) % accumulated
        if left:
            raise SessionError(
                f"step {step} has ended after {left} of {accumulated} micro-batches: DeepSpeed has not updated "
                f"{f'model {self.name!r}' if self.name else 'the model'} yet, and what it has accumulated is in no "
                "checkpoint",
                "do all micro-batches of an update in one turn of the loop: for _ in "
                "range(engine.gradient_accumulation_steps()): engine.backward(engine(...)); engine.step()",
            )

    def shapes(self) -> dict[str, torch.Size]:
        """Of whole parameters, by name."""
        return {name: torch.Size(_whole(param, "ds_shape", param.shape)) for name, param in self._parameters()}

    def parameters(self) -> int:
        """How many entries are trained."""
        return sum(int(_whole(p, "ds_numel", p.numel())) for _, p in self._parameters() if p.requires_grad)

    def attach(self) -> DeepSpeedState:
        """Have outlast take its state from now on; returns that.

        Raises:
            CheckpointError: DeepSpeed is set up for something that outlast cannot save; names it.
        """
        self.saved = DeepSpeedState(self._engine)
        return self.saved

    def close(self) -> None:
        """Give it its own checkpoints back."""
        if self.saved is not None:
            self.saved.close()

    def collect(self) -> tuple[State, State, frozenset[str]]:
        """What is equal on all ranks, what is this rank's own, and the keys of what the next forward may change.

        Of one engine without a name this is laid out as ``outlast.checkpoint.deepspeed.attach`` has it.
        """
        assert self.saved is not None
        replicated, local = self.saved.collect()
        mark = self._mark
        return (
            {mark + key: value for key, value in replicated.items()},
            {mark + key: value for key, value in local.items()},
            frozenset(mark + key for key in DeepSpeedState.EAGER),
        )

    def load_collected(
        self, replicated: Mapping[str, Any], read_local: Callable[[int], Mapping[str, Any]], ranks: int
    ) -> None:
        """Put back what :meth:`collect` returned on each of ``ranks`` ranks. Collective.

        Raises:
            StateMismatch, CheckpointError: see :meth:`DeepSpeedState.load`.
        """
        assert self.saved is not None
        self.saved.load(self._own(replicated), lambda rank: self._own(read_local(rank)), ranks)

    def _own(self, state: Mapping[str, Any]) -> State:
        mark = self._mark
        return {key.removeprefix(mark): value for key, value in state.items() if key.startswith(mark)}

    def _parameters(self) -> list[tuple[str, nn.Parameter]]:
        return list(self._engine.module.named_parameters())

    @property
    def header(self) -> str:
        """The key of the replicated state by which its checkpoints are known."""
        return self._mark + HEADER

    @property
    def _mark(self) -> str:
        return f"{self.name}_" if self.name else ""

    @property
    def _engine(self) -> Any:
        return self.model


def trained(name: str, model: nn.Module, optimizer: Optimizer | None) -> Trained:
    """A model of the session, whatever averages its gradients."""
    return (TrainedEngine if is_engine(model) else Trained)(name, model, optimizer)


def _whole(param: nn.Parameter, attribute: str, otherwise: Any) -> Any:
    """With ZeRO 3 a parameter is empty between its uses, and says of itself what it is as a whole."""
    return getattr(param, attribute, otherwise)


def is_header(key: str, value: Any) -> bool:
    """Whether an entry of a checkpoint's replicated state is some engine's :attr:`TrainedEngine.header`."""
    return key.endswith(HEADER) and isinstance(value, Mapping) and "files" in value
