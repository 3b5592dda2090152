"""The watch on the numbers of a session's models."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor

from outlast.deepspeed_compat import is_engine
from outlast.diagnostics.numerics import NumericsConfig, NumericsEvent, NumericsWatch
from outlast.errors import NonFiniteGradient
from outlast.events import EventLog
from outlast.session.models import Trained


class SessionNumerics:
    """A watch for each model that has an optimizer here. Making it is collective.

    Args:
        trained: the models. DeepSpeed's engines keep gradients and parameters of their own, and are not watched.
        config: None: none is watched.
        events: where what is found is written.
        rank: of this process; rank 0 also says it in a line.
    """

    def __init__(self, trained: Sequence[Trained], config: NumericsConfig | None, events: EventLog, rank: int) -> None:
        self._events = events
        self._rank = rank
        self._watches: dict[str, NumericsWatch] = {}
        for one in trained if config is not None else ():
            if is_engine(one.model):
                self._say(f"numerics: {one.name or 'the model'} is a DeepSpeed engine, whose numbers are not watched")
                continue
            watch = NumericsWatch(one.model, one.optimizer, config, on_event=partial(self._tell, one.name))
            self._watches[one.name] = watch
            for line in watch.not_watched:
                self._say(f"numerics: {line}")

    def begin_step(self, step: int) -> None:
        """A step begins."""
        for watch in self._watches.values():
            watch.begin_step(step)

    def end_step(self, logged: Mapping[str, float | Tensor]) -> None:
        """The step's updates are made. Collective.

        Args:
            logged: what the program has logged in it; a ``loss`` is that of a single model.
        """
        loss = logged.get("loss") if len(self._watches) == 1 else None
        for watch in self._watches.values():
            watch.end_step(loss=loss)

    def explain(self, error: BaseException) -> None:
        """Add to an error about what is not finite, which all ranks raise alike, where that comes from. Collective."""
        if not isinstance(error, NonFiniteGradient):
            return
        for name, watch in self._watches.items():
            if watch.remembers:
                explained = watch.explained(error)
                error.add_note(f"{f'{name}: ' if name else ''}{explained.what.removeprefix(error.what).lstrip('; ')}")

    def close(self) -> None:
        """Take all hooks away."""
        for watch in self._watches.values():
            watch.close()

    def _tell(self, name: str, event: NumericsEvent) -> None:
        if name:
            event = dataclasses.replace(event, told=f"model {name}: {event.told}")
        self._events.write(event)
        self._say(f"step {event.step}: {event.told}")

    def _say(self, line: str) -> None:
        if self._rank == 0:
            print(f"outlast: {line}", file=sys.stderr, flush=True)
