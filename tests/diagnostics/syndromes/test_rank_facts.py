"""What ranks told of themselves becomes facts of the one that had more of it than its peers, and explains a verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from outlast.diagnostics.syndromes.analyse import analyse
from outlast.diagnostics.syndromes.rank_facts import rank_facts
from outlast.diagnostics.syndromes.step_trace import DELAYS, NodeSteps, RankSteps, trace_of_steps
from tests.diagnostics.syndromes.test_step_trace import job

Told = Mapping[int, Mapping[int, float]]
"""By rank and step."""


def two_nodes(
    delays: Mapping[str, Told] | None = None, elements: Told | None = None, steps: int = 8
) -> list[NodeSteps]:
    """Two ranks each, with steps of a second; half of each step is spent waiting."""
    nodes = []
    for name, now_s in (("a", 0.0), ("b", 7000.0)):
        ranks = [
            RankSteps(
                rank=rank,
                steps=tuple(range(1, steps + 1)),
                done_s=tuple(now_s + step for step in range(1, steps + 1)),
                inside_s=(0.5,) * steps,
                delays_s=tuple(
                    tuple((delays or {}).get(what, {}).get(rank, {}).get(step, 0.0) for what in DELAYS)
                    for step in range(1, steps + 1)
                ),
                elements=tuple((elements or {}).get(rank, {}).get(step, 0.0) for step in range(1, steps + 1)),
            )
            for rank in ((0, 1) if name == "a" else (2, 3))
        ]
        nodes.append(NodeSteps(node=name, now_s=now_s, ranks=ranks))
    return nodes


def test_a_delay_of_one_rank_is_a_fact_on_its_nodes_clock() -> None:
    (fact,) = rank_facts(two_nodes({"garbage_collection": {2: {5: 0.4}}}), range(4))
    assert (fact.kind, fact.node, fact.rank, fact.value, fact.lost_s) == ("garbage_collection", "b", 2, 0.4, 0.4)
    assert (fact.begin_s, fact.end_s) == (pytest.approx(7004.6), pytest.approx(7005.0))
    assert fact.words() == "garbage collection: 0.4 s in collections, 0.4 s lost"


def test_what_all_have_alike_is_none_and_of_two_that_have_more_both_are_told() -> None:
    assert rank_facts(two_nodes({"data_wait": {rank: {5: 0.4} for rank in range(4)}}), range(4)) == ()
    more = {rank: {5: 0.1 if rank < 2 else 0.5} for rank in range(4)}
    found = rank_facts(two_nodes({"checkpoint": more}), range(4))
    assert [(one.rank, round(one.lost_s or 0.0, 6)) for one in found] == [(2, 0.4), (3, 0.4)]


def test_of_other_ranks_and_of_one_alone_nothing_is_told() -> None:
    nodes = two_nodes({"data_wait": {2: {5: 0.4}}})
    assert rank_facts(nodes, [3]) == ()
    assert rank_facts([replace(nodes[1], ranks=nodes[1].ranks[:1])], [2]) == ()
    assert rank_facts([], [2]) == ()


def test_a_rank_with_more_to_do_has_uneven_work_if_it_takes_longer() -> None:
    def found(own: float, waited_s: float) -> list[tuple[str, int | None, float, float]]:
        nodes = two_nodes(elements={rank: dict.fromkeys(range(1, 9), own if rank == 3 else 100.0) for rank in range(4)})
        last = replace(nodes[1].ranks[1], inside_s=(waited_s,) * 8)
        facts = rank_facts([nodes[0], replace(nodes[1], ranks=(nodes[1].ranks[0], last))], range(4))
        assert all("elements against a median of 100" in one.words() for one in facts)
        return [(one.kind, one.rank, one.value, round(one.lost_s or 0.0, 6)) for one in facts]

    assert found(200.0, 0.0) == [("uneven_work", 3, 2.0, 0.5)] * 7, "how long the first step took is not known"
    assert found(100.0, 0.0) == []


def test_other_delays_of_the_rank_do_not_hide_uneven_work() -> None:
    collects, more = {step: 3.5 for step in range(1, 5)}, range(13, 17)
    elements = {
        rank: {step: 200.0 if rank == 3 and step in more else 100.0 for step in range(1, 17)} for rank in range(4)
    }
    nodes = two_nodes({"garbage_collection": {3: collects}}, elements, steps=16)
    ends_s = tuple(4.0 * min(step, 4) + max(step - 4, 0) for step in range(1, 17))
    waits_s = tuple(3.5 if step <= 4 else 0.5 for step in range(1, 17))
    own_s = tuple(0.0 if step <= 4 or step in more else 0.5 for step in range(1, 17))
    nodes = [
        replace(
            node,
            ranks=tuple(
                replace(one, done_s=ends_s, inside_s=own_s if one.rank == 3 else waits_s) for one in node.ranks
            ),
        )
        for node in nodes
    ]
    assert [one.kind for one in rank_facts(nodes, [3])] == ["garbage_collection"] * 4 + ["uneven_work"] * 4


@pytest.mark.parametrize("what", DELAYS)
def test_the_verdict_on_a_slow_rank_names_it_unless_its_peers_have_as_much(what: str) -> None:
    nodes = job(8, 40, {5: (25, 0.1)})

    def judged(*whose: int) -> tuple[str, str | None, bool]:
        told = [
            replace(
                node,
                ranks=tuple(
                    replace(
                        one,
                        delays_s=tuple(
                            tuple(0.1 if what == name and step >= 25 else 0.0 for name in DELAYS) for step in one.steps
                        ),
                    )
                    if one.rank in whose
                    else one
                    for one in node.ranks
                ),
            )
            for node in nodes
        ]
        trace = trace_of_steps(told, world_size=8)
        assert trace is not None
        (verdict,) = analyse(trace, facts=rank_facts(told, [5]))
        assert verdict.culprit.ranks == (5,)
        return verdict.cause, verdict.cause_confidence, verdict.is_software

    words, confidence, is_software = judged(5)
    assert (confidence, is_software) == ("likely", True)
    assert ", 0.1 s lost, 16 times; " in words, words
    assert words.endswith("% of what is lost")
    assert judged(*range(8)) == ("", None, False)
