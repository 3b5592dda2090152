"""Who is slow, told while the job runs: one line and an event when it is believed, and when it is over.

Nobody is killed for being slow. It is judged on one node, from the steps of all ranks.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import replace

from outlast.diagnostics.syndromes.facts import Fact
from outlast.diagnostics.syndromes.from_steps import judge_steps
from outlast.diagnostics.syndromes.restraint import Debounce
from outlast.diagnostics.syndromes.step_trace import NodeSteps, behind_s, newest_common_step
from outlast.diagnostics.syndromes.told import VerdictGiven
from outlast.diagnostics.syndromes.verdict import Confidence, Verdict
from outlast.events import EventLog

COST_SHARE = 0.05
"""Of a core, that is used for it at most: a large job is looked at less often."""
WAIT_S = 0.05
"""A look that takes no longer is told at once; one at a large job goes on beside the launcher."""

SURE: tuple[Confidence | None, ...] = (None, "weak", "likely", "certain")
"""How sure a cause is; one that is surer than what was told is told too."""

log = logging.getLogger("outlast.launch")


class SlowRanks:
    """Judges the steps of all ranks, in one start after another.

    Args:
        events: where verdicts are written.
    """

    def __init__(self, events: EventLog) -> None:
        self._events = events
        self._debounce = Debounce()
        self._open: dict[tuple[str, ...], Verdict] = {}
        self._step = -1
        self._next_s = 0.0
        self._look: _Look | None = None
        self._broken = False

    def begin(self) -> None:
        """The ranks start anew, or end: what was said of them is over."""
        for one in self._open.values():
            self._events.write(VerdictGiven.of(one, "ended", self._step))
        self._open = {}
        self._debounce = Debounce()
        self._step = -1
        self._look = None

    def look(self, nodes: Sequence[NodeSteps], facts: Sequence[Fact], *, world_size: int) -> None:
        """Judge, if there is a new step. What fails here is told once, and ends no training.

        Args:
            nodes: the steps of all ranks, as far as they are known.
            facts: what the nodes' monitors have seen meanwhile.
            world_size: how many ranks there are.
        """
        now_s, step = time.monotonic(), newest_common_step(nodes)
        if self._look is None and not self._broken and world_size > 1 and step > self._step and now_s >= self._next_s:
            self._look = _Look(nodes, facts, world_size, step)
            self._look.start()
            self._look.join(WAIT_S)
        if self._look is None or self._look.is_alive():
            return
        done, self._look = self._look, None
        self._next_s = time.monotonic() + done.seconds / COST_SHARE
        if done.error:
            self._broken = True
            log.warning("outlast: slow ranks are not told any more: %s", done.error)
        elif done.said is not None:
            self._step = done.step
            self._tell(done.said, nodes)

    def _tell(self, said: Sequence[Verdict], nodes: Sequence[NodeSteps]) -> None:
        self._debounce, counted = self._debounce.look(said)
        for one in counted:
            before = self._open.get(one.key)
            if before is None:
                self._open[one.key] = one
                log.warning("outlast: %s; nothing is done about it", one)
                self._events.write(VerdictGiven.of(one, "began", self._step))
            elif SURE.index(one.cause_confidence) > SURE.index(before.cause_confidence):
                # monitors find what lasts a sample or two late
                self._open[one.key] = one = replace(one, step=before.step)
                why = "likely" if one.cause_confidence == "likely" else "perhaps"
                log.warning("outlast: %s is slow %s because of %s", one.culprit, why, one.cause)
                self._events.write(VerdictGiven.of(one, "lasts", self._step))
        held = frozenset[tuple[str, ...]]().union(*self._debounce.looks)
        for key in [key for key in self._open if key not in held]:
            if not _is_over(self._open[key], nodes):
                continue  # it is less sure for a while, as on a machine that others keep busy
            one = self._open.pop(key)
            log.warning("outlast: %s is as fast as its peers again, at step %d", one.culprit, self._step)
            self._events.write(VerdictGiven.of(one, "ended", self._step))


def _is_over(one: Verdict, nodes: Sequence[NodeSteps]) -> bool:
    """Whether its ranks come no later now than by half of what was told."""
    return all(late_s < (one.cost_s or 0.0) / 2 for late_s in behind_s(nodes, one.culprit.ranks).values())


class _Look(threading.Thread):
    """One look, beside the launcher. A daemon: nothing waits for it."""

    def __init__(self, nodes: Sequence[NodeSteps], facts: Sequence[Fact], world_size: int, step: int) -> None:
        super().__init__(name="outlast-slow", daemon=True)
        self._nodes, self._facts, self._world_size, self.step = nodes, facts, world_size, step
        self.said: list[Verdict] | None = None
        """None if not all ranks have told of steps."""
        self.error = ""
        self.seconds = 0.0

    def run(self) -> None:
        """Judge."""
        began_s = time.thread_time()
        try:
            said = judge_steps(self._nodes, self._facts, world_size=self._world_size)
            if said is not None:
                self.said = [one for one in said if one.syndrome == "non_communication_slow"]
        except Exception as error:
            self.error = f"{type(error).__name__}: {error}"
        self.seconds = time.thread_time() - began_s
