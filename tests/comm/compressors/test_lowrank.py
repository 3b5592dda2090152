"""Low rank: exact where it can be, as good as the spectrum allows, and never without its guarantee."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from outlast.comm.compressors import LowRank, Slots


def matrix(rows: int, columns: int, spectrum: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(side, len(spectrum), generator=generator, dtype=torch.float64)).Q
        for side in (rows, columns)
    )
    product: Tensor = (left * spectrum) @ right.t()
    return product.float()


def sent(compressor: LowRank, x: Tensor, memory: Slots | None = None) -> Tensor:
    out = torch.zeros(x.shape, dtype=x.dtype)
    compressor.compress(x, None, memory).add_to(out)
    return out


def caught(x: Tensor, y: Tensor) -> float:
    """1 - ||x - y||^2 / ||x||^2."""
    return 1 - float((x.double() - y.double()).square().sum() / x.double().square().sum())


def test_a_matrix_of_that_rank_is_sent_exactly() -> None:
    x = matrix(60, 80, torch.tensor([5.0, 2.0, 1.0]))
    torch.testing.assert_close(sent(LowRank(3), x), x, atol=1e-6, rtol=1e-5)
    # More columns than the matrix has ranks: the rest is arbitrary, and finite.
    torch.testing.assert_close(sent(LowRank(5), x), x, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("values", "slack"), [("fp32", 1e-4), ("bf16", 1e-3), ("int8", 5e-3)])
def test_warm_starts_find_the_largest_singular_values(values: str, slack: float) -> None:
    spectrum = torch.tensor([8.0, 6.0, 5.0, 4.0, *[1.0] * 30])
    x = matrix(50, 120, spectrum)
    best = float(spectrum[:4].square().sum() / spectrum.square().sum())
    compressor = LowRank(4, values=values)
    memory = compressor.new_memory(tuple(x.shape), x.dtype, x.device)
    rounds = [caught(x, sent(compressor, x, memory)) for _ in range(8)]
    assert rounds[0] < best - 0.02
    assert rounds[-1] == pytest.approx(best, abs=slack)


@pytest.mark.parametrize("values", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize(("rows", "columns"), [(40, 64), (64, 40)])
def test_no_basis_takes_the_guarantee_away(values: str, rows: int, columns: int) -> None:
    compressor = LowRank(2, values=values)
    flat_spectrum = matrix(rows, columns, torch.ones(40))
    x = matrix(rows, columns, torch.tensor([1.0, 1.0, 0.5]))
    # A basis at right angles to every row of x, one of zeros, one of equal columns.
    right_angles = torch.linalg.svd(x.double(), full_matrices=True).Vh[-2:].t().float().contiguous()
    for basis in (right_angles, torch.zeros(columns, 2), torch.ones(columns, 2)):
        for y in (x, flat_spectrum):
            memory = {"basis": basis.clone()}
            for _ in range(4):
                assert caught(y, sent(compressor, y, memory)) >= compressor.alpha((rows, columns)) - 1e-6
                assert memory["basis"].isfinite().all()
    # And it is left behind: the next rounds find what there is.
    memory = {"basis": right_angles}
    for _ in range(6):
        got = sent(LowRank(2), x, memory)
    assert caught(x, got) == pytest.approx(2 / 2.25, abs=0.02)


def test_average_of_a_random_basis() -> None:
    """E caught >= rank / min(rows, columns), without the fallback, for any spectrum; with equality for a flat one."""
    for spectrum in (torch.ones(20), torch.linspace(1, 0.1, 20), torch.tensor([3.0, *[1.0] * 19])):
        x = matrix(20, 33, spectrum)
        rounds = []
        for seed in range(60):
            basis = torch.randn(33, 4, generator=torch.Generator().manual_seed(seed))
            p = torch.linalg.qr(x @ basis).Q
            rounds.append(float((p.t() @ x).square().sum() / x.square().sum()))
        mean = sum(rounds) / len(rounds)
        assert mean >= 4 / 20 - 1e-6


def test_zero_leaves_the_basis_and_huge_and_tiny_scale() -> None:
    compressor = LowRank(2)
    memory = compressor.new_memory((30, 20), torch.float32, torch.device("cpu"))
    before = memory["basis"].clone()
    assert not sent(compressor, torch.zeros(30, 20), memory).any()
    assert torch.equal(memory["basis"], before)
    x = matrix(30, 20, torch.tensor([4.0, 1.0, 0.2]))
    expected = sent(compressor, x)
    for power in (-100, -60, 60, 120):
        y = x.double().mul(2.0**power).float()
        torch.testing.assert_close(sent(compressor, y).double() * 2.0**-power, expected.double(), atol=1e-5, rtol=1e-4)


def test_convolutions_are_matrices_of_one_row_for_each_output() -> None:
    x = torch.randn(16, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    compressor = LowRank(2)
    assert compressor.nbytes(tuple(x.shape)) == 8 + 4 * 2 * (16 + 72)
    assert torch.equal(sent(compressor, x).view(16, 72), sent(compressor, x.view(16, 72)))
    assert compressor.alpha(tuple(x.shape)) == 2 / 16


def test_every_rank_starts_alike_and_a_row_count_does_not_matter() -> None:
    a, b = (LowRank(3).new_memory((rows, 9), torch.float32, torch.device("cpu"))["basis"] for rows in (50, 7))
    assert torch.equal(a, b)
    assert a.shape == (9, 3)
    assert math.isclose(float(a.std()), 1, abs_tol=0.4)
