"""The watch on the numbers of what a session trains."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from outlast.diagnostics.numerics import NumericsConfig, NumericsEvent, NumericsWatch
from outlast.errors import NonFiniteGradient
from outlast.session.place import RunPlace
from outlast.session.trainable import Trainable


class SessionNumerics:
    """A watch for each model that can be watched. Making it is collective.

    Args:
        state: what is trained.
        config: None: nothing is watched.
        run: where what is found is written; rank 0 also says it in a line.
    """

    def __init__(self, state: Trainable, config: NumericsConfig | None, run: RunPlace) -> None:
        self._run = run
        self._watches: dict[str, NumericsWatch] = {}
        if config is not None:
            self._watches, left_out = state.watch_numbers(config, self._tell)
            for line in left_out:
                run.say(f"numerics: {line}")

    def begin_step(self, step: int) -> None:
        """A step begins."""
        for watch in self._watches.values():
            watch.begin_step(step)

    def end_step(self, logged: Mapping[str, float | Tensor]) -> None:
        """The step's updates are made. Collective.

        Args:
            logged: what the program has logged in it; a ``loss``, and a norm that is a number, are a single model's.
        """
        loss = logged.get("loss") if len(self._watches) == 1 else None
        what = "update" if "update_norm" in logged else "gradient"
        given = logged.get("update_norm", logged.get("grad_norm")) if len(self._watches) == 1 else None
        norm = given if isinstance(given, float) else None
        for watch in self._watches.values():
            watch.end_step(loss=loss, norm=norm, what=what)

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
        self._run.events.write(event)
        self._run.say(f"step {event.step}: {event.told}")
