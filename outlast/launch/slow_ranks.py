"""Who is slow, told while the job runs: one line and an event when it is believed, and when it is over.

Nobody is killed for being slow. It is judged on one node, from the steps of all ranks. A node, or a link, is tried out
before it is accused, unless a cause that was measured says that it is the job's own.
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
from outlast.diagnostics.syndromes.step_trace import NodeSteps, behind_s, newest_common_step, transfer_s
from outlast.diagnostics.syndromes.told import VerdictGiven
from outlast.diagnostics.syndromes.verdict import Confidence, Culprit, Verdict
from outlast.events import EventLog
from outlast.launch.node_trials import NodeTrials
from outlast.launch.standstill_probe import StandstillProbe

COST_SHARE = 0.05
"""Of a core, that is used for it at most: a large job is looked at less often."""
WAIT_S = 0.05
"""A look that takes no longer is told at once; one at a large job goes on beside the launcher."""
SURE: tuple[Confidence | None, ...] = (None, "weak", "likely", "certain")
"""How sure a cause is; one that is surer than what was told is told too."""
OWN_CAUSE = "nothing: what keeps it was measured, and would go with the job to another node"
NO_NODE = "nothing: no node is accused"

Key = tuple[str, ...]

log = logging.getLogger("outlast.launch")


class SlowRanks:
    """Judges the steps of all ranks, in one start after another.

    Args:
        events: where verdicts are written.
    """

    def __init__(self, events: EventLog) -> None:
        self._events = events
        self._next_s = 0.0
        self._broken = False
        self._clear()

    def _clear(self) -> None:
        self._ranks, self._links = Debounce(), Debounce()
        self._open: dict[Key, Verdict] = {}
        self._waiting: dict[Key, Verdict] = {}
        """Believed, and not told before the node or link is tried out."""
        self._transfer_s: dict[Key, float] = {}
        """Of slow communication that is told, seconds a step that it took then."""
        self._step = -1
        self._look: _Look | None = None

    def begin(self) -> None:
        """The ranks start anew, or end: what was said of them is over."""
        for one in self._open.values():
            self._events.write(VerdictGiven.of(one, "ended", self._step))
        self._clear()

    def look(
        self,
        nodes: Sequence[NodeSteps],
        facts: Sequence[Fact],
        *,
        world_size: int,
        trials: NodeTrials | None = None,
        probe: StandstillProbe | None = None,
    ) -> None:
        """Judge, if there is a new step. What fails here is told once, and ends no training.

        Args:
            nodes: the steps of all ranks, as far as they are known.
            facts: what the nodes' monitors have seen meanwhile.
            world_size: how many ranks there are.
            trials: of nodes that are about to be accused; None if they cannot be tried out.
            probe: of links likewise.
        """
        now_s, step = time.monotonic(), newest_common_step(nodes)
        if self._look is None and not self._broken and world_size > 1 and step > self._step and now_s >= self._next_s:
            self._look = _Look(nodes, facts, world_size, step)
            self._look.start()
            self._look.join(WAIT_S)
        if self._look is not None and not self._look.is_alive():
            done, self._look = self._look, None
            self._next_s = time.monotonic() + done.seconds / COST_SHARE
            if done.error:
                self._broken = True
                log.warning("outlast: slow ranks are not told any more: %s", done.error)
            elif done.said is not None:
                self._step = done.step
                self._judge(done.said, nodes)
                _prepare([one for one in done.said if _is_of_ranks(one) and one.key not in self._open], nodes, trials)
        for key, one in list(self._waiting.items()):
            tried = _ranks_tried(one, nodes, trials) if _is_of_ranks(one) else _links_tried(one, nodes, probe)
            if tried is not None:
                del self._waiting[key]
                self._tell(tried, nodes)

    def _judge(self, said: Sequence[Verdict], nodes: Sequence[NodeSteps]) -> None:
        of_ranks = [one for one in said if _is_of_ranks(one)]
        # what ranks exchange is slow for want of a core too, so links are looked at only where no rank is slow
        of_links = [replace(one, confidence="likely") for one in said if not of_ranks and not _is_of_ranks(one)]
        self._ranks, believed = self._ranks.look(of_ranks)
        self._links, slow = self._links.look(of_links)
        held = frozenset[Key]().union(*self._ranks.looks, *self._links.looks)
        self._waiting = {key: one for key, one in self._waiting.items() if key in held}
        for one in (*believed, *slow):
            before = self._open.get(one.key)
            if before is None:
                if _is_of_ranks(one) or not self._transfer_s:
                    waits = self._waiting.get(one.key, one)  # the steps before it became slow are soon forgotten
                    self._waiting[one.key] = replace(one, step=waits.step)
            elif SURE.index(one.cause_confidence) > SURE.index(before.cause_confidence):
                # monitors find what lasts a sample or two late
                self._open[one.key] = one = replace(one, step=before.step, tried=before.tried)
                why = "likely" if one.cause_confidence == "likely" else "perhaps"
                log.warning("outlast: %s is slow %s because of %s", one.culprit, why, one.cause)
                self._events.write(VerdictGiven.of(one, "lasts", self._step))
        for key in [key for key in self._open if key not in held]:
            if not self._is_over(key, nodes):
                continue  # it is less sure for a while, as on a machine that others keep busy
            one = self._open.pop(key)
            self._transfer_s.pop(key, None)
            log.warning("outlast: %s is as fast as its peers again, at step %d", one.culprit, self._step)
            self._events.write(VerdictGiven.of(one, "ended", self._step))

    def _tell(self, one: Verdict, nodes: Sequence[NodeSteps]) -> None:
        if not one.culprit.nodes and one.culprit.place in ("node", "link", "group"):
            return  # nobody stands out, and what was tried out is an event of its own
        self._open[one.key] = one
        if not _is_of_ranks(one):
            self._transfer_s[one.key] = transfer_s(nodes)
        log.warning("outlast: %s; tried out: %s; nothing is done about it", one, one.tried)
        self._events.write(VerdictGiven.of(one, "began", self._step))

    def _is_over(self, key: Key, nodes: Sequence[NodeSteps]) -> bool:
        """Whether its ranks come no later now than by half of what was told; of a link, what it took likewise."""
        one = self._open[key]
        half_s = (one.cost_s or 0.0) / 2
        if key in self._transfer_s:
            return transfer_s(nodes) < self._transfer_s[key] - half_s
        return all(late_s < half_s for late_s in behind_s(nodes, one.culprit.ranks).values())


def _is_of_ranks(one: Verdict) -> bool:
    return one.syndrome == "non_communication_slow"


def _is_own_cause(one: Verdict) -> bool:
    return one.is_software and one.cause_confidence == "likely"


def _prepare(said: Sequence[Verdict], nodes: Sequence[NodeSteps], trials: NodeTrials | None) -> None:
    """Have the node tried out that these nodes will be compared with, should they be accused."""
    names = [node.node for node in nodes]
    for one in said:
        if trials is not None and one.culprit.nodes and one.confidence != "weak" and not _is_own_cause(one):
            trials.prepare(names.index(one.culprit.nodes[0]))


def _ranks_tried(one: Verdict, nodes: Sequence[NodeSteps], trials: NodeTrials | None) -> Verdict | None:
    """The verdict with what its node's test says; None until that is known."""
    names = [node.node for node in nodes]
    if _is_own_cause(one):
        return replace(one, tried=OWN_CAUSE)
    if trials is None or not one.culprit.nodes or one.culprit.nodes[0] not in names:
        return replace(one, tried=NO_NODE)
    tried = trials.outcome(names.index(one.culprit.nodes[0]), names)
    return None if tried is None else replace(one, tried=tried)


def _links_tried(one: Verdict, nodes: Sequence[NodeSteps], probe: StandstillProbe | None) -> Verdict | None:
    """The verdict with the link or node that a probe of all links found, or with nobody; None until that is known."""
    if probe is None or len(nodes) < 2:
        return replace(one, culprit=Culprit(place="group"))
    found = probe.links()
    if found is None:
        return None
    if not found.link_nodes or max(found.link_nodes) >= len(nodes):
        return replace(one, culprit=Culprit(place="group"))
    at = [nodes[node] for node in found.link_nodes]
    ranks = tuple(rank.rank for node in at for rank in node.ranks) if found.link_place == "node" else ()
    return replace(
        one,
        culprit=Culprit(
            place="link" if found.link_place == "link" else "node", nodes=tuple(node.node for node in at), ranks=ranks
        ),
        ruled_out=(*one.ruled_out, "the other links: they were tried out in the same way"),
        tried=found.link_words,
    )


class _Look(threading.Thread):
    """One look, beside the launcher. A daemon: nothing waits for it."""

    def __init__(self, nodes: Sequence[NodeSteps], facts: Sequence[Fact], world_size: int, step: int) -> None:
        super().__init__(name="outlast-slow", daemon=True)
        self._nodes, self._facts, self._world_size, self.step = nodes, facts, world_size, step
        self.said: tuple[Verdict, ...] | None = None
        """None if not all ranks have told of steps."""
        self.error = ""
        self.seconds = 0.0

    def run(self) -> None:
        """Judge."""
        began_s = time.thread_time()
        try:
            self.said = judge_steps(self._nodes, self._facts, world_size=self._world_size)
        except Exception as error:
            self.error = f"{type(error).__name__}: {error}"
        self.seconds = time.thread_time() - began_s
