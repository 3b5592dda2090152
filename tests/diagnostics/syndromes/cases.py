"""Each kind of fault, at a place and a time that the seed chooses, and what has to be said of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from outlast.diagnostics.syndromes.analyse import analyse
from outlast.diagnostics.syndromes.crash import Ended
from outlast.diagnostics.syndromes.facts import Fact
from outlast.diagnostics.syndromes.trace import Trace
from outlast.diagnostics.syndromes.verdict import Syndrome, Verdict
from tests.diagnostics.syndromes.traces import CHUNKS, DEAD, STOPPED, Fault, Layout, Simulation

LEAST_HANG_S = 5.6
"""From the begin of a hang to the look at it; more where steps are long."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A trace, and the right answer."""

    trace: Trace
    syndrome: Syndrome | None = None
    """None: nobody may be accused."""
    place: str = ""
    ranks: tuple[int, ...] = ()
    nodes: tuple[str, ...] = ()
    cause: str = ""
    facts: Sequence[Fact] = ()
    ends: Sequence[Ended] = ()

    def judged(self) -> tuple[Verdict, ...]:
        """What is said."""
        return analyse(self.trace, facts=self.facts, ends=self.ends)

    def grade(self, said: Sequence[Verdict]) -> str:
        """``right``, or what else was said. A weak verdict accuses nobody."""
        accusing = [one for one in said if one.confidence != "weak"]
        if self.syndrome is None:
            return "right" if not accusing else str(accusing[0])
        if not accusing:
            return f"nothing ({said[0]})" if said else "nothing"
        wrong = [one for one in accusing if not self._fits(one)]
        return "right" if not wrong else str(wrong[0])

    def _fits(self, verdict: Verdict) -> bool:
        who = verdict.culprit
        return (
            verdict.syndrome == self.syndrome
            and (
                who.place == self.place or (self.place == "node" and len(who.nodes) == 1 and self._is_whole(who.ranks))
            )
            and (not self.ranks or who.ranks == self.ranks)
            and (not self.nodes or tuple(sorted(who.nodes)) == tuple(sorted(self.nodes)))
            and self.cause in verdict.cause
        )

    def _is_whole(self, ranks: Sequence[int]) -> bool:
        """Whether these are all the ranks of the node."""
        node_of = self.trace.job.node_of
        return bool(ranks) and len(ranks) == int((node_of == node_of[ranks[0]]).sum())


Maker = Callable[[int, Layout], Case]


def _fault(kind: str, seed: int, layout: Layout, **more: float) -> Fault:
    random = np.random.default_rng(1000 + seed)
    node = int(random.integers(layout.nodes))
    return Fault(
        kind=kind,
        rank=int(random.integers(layout.world_size)),
        node=node,
        step=int(random.integers(14, 22)),
        chunk=int(random.integers(CHUNKS)),
        **more,  # type: ignore[arg-type]
    )


def _run(fault: Fault, seed: int, layout: Layout, steps: int = 40) -> Simulation:
    with np.errstate(invalid="ignore"):
        return Simulation(layout, seed, fault, steps).run()


def _hung(simulation: Simulation) -> float:
    """A moment at which it has hung for longer than max(5 s, 3 x p99 step)."""
    return simulation.begun_s + max(LEAST_HANG_S, 3.5 * simulation.begun_s / simulation.fault.step)


def _after(simulation: Simulation) -> float:
    """When all has been done."""
    return float(simulation.t.max()) + 0.01


def _rank_case(simulation: Simulation, trace: Trace, syndrome: Syndrome, **more: object) -> Case:
    rank = simulation.fault.rank
    return Case(
        trace=trace,
        syndrome=syndrome,
        place="rank",
        ranks=(rank,),
        nodes=(simulation.job.node(rank),),
        **more,  # type: ignore[arg-type]
    )


def clean(seed: int, layout: Layout) -> Case:
    simulation = _run(Fault(), seed, layout)
    at = np.random.default_rng(seed).uniform(0.3, 1.0)
    return Case(trace=simulation.trace(_after(simulation) * at))


def stopped(seed: int, layout: Layout) -> Case:
    simulation = _run(_fault("stopped", seed, layout), seed, layout, 24)
    trace = simulation.trace(_hung(simulation), state={simulation.fault.rank: STOPPED})
    return _rank_case(simulation, trace, "non_communication_hang")


def dead(seed: int, layout: Layout) -> Case:
    simulation = _run(_fault("dead", seed, layout), seed, layout, 24)
    rank = simulation.fault.rank
    trace = simulation.trace(simulation.begun_s + 1.0, state={rank: DEAD})
    random = np.random.default_rng(seed)
    others = [one for one in random.permutation(layout.world_size)[:5].tolist() if one != rank]
    at = simulation.job.node_of
    now = trace.clocks.now_s
    ends = [Ended(rank=one, status=1, ended_s=float(now[at[one]]), lost_peer=True, message="lost") for one in others]
    ends.append(Ended(rank=rank, status=int(random.choice([-9, -11, 1])), ended_s=float(now[at[rank]])))
    return _rank_case(simulation, trace, "crash", ends=ends)


def early_exit(seed: int, layout: Layout) -> Case:
    simulation = _run(_fault("early_exit", seed, layout), seed, layout, 24)
    rank = simulation.fault.rank
    trace = simulation.trace(simulation.begun_s + 1.0, state={rank: DEAD})
    victims = [Ended(rank=(rank + 1) % layout.world_size, status=1, lost_peer=True)] if seed % 2 else []
    return _rank_case(simulation, trace, "crash", ends=[*victims, Ended(rank=rank, status=0)])


def _asleep(kind: str) -> Maker:
    def make(seed: int, layout: Layout) -> Case:
        simulation = _run(_fault(kind, seed, layout, seconds=60.0), seed, layout, 24)
        trace = simulation.trace(_hung(simulation))
        return _rank_case(simulation, trace, "non_communication_hang")

    return make


def sleep_inside(seed: int, layout: Layout) -> Case:
    simulation = _run(_fault("sleep_inside", seed, layout), seed, layout, 24)
    return _rank_case(simulation, simulation.trace(_hung(simulation)), "communication_hang")


def _unordered(kind: str) -> Maker:
    def make(seed: int, layout: Layout) -> Case:
        simulation = _run(_fault(kind, seed, layout), seed, layout, 24)
        return _rank_case(simulation, simulation.trace(_hung(simulation)), "desynchronised")

    return make


def node_gone(seed: int, layout: Layout) -> Case:
    simulation = _run(_fault("node_gone", seed, layout), seed, layout, 24)
    node = simulation.fault.node
    trace = simulation.trace(simulation.begun_s + 10.0, silent_nodes=(node,))
    name = simulation.job.nodes[node]
    return Case(trace=trace, syndrome="non_communication_hang", place="node", nodes=(name,))


def cut_link(seed: int, layout: Layout) -> Case:
    simulation = _run(_fault("cut_link", seed, layout), seed, layout, 24)
    nodes = simulation.job.nodes
    ends = nodes[simulation.fault.node], nodes[(simulation.fault.node + 1) % layout.nodes]
    trace = simulation.trace(_hung(simulation))
    return Case(trace=trace, syndrome="communication_hang", place="link", nodes=ends)


def _slow(kind: str) -> Maker:
    def make(seed: int, layout: Layout) -> Case:
        factor = float(np.random.default_rng(seed).uniform(1.6, 3.0))
        simulation = _run(_fault(kind, seed, layout, factor=factor), seed, layout)
        return _rank_case(simulation, simulation.trace(_after(simulation)), "non_communication_slow")

    return make


def slow_node(seed: int, layout: Layout) -> Case:
    simulation = _run(_fault("slow_node", seed, layout, factor=1.5 + seed % 5 / 10), seed, layout)
    name = simulation.job.nodes[simulation.fault.node]
    trace = simulation.trace(_after(simulation))
    return Case(trace=trace, syndrome="non_communication_slow", place="node", nodes=(name,))


def slow_role(seed: int, layout: Layout) -> Case:
    simulation = _run(_fault("slow_role", seed, layout, factor=1.6), seed, layout)
    ranks = np.flatnonzero(simulation.stage == simulation.fault.node % layout.pp)
    trace = simulation.trace(_after(simulation))
    return Case(trace=trace, syndrome="non_communication_slow", place="role", ranks=tuple(map(int, ranks)))


def slow_link(seed: int, layout: Layout) -> Case:
    simulation = _run(_fault("slow_link", seed, layout, factor=10.0), seed, layout)
    nodes = simulation.job.nodes
    ends = nodes[simulation.fault.node], nodes[(simulation.fault.node + 1) % layout.nodes]
    trace = simulation.trace(_after(simulation))
    return Case(trace=trace, syndrome="communication_slow", place="link", nodes=ends)


def slow_adapter(seed: int, layout: Layout) -> Case:
    simulation = _run(_fault("slow_adapter", seed, layout, factor=8.0), seed, layout)
    name = simulation.job.nodes[simulation.fault.node]
    trace = simulation.trace(_after(simulation))
    return Case(trace=trace, syndrome="communication_slow", place="node", nodes=(name,))


def garbage(seed: int, layout: Layout) -> Case:
    simulation = _run(_fault("garbage", seed, layout, seconds=0.9), seed, layout)
    now = _after(simulation)
    trace = simulation.trace(now)
    facts = simulation.known_facts(trace, now)
    return _rank_case(simulation, trace, "non_communication_slow", facts=facts, cause="garbage collection")


def throttled(seed: int, layout: Layout) -> Case:
    simulation = _run(_fault("throttled", seed, layout, factor=2.5), seed, layout)
    trace = simulation.trace(_after(simulation))
    rank = simulation.fault.rank
    node = simulation.job.node(rank)
    now = float(trace.clocks.now_s[simulation.job.node_of[rank]])
    begin = simulation.begun_s + now - _after(simulation)
    kind = "cpu_throttled" if seed % 2 else "busy_neighbour"
    facts = [Fact(kind=kind, node=node, rank=rank, begin_s=begin, end_s=now, value=0.6)]  # type: ignore[arg-type]
    cause = "throttled cgroup" if seed % 2 else "another process"
    return _rank_case(simulation, trace, "non_communication_slow", facts=facts, cause=cause)


def _shared(kind: str, seconds: float, phase: str) -> Maker:
    """All ranks do it; looked at while they do, as the first ones are back, and afterwards."""

    def make(seed: int, layout: Layout) -> Case:
        simulation = _run(_fault(kind, seed, layout, seconds=seconds), seed, layout, 30)
        shares = (0.5, 0.99, 1.02, 1.3)
        now = simulation.begun_s + seconds * shares[seed % 4]
        every = range(layout.world_size)
        during = {rank: phase for rank in every} if seed % 4 < 2 else {}
        excused_s = seconds if kind == "suspended" else 0.0
        return Case(trace=simulation.trace(now, phase=during, excused_s=excused_s))

    return make


def checkpoint_alone(seed: int, layout: Layout) -> Case:
    simulation = _run(_fault("checkpoint_alone", seed, layout, seconds=40.0), seed, layout, 30)
    now = simulation.begun_s + float(np.random.default_rng(seed).uniform(5, 39))
    return Case(trace=simulation.trace(now, phase={simulation.fault.rank: "checkpoint"}))


def spike(seed: int, layout: Layout) -> Case:
    simulation = _run(_fault("spike", seed, layout, seconds=3.0), seed, layout)
    return Case(trace=simulation.trace(_after(simulation)))


def first_step(seed: int, layout: Layout) -> Case:
    fault = _fault("first_step", seed, layout, seconds=40.0)
    simulation = _run(fault, seed, layout, 20)
    shares = (0.5, 0.97, 1.05, 1.6)
    return Case(trace=simulation.trace(simulation.begun_s + 40.0 * shares[seed % 4]))


CASES: dict[str, Maker] = {
    "stopped rank": stopped,
    "dead rank": dead,
    "early exit 0": early_exit,
    "sleep before": _asleep("sleep_before"),
    "sleep inside": sleep_inside,
    "sleep after": _asleep("sleep_after"),
    "skipped collective": _unordered("skipped"),
    "wrong size": _unordered("wrong_size"),
    "node gone": node_gone,
    "cut link": cut_link,
    "slow compute": _slow("slow_compute"),
    "slow backward": _slow("slow_backward"),
    "slow node": slow_node,
    "slow role": slow_role,
    "slow link": slow_link,
    "slow adapter": slow_adapter,
    "garbage collection": garbage,
    "throttled or busy": throttled,
    "clean": clean,
    "data stall of all": _shared("data_stall", 30.0, "data"),
    "evaluation of all": _shared("evaluation", 60.0, "eval"),
    "checkpoint of one": checkpoint_alone,
    "spike": spike,
    "slow first step": first_step,
    "suspended machine": _shared("suspended", 60.0, "step"),
}


@dataclass
class Row:
    """Of one fault: how often which class was said, and what was wrong."""

    fault: str
    right: int = 0
    total: int = 0
    classes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def confusion(seeds: Sequence[int], layout: Layout, faults: Sequence[str] = ()) -> list[Row]:
    """What is said of each fault at each seed."""
    rows = []
    for name in faults or CASES:
        row = Row(name)
        for seed in seeds:
            case = CASES[name](seed, layout)
            verdicts = case.judged()
            said = case.grade(verdicts)
            accusing = [one for one in verdicts if one.confidence != "weak"]
            row.total += 1
            row.right += said == "right"
            row.classes[accusing[0].syndrome if accusing else "-"] += 1
            if said != "right":
                row.wrong.append(
                    f"seed {seed}: {said}; expected {case.syndrome} {case.place} {case.ranks} {case.nodes}"
                )
        rows.append(row)
    return rows
