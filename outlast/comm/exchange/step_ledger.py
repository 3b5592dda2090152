"""Which step gradients belong to, which gradients it has exchanged, and whether an exchange has failed."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from outlast.errors import CommError, OutlastError


class StepLedger:
    """The steps of one reducer.

    The caller names each step (:meth:`begin`), or steps are counted: then one opens with the first gradients after the
    last step was complete, and with gradients that the open step has already exchanged.

    Args:
        on_open: called with the number of a step that opens, before any of its gradients are exchanged.
    """

    def __init__(self, on_open: Callable[[int], None]) -> None:
        self.step = 0
        """The open step, or the last one; 0 before the first."""
        self._on_open = on_open
        self._given = False
        self._complete = True
        self._seen: set[Hashable] = set()
        self._failure: BaseException | None = None
        self._failed_in = 0
        self._closed = False

    @property
    def named(self) -> bool:
        """Whether the caller names steps, and so says itself which averages belong to one."""
        return self._given

    def begin(self, step: int) -> None:
        """Open ``step`` for a caller that names steps; from now on it must name every step.

        Raises:
            CommError: ``step`` < 1, or what :meth:`check` raises.
        """
        if step < 1:
            raise CommError(f"begin_step({step}): steps count from 1")
        self.check()
        self._given = True
        self._open(step)

    def ensure(self, step: int) -> None:
        """Open ``step`` unless it is open.

        Raises:
            CommError: see :meth:`check`.
        """
        self.check()
        if step != self.step or self._complete:
            self._open(step)

    def enter(self, key: Hashable, name: str, remedy: str, *, counted: bool = False) -> bool:
        """Note that the gradients ``key`` are about to be exchanged; opens a step if steps are counted.

        Args:
            key: the same in every step.
            name: of the gradients, for errors.
            remedy: what to do if they come twice.
            counted: count the step, though the caller names steps: it has no say in this one.

        Returns:
            Whether they are the step's first.

        Raises:
            CommError: the step has exchanged them, and steps are named by :meth:`begin`; or what :meth:`check` raises.
        """
        self.check()
        given = self._given and not counted
        if given and key in self._seen:
            raise CommError(f"gradients of {name} were averaged twice in step {self.step}", remedy)
        if not given and (self._complete or key in self._seen):
            self._open(self.step + 1)
        first = not self._seen
        self._seen.add(key)
        return first

    def opens(self, key: Hashable) -> bool:
        """Whether gradients ``key`` would be the first of a step that is counted."""
        return not self._given and (self._complete or key in self._seen or not self._seen)

    def complete(self) -> None:
        """The open step gets no more gradients."""
        self._complete = True

    def resume_after(self, step: int) -> None:
        """State that was saved after ``step`` has been loaded."""
        self.step = step
        self._complete = True

    def fail(self, error: BaseException) -> None:
        """Have every later call raise an error that tells of ``error``, unless there was one before."""
        if self._failure is None:
            self._failure, self._failed_in = error, self.step

    def close(self) -> None:
        """Have every later call raise."""
        self._closed = True

    def check(self) -> None:
        """Raise what has gone wrong before, if anything has.

        Raises:
            CommError: an exchange has failed (whatever it raised), or the reducer was closed. It is of the kind that
                was raised first.
        """
        if self._failure is not None:
            raise self._again(self._failure) from self._failure
        if self._closed:
            raise CommError("the reducer was closed")

    def _again(self, first: BaseException) -> CommError:
        kind = type(first) if isinstance(first, CommError) else CommError
        what = first.what if isinstance(first, OutlastError) else f"{type(first).__name__}: {first}"
        return kind(
            f"nothing can be averaged any more, because step {self._failed_in} failed: {what}",
            "gradients and error feedback are undefined since: resume from a checkpoint, or close() the reducer on all "
            "ranks and attach() a new one",
        )

    def _open(self, step: int) -> None:
        self.step = step
        self._seen = set()
        self._complete = False
        self._on_open(step)


def due(step: int, every_steps: int) -> bool:
    """Whether something that happens every ``every_steps`` steps (0: never) happens in ``step``."""
    return every_steps > 0 and step % every_steps == 0
