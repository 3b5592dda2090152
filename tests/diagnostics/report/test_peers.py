from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from outlast.diagnostics.report.peers import Peers, Rivals
from outlast.diagnostics.report.stragglers import _rivals, behind_peers_s

SHAPES = st.tuples(st.integers(1, 6), st.integers(2, 7))
VALUES = st.one_of(st.just(float("nan")), st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 10))


@given(st.data())
def test_each_rank_against_the_others_is_what_leaving_it_out_gives(data: st.DataObject) -> None:
    late = data.draw(arrays.arrays(np.float64, SHAPES, elements=VALUES))
    blamed = data.draw(arrays.arrays(np.bool_, late.shape))
    peers, rivals = Peers(late), Rivals(late, blamed)
    for column in range(late.shape[1]):
        at = np.flatnonzero(np.isfinite(np.delete(late, column, axis=1)).any(axis=1))
        np.testing.assert_allclose(peers.more(at, column), behind_peers_s(late, at, column), rtol=1e-12, atol=1e-12)
        np.testing.assert_array_equal(rivals.most(at, column), _rivals(late, blamed, at, column).max(axis=1))


def test_a_rank_without_peers_in_a_step_has_nothing_to_be_compared_with() -> None:
    late = np.array([[1.0, np.nan], [1.0, 3.0]])
    np.testing.assert_array_equal(Peers(late).more(np.array([0, 1]), 0), [np.nan, -2.0])
