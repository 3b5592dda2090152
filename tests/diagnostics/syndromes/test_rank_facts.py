"""What ranks told of themselves becomes facts of the one that had more of it than its peers, and explains a verdict."""

from __future__ import annotations

from typing import Any

import pytest

from outlast.diagnostics.syndromes.analyse import analyse
from outlast.diagnostics.syndromes.rank_facts import NodeTime, rank_facts
from outlast.events import Record
from tests.diagnostics.syndromes.cases import CASES
from tests.diagnostics.syndromes.traces import Layout

NODES = {0: "a", 1: "a", 2: "b", 3: "b"}
TIMES = {"a": NodeTime(t=1000.0, at_s=50.0), "b": NodeTime(t=1003.0, at_s=7000.0)}


def delay(rank: int, step: int, seconds: float, what: str = "garbage_collection", **more: Any) -> Record:
    return Record(990.0 + step, rank, 0, "rank_delay", {"step": step, "what": what, "seconds": seconds} | more)


def program_step(rank: int, step: int, elements: int, step_s: float = 1.0, waited_s: float | None = 0.0) -> Record:
    fields = {"step": step, "step_s": step_s, "collective_s": waited_s, "data_s": 0.0, "batch_elements": elements}
    return Record(990.0 + step, rank, 0, "program_step", fields)


def test_a_delay_of_one_rank_is_a_fact_on_its_nodes_clock() -> None:
    (fact,) = rank_facts([delay(2, 5, 0.4, generation_collected=2)], nodes=NODES, times=TIMES)
    assert (fact.kind, fact.node, fact.rank, fact.value, fact.lost_s) == ("garbage_collection", "b", 2, 0.4, 0.4)
    assert (fact.begin_s, fact.end_s) == (pytest.approx(6991.6), pytest.approx(6992.0))
    assert fact.words() == "garbage collection: 0.4 s in collections, 0.4 s lost (generation 2)"


def test_what_all_have_alike_is_none_and_of_two_that_have_more_both_are_told() -> None:
    assert rank_facts([delay(rank, 5, 0.4, "data_wait") for rank in NODES], nodes=NODES, times=TIMES) == ()
    more = [delay(rank, 5, 0.1 if rank < 2 else 0.5, "compile") for rank in NODES]
    found = rank_facts(more, nodes=NODES, times=TIMES)
    assert [(one.rank, round(one.lost_s or 0.0, 6)) for one in found] == [(2, 0.4), (3, 0.4)]


def test_events_that_are_not_known_are_left_out() -> None:
    records = [delay(2, 5, 0.4, "what comes later"), delay(9, 5, 0.4), Record(0.0, 0, 0, "eval", {"step": 3})]
    assert rank_facts(records, nodes=NODES, times=TIMES) == ()


def test_a_rank_with_more_to_do_has_uneven_work_if_it_takes_longer() -> None:
    def run(own: int, waited_s: float) -> list[Record]:
        return [
            program_step(rank, step, own if rank == 3 else 100, waited_s=0.0 if rank == 3 else waited_s)
            for step in range(1, 9)
            for rank in NODES
        ]

    unknown = [program_step(rank, step, 100, step_s=1.0, waited_s=None) for step in range(9, 99) for rank in NODES]
    assert rank_facts([*run(200, 0.5), *unknown], nodes=NODES, times=TIMES) == rank_facts(
        run(200, 0.5), nodes=NODES, times=TIMES
    )
    found = rank_facts(run(200, 0.5), nodes=NODES, times=TIMES)
    assert {(one.kind, one.rank) for one in found} == {("uneven_work", 3)}
    assert len(found) == 8
    assert found[0].value == 2.0
    assert found[0].lost_s == pytest.approx(0.5)
    assert "batch of 200 elements against a median of 100" in found[0].words()
    assert rank_facts(run(100, 0.5), nodes=NODES, times=TIMES) == ()


def test_other_delays_of_the_rank_do_not_hide_uneven_work() -> None:
    records = []
    for step in range(1, 17):
        collects, more = step <= 4, step > 12
        step_s = 4.0 if collects else 1.0
        records += [program_step(rank, step, 100, step_s, step_s - 0.5) for rank in range(3)]
        records.append(program_step(3, step, 200 if more else 100, step_s, 0.0 if more or collects else 0.5))
        records += [delay(3, step, 3.5)] if collects else []
    found = rank_facts(records, nodes=NODES, times=TIMES)
    assert [one.kind for one in found] == ["garbage_collection"] * 4 + ["uneven_work"] * 4


def test_the_verdict_on_a_slow_rank_names_it_unless_its_peers_have_as_much() -> None:
    case = CASES["garbage collection"](1, Layout())
    job = case.trace.job
    nodes = {rank: job.nodes[node] for rank, node in enumerate(job.node_of.tolist())}
    times = dict.fromkeys(job.nodes, NodeTime(t=0.0, at_s=0.0))

    def judged(ranks: tuple[int, ...]) -> str:
        records = [
            Record(one.end_s, rank, 0, "rank_delay", {"step": step, "what": one.kind, "seconds": one.lost_s})
            for step, one in enumerate(case.facts)
            for rank in ranks
        ]
        (verdict,) = analyse(case.trace, facts=rank_facts(records, nodes=nodes, times=times))
        assert verdict.culprit.ranks == case.ranks
        return verdict.cause

    assert judged(case.ranks).startswith("garbage collection: 0.9 s in collections, 0.9 s lost, ")
    assert judged(tuple(nodes)) == ""
