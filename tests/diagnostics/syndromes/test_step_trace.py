"""Who is slow is told from two numbers a step and rank; nobody is accused of noise, a spike, or for lack of words."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from outlast.diagnostics.syndromes.analyse import analyse
from outlast.diagnostics.syndromes.facts import Fact
from outlast.diagnostics.syndromes.from_steps import judge_steps
from outlast.diagnostics.syndromes.rank_facts import rank_facts
from outlast.diagnostics.syndromes.step_trace import (
    MOST_STEPS,
    NodeSteps,
    RankSteps,
    behind_s,
    decode_steps,
    newest_common_step,
    trace_of_steps,
    transfer_s,
    without_gaps,
)
from outlast.diagnostics.syndromes.verdict import Verdict
from outlast.errors import DiagnosticsError

STEP_S = 0.2


def job(
    ranks: int,
    steps: int,
    late_s: dict[int, tuple[int, float]],
    *,
    per_node: int = 4,
    noise: float = 0.03,
    seed: int = 0,
    every: int = 1,
    until: int = 10**6,
    step_s: float = STEP_S,
    exchange_s: tuple[int, float] = (10**6, 0.0),
) -> list[NodeSteps]:
    """The newest steps of each rank, as messages carry them.

    Args:
        ranks: of the job.
        steps: that it has done.
        late_s: by rank, from which step on it works how much longer.
        per_node: ranks of a node.
        noise: of a rank's work, as a share of a step.
        seed: of the noise, and of when steps are told.
        every: it is late in every so-manieth step only.
        until: ... and up to this step.
        step_s: that a rank works.
        exchange_s: from which step on collectives take how much longer, up to the same step.
    """
    rng = np.random.default_rng(seed)
    told: dict[int, list[tuple[int, float, float]]] = {rank: [] for rank in range(ranks)}
    now_s = 0.0
    for step in range(1, steps + 1):
        own = step_s + np.abs(rng.normal(0, noise * step_s, ranks))
        for rank, (first, more_s) in late_s.items():
            own[rank] += more_s if first <= step < until and step % every == 0 else 0.0
        end_s = now_s + own.max() + 0.03 + (exchange_s[1] if exchange_s[0] <= step < until else 0.0)
        for rank in range(ranks):
            told[rank].append((step, end_s + rng.normal(0, 0.001), end_s - now_s - own[rank]))
        now_s = end_s
    nodes = []
    for node in range(-(-ranks // per_node)):
        mine = []
        for rank in range(node * per_node, min(ranks, (node + 1) * per_node)):
            rows = told[rank][-MOST_STEPS:]
            one = RankSteps(
                rank=rank,
                steps=tuple(row[0] for row in rows),
                done_s=tuple(row[1] - now_s for row in rows),
                inside_s=tuple(row[2] for row in rows),
            )
            mine.append(decode_steps(rank, one.encode()))
        nodes.append(NodeSteps(node=f"n{node}", now_s=0.0, ranks=mine))
    return nodes


def said(nodes: list[NodeSteps], facts: tuple[Fact, ...] = ()) -> list[Verdict]:
    trace = trace_of_steps(nodes, world_size=sum(len(node.ranks) for node in nodes))
    assert trace is not None
    return [one for one in analyse(trace, facts=facts) if one.confidence != "weak"]


@pytest.mark.parametrize("ranks", [2, 8, 64])
def test_the_rank_since_when_and_by_how_much(ranks: int) -> None:
    (one,) = said(job(ranks, 40, {1: (25, 0.1)}))
    assert (one.syndrome, one.culprit.place, one.culprit.ranks) == ("non_communication_slow", "rank", (1,))
    assert one.step == 25
    assert one.cost_s == pytest.approx(0.1, abs=0.02)
    assert "its peers waited 1" in one.evidence, one.evidence


def test_within_ten_steps_of_the_shift() -> None:
    assert said(job(8, 29, {5: (30, 0.1)})) == []
    (one,) = said(job(8, 40, {5: (30, 0.1)}))
    assert one.culprit.ranks == (5,)


def only(nodes: list[NodeSteps], *told: range) -> list[NodeSteps]:
    """The steps that ranks tell of, the same for every so-manieth rank."""

    def of(one: RankSteps) -> RankSteps:
        at = [place for place, step in enumerate(one.steps) if step in told[one.rank % len(told)]]
        steps, done_s, inside_s = (tuple(row[place] for place in at) for row in (one.steps, one.done_s, one.inside_s))
        return RankSteps(rank=one.rank, steps=steps, done_s=done_s, inside_s=inside_s)

    return [replace(node, ranks=[of(one) for one in node.ranks]) for node in nodes]


@pytest.mark.parametrize("ranks", [2, 8])
def test_steps_between_those_that_are_told_take_no_time(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.MOST_STEPS", 400)
    monkeypatch.setattr("outlast.diagnostics.syndromes.step_trace.MOST_STEPS", 400)
    nodes = job(ranks, 320, {1: (200, 0.1)})
    seldom = without_gaps(only(nodes, range(0, 321, 8)))
    (one,) = said(seldom)
    assert (one.culprit.ranks, one.step) == ((1,), 200)
    assert one.cost_s == pytest.approx(0.1, abs=0.02)
    # ranks that look in some of the others' steps only
    uneven = without_gaps(only(nodes, range(0, 321, 8), range(0, 321, 16)))
    assert {len([step for step in of.steps if 16 <= step < 300]) for node in uneven for of in node.ranks} == {18}
    (one,) = said(uneven)
    assert one.culprit.ranks == (1,)
    assert said(without_gaps(only(job(ranks, 320, {}), range(0, 321, 8), range(0, 321, 16)))) == []


def test_without_gaps_nothing_changes() -> None:
    nodes = job(8, 40, {1: (25, 0.1)})
    assert without_gaps(nodes) == nodes
    lagging = [nodes[0], replace(nodes[1], ranks=[replace(one, steps=one.steps[:-2]) for one in nodes[1].ranks])]
    lagging[1] = only(nodes, range(0, 39))[1]
    assert without_gaps(lagging) == lagging
    assert without_gaps([]) == []


def test_all_ranks_of_a_node_are_the_node_and_of_two_ranks_the_one_is_named_that_is_waited_for() -> None:
    (node,) = said(job(12, 40, dict.fromkeys(range(4, 8), (20, 0.1))))
    assert str(node.culprit) == "node n1"
    (last,) = said(job(12, 40, {4: (20, 0.1), 9: (20, 0.15)}))
    assert last.culprit.ranks == (9,)


def test_a_cause_of_the_same_time_is_named() -> None:
    fact = Fact(kind="cpu_throttled", node="n1", rank=5, begin_s=-4.0, end_s=0.0, value=0.4, lost_s=3.0, detail="/job")
    (one,) = said(job(8, 40, {5: (25, 0.1)}), (fact,))
    assert one.cause.startswith("a throttled cgroup")
    assert one.is_software
    (other,) = said(job(8, 40, {5: (25, 0.1)}), (replace(fact, node="n0", rank=2),))
    assert other.cause == ""


def test_what_other_ranks_of_the_node_have_as_well_is_no_measured_cause() -> None:
    def fact(rank: int, lost_s: float) -> Fact:
        return Fact(kind="busy_neighbour", node="n1", rank=rank, begin_s=-4.0, end_s=0.0, value=1.0, lost_s=lost_s)

    nodes = job(8, 40, {5: (25, 0.1)})
    (alike,) = said(nodes, tuple(fact(rank, 2.0) for rank in (4, 5, 6, 7)))
    assert alike.cause_confidence == "weak", "it was so, and the others are not slow"
    (more,) = said(nodes, tuple(fact(rank, 3.0 if rank == 5 else 0.5) for rank in (4, 5, 6, 7)))
    assert more.cause_confidence == "likely"
    waits = replace(fact(5, 1.5), kind="data_wait", begin_s=-1.5)
    (own,) = said(nodes, (waits, fact(5, 3.0)))
    assert own.cause.startswith("data loading: "), "the rank knows better"


def test_what_a_rank_tells_of_its_own_delays_is_the_cause_if_it_explains_enough() -> None:
    nodes = job(8, 40, {5: (25, 0.1)})
    rank = nodes[1].ranks[1]

    def with_waits(seconds: float) -> list[NodeSteps]:
        delays_s = tuple((0.0, seconds if step >= 25 else 0.0, 0.0, 0.0) for step in rank.steps)
        one = decode_steps(5, replace(rank, delays_s=delays_s).encode())
        return [nodes[0], replace(nodes[1], ranks=(nodes[1].ranks[0], one, *nodes[1].ranks[2:]))]

    (one,) = said(nodes, rank_facts(with_waits(0.09), [5]))
    assert one.cause.startswith("data loading: 0.09 s waiting for data"), one.cause
    assert one.is_software
    (other,) = said(nodes, rank_facts(with_waits(0.02), [5]))
    assert other.cause == ""
    assert rank_facts(with_waits(0.09), [4]) == ()


@pytest.mark.parametrize("seed", range(6))
def test_clean_steps_accuse_nobody(seed: int) -> None:
    for ranks, noise in ((2, 0.03), (2, 0.3), (8, 0.15), (64, 0.1)):
        assert said(job(ranks, 20 + 10 * seed, {}, noise=noise, seed=seed)) == []


def test_slow_exchange_accuses_nobody_before_links_are_tried_out() -> None:
    nodes = job(12, 40, {}, exchange_s=(25, 0.1))
    assert said(nodes) == []
    (one,) = judge_steps(nodes, (), world_size=12) or ()
    assert (one.syndrome, one.culprit.place, one.confidence) == ("communication_slow", "group", "weak")
    assert one.step == 25
    assert one.cost_s == pytest.approx(0.1, abs=0.02)
    assert transfer_s(nodes) == pytest.approx(0.13, abs=0.02)
    assert judge_steps(nodes[:1], (), world_size=12) is None


def test_a_spike_and_what_has_healed_are_nothing() -> None:
    assert said(job(8, 40, {5: (30, 3.0)}, until=31)) == []
    assert said(job(8, 40, {5: (15, 0.1)}, until=33)) == []
    assert said(job(8, 40, {5: (1, 0.1)}, every=10)) == []


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_when_one_has_healed_its_peer_has_not_become_slow(ranks: int) -> None:
    for healed in range(20, 40, 3):
        # steps so short that their noise is as long as what a slow rank costs
        found = said(job(ranks, 40, {1: (8, 0.1)}, until=healed, step_s=0.02, noise=0.8))
        assert not [one for one in found if one.culprit.ranks != (1,)], found


def test_nothing_is_said_before_all_ranks_have_told() -> None:
    nodes = job(8, 40, {5: (20, 0.1)})
    assert trace_of_steps(nodes[:1], world_size=8) is None
    silent = replace(nodes[1], ranks=(*nodes[1].ranks[:-1], RankSteps(rank=7, steps=(), done_s=(), inside_s=())))
    assert trace_of_steps([nodes[0], silent], world_size=8) is None
    assert newest_common_step([nodes[0], silent]) == -1
    assert newest_common_step(nodes) == 40
    assert newest_common_step([]) == -1


def test_a_rank_that_is_behind_is_judged_by_the_steps_that_all_have() -> None:
    nodes = job(8, 40, {5: (20, 0.1)})
    late = nodes[0].ranks[0]
    cut = RankSteps(rank=0, steps=late.steps[:-3], done_s=late.done_s[:-3], inside_s=late.inside_s[:-3])
    (one,) = said([replace(nodes[0], ranks=(cut, *nodes[0].ranks[1:])), nodes[1]])
    assert one.culprit.ranks == (5,)


def test_how_late_each_rank_is_now() -> None:
    late = behind_s(job(8, 40, {5: (20, 0.1)}), range(8))
    assert late[5] == pytest.approx(0.1, abs=0.02)
    assert max(abs(one) for rank, one in late.items() if rank != 5) < 0.02
    assert behind_s(job(8, 40, {5: (15, 0.1)}, until=33), [5])[5] < 0.02, "most of the newest ten are as others'"
    assert behind_s([], [5]) == {}


def test_what_is_told_is_bounded_and_checked() -> None:
    long = RankSteps(
        rank=3,
        steps=tuple(range(500)),
        done_s=(-1.5,) * 500,
        inside_s=(0.25,) * 500,
        delays_s=((0.125, 0.0, 1e6, 0.0),) * 500,
        elements=(16.0,) * 500,
    )
    text = long.encode()
    assert len(text) <= 1536
    read = decode_steps(3, text)
    assert read.steps == tuple(range(500 - MOST_STEPS, 500))
    assert (read.elements[-1], read.delays_s[-1][0]) == (16.0, 0.125)
    assert 50_000 < read.delays_s[-1][2] < 70_000, "as much as fits"
    for wrong in (
        "%%%",
        text[:-4],
        text + text,
        RankSteps(rank=3, steps=(1,), done_s=(np.nan,), inside_s=(0.0,)).encode(),
    ):
        with pytest.raises(DiagnosticsError):
            decode_steps(3, wrong)


@pytest.mark.slow
def test_a_job_of_4096_ranks_is_judged() -> None:
    """In half a second of one core; here ten times as much is let pass, whatever else this machine does."""
    nodes = job(4096, 48, {77: (30, 0.1)}, per_node=8)
    began_s = time.thread_time()
    (one,) = said(nodes)
    assert time.thread_time() - began_s < 5.0
    assert one.culprit.ranks == (77,)
