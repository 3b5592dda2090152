"""Many ranks in one tensor.

With the ranks' gradients stacked as the rows of one matrix, one encode of a method moves all ranks at once, if the
compressor treats rows by themselves: its single rank's estimate has each rank's own h_i as a row, and the mean of the
rows is the estimate of the mean. The sums are the same up to the order of rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from outlast.comm.compressors import Compressor, Message, Shape, Slots, SparseMessage


class RowTopK(Compressor):
    """Top-k of every row of a matrix, in a payload that is quick to write: float64 values, int64 indices."""

    name = "row-topk"

    def __init__(self, k: int, d: int) -> None:
        self.k, self.d = k, d

    def nbytes(self, shape: Shape, dtype: torch.dtype = torch.float64) -> int:
        return 16 * self.k * shape[0]

    def alpha(self, shape: Shape) -> float:
        return self.k / self.d

    def compress(self, x: Tensor, out: Tensor | None = None, memory: Slots | None = None) -> Message:
        rows = x.view(-1, self.d)
        chosen = rows.abs().topk(self.k, sorted=False).indices
        values = rows.gather(1, chosen).view(-1)
        indices = (chosen + self.d * torch.arange(rows.shape[0])[:, None]).view(-1)
        payload = torch.cat((values.view(torch.uint8), indices.view(torch.uint8)))
        return SparseMessage(payload, values, indices)

    def open(self, payload: Tensor, shape: Shape, dtype: torch.dtype = torch.float64) -> Message:
        values, indices = payload.chunk(2)
        return SparseMessage(payload, values.view(torch.float64), indices.view(torch.int64))


def rows(k: int, d: int) -> RowTopK:
    """Top-k of every row of a matrix of ``d`` columns."""
    return RowTopK(k, d)


class Quadratics:
    """f_i(x) = 1/2 ||A_i x - b_i||^2 with A_i^2 = (i^2 / n) I and b_i ~ N(0, zeta^2 / i^2 I), i = 1 .. n, in R^d.

    Args:
        n: ranks.
        d: dimensions.
        zetas: one problem for each zeta; all with the same draw of b_i / zeta.
    """

    def __init__(self, n: int, d: int, zetas: list[float]) -> None:
        generator = torch.Generator().manual_seed(0)
        i = torch.arange(1, n + 1, dtype=torch.float64).view(1, n, 1)
        zeta = torch.tensor(zetas, dtype=torch.float64).view(-1, 1, 1)
        drawn = torch.randn(1, n, d, generator=generator, dtype=torch.float64)
        self.curvature = i.square() / n
        """(1, n, 1): L_i."""
        self.pull = (i / n**0.5) * (zeta / i) * drawn
        """(problems, n, d): A_i b_i."""
        self.smoothness = float(self.curvature.mean())
        """L, and the strong convexity as well."""
        self.solution = self.pull.mean(1) / self.smoothness
        """(problems, d)."""

    def gradients(self, x: Tensor) -> Tensor:
        """(problems, n, d) at ``x`` (problems, d)."""
        return self.curvature * x[:, None] - self.pull

    def mean_gradient(self, x: Tensor) -> Tensor:
        """(problems, d)."""
        return self.smoothness * x - self.pull.mean(1)
