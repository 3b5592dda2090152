"""Rand-k: every entry as often as every other, the same ones on every rank, others in the next round."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from outlast.comm.compressors import RandK
from outlast.comm.compressors.randk import _mix, draw

CPU = torch.device("cpu")


@given(st.integers(0, 2**64 - 1), st.integers(1, 5000), st.data())
def test_a_draw_is_ascending_and_without_repetition(key: int, numel: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, numel))
    indices = draw(key, k, numel, CPU)
    assert len(indices) == k
    assert int(indices[0]) >= 0
    assert int(indices[-1]) < numel
    assert bool((indices.diff() > 0).all())
    signed = key - 2**64 if key >= 2**63 else key
    assert torch.equal(draw(signed, k, numel, CPU), indices), "the key travels as a signed number"


@pytest.mark.parametrize(("k", "numel"), [(3, 10), (1, 5), (9, 10), (13, 40)])
def test_each_entry_is_drawn_equally_often(k: int, numel: int) -> None:
    rounds = 1500
    counts = torch.zeros(numel)
    for key in range(rounds):
        counts[draw(_mix(key), k, numel, CPU)] += 1
    p = k / numel
    # Four and a half standard deviations of a binomial count.
    assert float((counts - rounds * p).abs().max()) < 4.5 * (rounds * p * (1 - p)) ** 0.5


def test_the_same_on_every_rank_and_others_in_the_next_round() -> None:
    generator = torch.Generator().manual_seed(0)
    compressor = RandK(0.1)
    ranks = [compressor.new_memory((500,), torch.float32, CPU) for _ in range(3)]
    rounds = []
    for _ in range(5):
        messages = [compressor.compress(torch.randn(500, generator=generator), None, memory) for memory in ranks]
        drawn = [message.indices.tolist() for message in messages]  # type: ignore[attr-defined]
        assert drawn[0] == drawn[1] == drawn[2]
        rounds.append(tuple(drawn[0]))
    assert len(set(rounds)) == 5
    assert [int(memory["round"]) for memory in ranks] == [5, 5, 5]
    # Memory that was saved goes on where it was.
    saved = {"round": ranks[0]["round"].clone()}
    x = torch.randn(500, generator=generator)
    assert torch.equal(compressor.compress(x, None, saved).payload, compressor.compress(x, None, ranks[1]).payload)
    other = RandK(0.1, seed=1).compress(x).payload
    assert not torch.equal(other[8:], compressor.compress(x).payload[8:])


def test_draws_do_not_depend_on_versions_of_anything() -> None:
    """Ranks may run on different machines: the draw is a formula, and stays what it is."""
    assert draw(1, 5, 1000, CPU).tolist() == FIRST
    assert draw(2**63 + 7, 4, 10**12, CPU).tolist() == SECOND


FIRST = [26, 226, 451, 687, 932]
SECOND = [186026436973, 437015096045, 687399264663, 934892828356]
