"""What a loop tells of itself, where :class:`ProgramWatch` would have to look: its phases, steps and collectives."""

from __future__ import annotations

from outlast.diagnostics.live.heartbeat import Heartbeat, Phase
from outlast.diagnostics.live.recorder import Recorder
from outlast.diagnostics.live.step_delays import StepDelays
from outlast.events import EventLog


class LoopWatch:
    """A rank whose loop beats, and enters its collectives in the recorder by their names.

    Args:
        heartbeat: shows the launcher the phase and the step.
        recorder: in which the loop enters its collectives.
        events: of this rank.
    """

    def __init__(self, heartbeat: Heartbeat, recorder: Recorder, events: EventLog) -> None:
        self.events = events
        self.delays = StepDelays(events)
        """What keeps this process from its work, from :meth:`start` to :meth:`close`."""
        self.phase: Phase = "setup"
        """The newest."""
        self._heartbeat = heartbeat
        self._recorder = recorder
        self._step = 0
        self._inside = False

    def start(self) -> None:
        """Begin to count delays."""
        self.delays.open()
        self.beat()

    def take_steps(self, step: int) -> None:
        """``step`` was the last one before this start."""
        self._step = step

    def begin_phase(self, phase: Phase) -> None:
        """What the loop does from now on."""
        self.phase = phase
        self.beat()

    def go_on(self) -> None:
        """A phase is over. Inside a step the loop goes on with that; between steps nothing is told before the next."""
        if self._inside:
            self.begin_phase("step")

    def beat(self) -> None:
        """The loop makes progress."""
        self._heartbeat.beat(self.phase, self._step)

    def begin_step(self, step: int) -> None:
        """A step begins."""
        self._step, self._inside = step, True
        self._recorder.step = step
        self.begin_phase("step")

    def end_step(self, step: int) -> float:
        """The step has ended; returns 0: how long its collectives took is for the loop to say."""
        self._inside = False
        return 0.0

    def close(self) -> None:
        """Count no longer."""
        self.delays.close()
