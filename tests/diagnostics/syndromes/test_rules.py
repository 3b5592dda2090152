"""The parts that verdicts are made of."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outlast.diagnostics.syndromes.analyse import analyse
from outlast.diagnostics.syndromes.crash import Ended
from outlast.diagnostics.syndromes.facts import FACT_KINDS, NAMES, UNITS, Fact, overlapping
from outlast.diagnostics.syndromes.links import find_hot, locate
from outlast.diagnostics.syndromes.others import beyond_others, median_beside, median_of_others
from outlast.diagnostics.syndromes.rules import Rules
from outlast.diagnostics.syndromes.shift import find_shifts, recurring
from outlast.diagnostics.syndromes.trace import Links, Trace
from outlast.diagnostics.syndromes.verdict import Culprit, named
from tests.diagnostics.syndromes.cases import CASES
from tests.diagnostics.syndromes.sharded import sharded_trace
from tests.diagnostics.syndromes.traces import Fault, Layout, Simulation

NODES = tuple("abcdefgh")
RULES = Rules()


@given(st.integers(2, 8), st.data())
def test_a_cell_is_a_link_and_a_row_or_column_a_node(count: int, data: st.DataObject) -> None:
    nodes = NODES[:count]
    a, b = data.draw(st.permutations(range(count)))[:2]
    matrix = np.full((count, count), 1.0)
    np.fill_diagonal(matrix, np.nan)
    matrix *= data.draw(st.floats(1e-9, 1.0))
    shape = data.draw(st.sampled_from(["cell", "row", "column"]))
    where = {"cell": (a, b), "row": (a, slice(None)), "column": (slice(None), a)}[shape]
    matrix[where] *= 4
    found = find_hot(matrix, nodes, 1.5)
    if shape == "cell" or count == 2:
        assert count == 2 or (found is not None and found.culprit.nodes == (nodes[a], nodes[b]))
    else:
        assert found is not None
        assert found.culprit == Culprit(place="node", nodes=(nodes[a],))


@given(st.integers(3, 8), st.floats(0.0, 0.2), st.integers(0, 100))
def test_an_even_matrix_is_nobodys(count: int, spread: float, seed: int) -> None:
    matrix = np.random.default_rng(seed).uniform(1 - spread, 1 + spread, (count, count))
    assert find_hot(matrix, NODES[:count], 1.5) is None
    assert find_hot(matrix * 10, NODES[:count], 1.5, matrix) is None  # all slower: the network, and no link
    assert locate(np.zeros((count, count), bool), np.ones((count, count), bool), NODES[:count]) is None


def test_links_that_have_nothing_in_common_name_nobody() -> None:
    hot = np.zeros((6, 6), dtype=bool)
    hot[0, 1] = hot[2, 3] = True
    assert locate(hot, np.ones_like(hot), NODES[:6]) is None


@given(st.lists(st.lists(st.floats(0, 10), min_size=3, max_size=3), min_size=1, max_size=9))
def test_a_rank_is_compared_with_the_others_only(rows: list[list[float]]) -> None:
    values = np.asarray(rows).T
    found = median_of_others(values)
    for rank in range(values.shape[1]):
        others = np.delete(values, rank, axis=1)
        np.testing.assert_array_equal(median_beside(values, rank), found[:, rank])
        if others.shape[1]:
            np.testing.assert_allclose(found[:, rank], np.median(others, axis=1))
            np.testing.assert_allclose(beyond_others(values, rank), np.maximum(values[:, rank] - found[:, rank], 0))
        else:
            assert np.isnan(found[:, rank]).all()
            assert not beyond_others(values, rank).any()


def test_ranks_that_are_not_known_do_not_count() -> None:
    values = np.asarray([[1.0, np.nan, 5.0, 3.0]])
    np.testing.assert_allclose(median_of_others(values)[0], [4.0, np.nan, 2.0, 3.0])
    assert median_beside(values, 1)[0] == 3.0


@given(st.integers(5, 25), st.floats(1.1, 20.0), st.integers(0, 50))
def test_a_shift_is_found_where_it_began(at: int, height: float, seed: int) -> None:
    series = np.random.default_rng(seed).normal(0, 0.05, (1, 36))
    series[:, at:] += height
    shifts = find_shifts(series, 1.0, RULES, from_start=True)
    assert shifts.found[0]
    assert abs(int(shifts.at[0]) - at) <= 1
    assert abs(float(shifts.after[0] - shifts.before[0]) - height) < 0.1


@given(st.integers(0, 35), st.floats(0.0, 1e4), st.integers(0, 50))
def test_one_spike_is_nothing(at: int, height: float, seed: int) -> None:
    series = np.random.default_rng(seed).normal(0, 0.1, (1, 36))
    series[:, at] += height
    assert not find_shifts(series, 1.0, RULES, from_start=True).found[0]
    assert not recurring(series, 1.0, RULES)[0]


def test_what_has_healed_is_nothing_and_what_is_small_is_nothing() -> None:
    series = np.random.default_rng(0).normal(0, 0.02, (3, 36))
    series[0, 10:25] += 3.0
    series[1, 10:] += 0.9
    series[2, 30:] += 3.0
    assert find_shifts(series, 1.0, RULES, from_start=True).found.tolist() == [False, False, True]


def test_what_was_so_from_the_beginning_counts_against_peers_only() -> None:
    series = np.random.default_rng(0).normal(2.0, 0.02, (1, 36))
    assert find_shifts(series, 1.0, RULES, from_start=True).at.tolist() == [0]
    assert not find_shifts(series, 1.0, RULES, from_start=False).found[0]


@pytest.mark.parametrize("kind", ["slow_backward", "slow_node", "slow_link"])
def test_slowness_is_told_within_ten_steps(kind: str) -> None:
    fault = Fault(kind=kind, rank=6, node=1, step=20, factor=10.0 if kind == "slow_link" else 2.0)
    simulation = Simulation(Layout(), 5, fault, steps=40).run()
    end_s = float(simulation.t.max()) + 1.0
    trace = simulation.trace(end_s)
    calls = trace.calls
    entered_s = calls.enter_s - trace.clocks.now_s[trace.job.node_of[calls.rank]] + end_s
    begin_s = [float(entered_s[calls.step == step].min()) for step in (20, 30)]
    assert analyse(simulation.trace(begin_s[0])) == ()
    assert analyse(simulation.trace(begin_s[1]))[0].step in (19, 20, 21)


def test_clean_steps_of_noisy_machines_accuse_nobody() -> None:
    for layout in (Layout(nodes=2, per_node=1, tp=1, pp=1), Layout(nodes=4, per_node=2, tp=2, pp=1)):
        for seed in range(5):
            simulation = Simulation(layout, seed, steps=36, noise=0.2).run()
            said = analyse(simulation.trace(float(simulation.t.max()) * (0.6 + 0.1 * seed)))
            assert [one for one in said if one.confidence != "weak"] == []


def test_without_messages_a_cut_link_is_no_ranks_fault() -> None:
    for seed in range(4):
        case = CASES["cut link"](seed, Layout())
        blind = Trace(
            job=case.trace.job,
            calls=case.trace.calls,
            signs=case.trace.signs,
            clocks=case.trace.clocks,
            links=Links.none(),
        )
        (verdict,) = analyse(blind)
        assert verdict.syndrome == "communication_hang"
        assert verdict.culprit.place == "group"
        assert verdict.confidence == "weak"


def test_of_all_that_lost_a_peer_none_is_the_cause() -> None:
    trace = CASES["clean"](0, Layout()).trace
    ends = [Ended(rank=rank, status=1, lost_peer=True) for rank in (3, 5)]
    (verdict,) = analyse(trace, ends=ends)
    assert (verdict.syndrome, verdict.confidence) == ("crash", "weak")
    (verdict,) = analyse(trace, ends=[*ends, Ended(rank=9, status=-9)])
    assert (verdict.culprit.ranks, verdict.confidence) == ((9,), "certain")
    (verdict,) = analyse(trace, ends=[*ends, Ended(rank=11, status=0)])
    assert verdict.culprit.ranks == (11,)
    assert analyse(trace, ends=[Ended(rank=rank, status=0, finished=True) for rank in range(16)]) == ()


def test_the_first_rank_with_values_that_are_not_finite_is_named() -> None:
    trace = CASES["clean"](0, Layout()).trace
    now = trace.clocks.now_s

    def fact(rank: int, before_s: float) -> Fact:
        node = int(trace.job.node_of[rank])
        at_s = float(now[node]) - before_s
        return Fact(kind="not_finite", node=trace.job.nodes[node], rank=rank, begin_s=at_s, end_s=at_s, value=1)

    (verdict,) = analyse(trace, facts=[fact(9, 1.0), fact(2, 3.0), fact(4, 1.0)])
    assert (verdict.syndrome, verdict.culprit.ranks, verdict.confidence) == ("numerical", (2,), "likely")
    (verdict,) = analyse(trace, facts=[fact(rank, 1.0) for rank in range(16)])
    assert (verdict.culprit.place, verdict.confidence) == ("group", "weak")


def test_facts_of_another_rank_or_time_explain_nothing() -> None:
    fact = Fact(kind="swap", node="a", rank=1, begin_s=5.0, end_s=6.0, value=1e6, lost_s=0.5)
    whole = replace(fact, rank=None, kind="thermal", lost_s=None)
    assert overlapping([whole, fact], node="a", rank=1, begin_s=5.5, end_s=9.0) == (fact, whole)
    assert overlapping([whole, fact], node="a", rank=2, begin_s=5.5, end_s=9.0) == (whole,)
    assert overlapping([whole, fact], node="b", rank=1, begin_s=5.5, end_s=9.0) == ()
    assert overlapping([whole, fact], node="a", rank=1, begin_s=6.5, end_s=9.0) == ()
    assert set(UNITS) == set(NAMES) == set(FACT_KINDS)
    assert "0.5 s lost" in fact.words()


def test_ranks_are_put_into_words_briefly() -> None:
    said = [named(one) for one in ((3,), (1, 4), (0, 1, 2, 3), (1, 4, 9), tuple(range(0, 40, 2)))]
    assert said == ["3", "1 and 4", "0 to 3", "1, 4 and 9", "0, 2, 4 and 17 more"]


@pytest.mark.parametrize("slow", [None, 3])
def test_a_sharded_job_whose_gathers_run_ahead(slow: int | None) -> None:
    for seed in range(3):
        said = [one for one in analyse(sharded_trace(seed, slow=slow)) if one.confidence != "weak"]
        assert [one.culprit.ranks for one in said] == ([] if slow is None else [(slow,)])


@pytest.mark.slow
def test_one_rank_of_four_thousand_is_found() -> None:
    layout = Layout(nodes=512, per_node=8, tp=8, pp=8)
    fault = Fault(kind="slow_backward", rank=2730, step=10, factor=4.0)
    simulation = Simulation(layout, 1, fault, steps=18).run()
    (verdict,) = analyse(simulation.trace(float(simulation.t.max()) + 0.01))
    assert (verdict.culprit.ranks, verdict.step) == ((2730,), 10)
