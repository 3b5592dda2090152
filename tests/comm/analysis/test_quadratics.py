"""What momentum, weights and control are for, on quadratics whose floors are known."""

from __future__ import annotations

import math
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from outlast.comm.analysis.simulate import Simulation
from outlast.comm.analysis.theory import ef14_bound, ef14_step, ef21_step, ef21_w_step
from outlast.comm.compressors import TopK
from outlast.comm.feedback import EF14, EF21, EF21SGDM, EF21W, EControl, Feedback, NoFeedback
from tests.comm.analysis.batched import Quadratics, rows

DOUBLE = torch.float64


class TestHeterogeneous:
    """Least squares whose ranks differ by zeta, with noise of variance sigma^2 / d in each entry; Top-5 of 100."""

    N, D, GAMMA, STEPS = 20, 100, 1e-3, 2400
    CASES: ClassVar[list[tuple[float, float]]] = [(0, 1), (0, 10), (0, 100), (10, 0), (10, 100)]
    """(sigma, zeta)"""

    def floors(self, feedback: Feedback) -> list[float]:
        """Of each case: mean ||grad f||^2 of the last half of the steps, or, without noise, of the last 100."""
        problem = Quadratics(self.N, self.D, [zeta for _, zeta in self.CASES])
        simulation = Simulation(feedback, 1, (len(self.CASES) * self.N, self.D), DOUBLE)
        generator = torch.Generator().manual_seed(1)
        sigma = torch.tensor([sigma for sigma, _ in self.CASES], dtype=DOUBLE)
        last = torch.where(sigma > 0, self.STEPS // 2, 100)
        x = problem.solution + 0.1
        total = torch.zeros(len(self.CASES), dtype=DOUBLE)
        for step in range(self.STEPS):
            noise = torch.randn(1, self.N, self.D, generator=generator, dtype=DOUBLE) / math.sqrt(self.D)
            gs = problem.gradients(x) + sigma.view(-1, 1, 1) * noise
            estimate = simulation.step([gs.view(-1, self.D)]).view_as(gs).mean(1)
            total += (step >= self.STEPS - last) * problem.mean_gradient(x).square().sum(1)
            x -= self.GAMMA * estimate
        return (total / last).tolist()

    def test_floors(self) -> None:
        c = rows(5, self.D)
        methods = [NoFeedback(rows(self.D, self.D)), EF14(c), EF21(c), EF21SGDM(c, 0.1), EControl(c, 0.1)]
        found = {method.name: self.floors(method) for method in methods}
        for name, floors in found.items():
            print(f"{name:10}" + "".join(f"{floor:12.4g}" for floor in floors))
        ef14, sgd = found["ef14"], found["none"][3]
        curvature = Quadratics(self.N, self.D, [0]).smoothness
        assert sgd == pytest.approx(100 / self.N * self.GAMMA * curvature / (2 - self.GAMMA * curvature), rel=0.1)
        assert sgd == pytest.approx(0.0193, rel=0.1)
        # Exact gradients: the floor of EF14 goes with zeta^2, all others have none.
        assert ef14[1] == pytest.approx(0.0256, rel=0.1)
        assert ef14[1] / ef14[0] == pytest.approx(100, rel=0.1)
        assert ef14[2] / ef14[1] == pytest.approx(100, rel=0.1)
        for name in ("none", "ef21", "ef21-sgdm", "econtrol"):
            assert max(found[name][:3]) < 1e-8
        # Noise: EF21 amplifies it, momentum does not, and only EF14 minds zeta.
        assert ef14[3] <= 1.1 * sgd
        assert ef14[4] == pytest.approx(2.57, rel=0.1)
        for name in ("ef21", "ef21-sgdm", "econtrol"):
            assert found[name][4] == pytest.approx(found[name][3], rel=0.1)
        assert min(found["ef21"][3:]) >= 10 * sgd
        assert max(found["ef21-sgdm"][3:]) <= 1.3 * sgd
        assert found["econtrol"][3] == pytest.approx(2.6 * sgd, rel=0.2)


class TestWeights:
    """f_i = L_i / 2 ||x - b_i||^2 with one steep rank among twenty; Top-1 of 50."""

    N, D = 20, 50
    EACH = (1.0,) * 19 + (100.0,)
    L = 5.95

    def test_steps(self) -> None:
        assert ef21_step(self.L, self.EACH, 1 / self.D) == pytest.approx(4.5238e-4, rel=1e-4)
        assert ef21_w_step(self.L, self.EACH, 1 / self.D) == pytest.approx(1.68916e-3, rel=1e-5)

    def problem(self) -> tuple[Tensor, Tensor]:
        """L_i (n, 1) and b_i (n, d)."""
        generator = torch.Generator().manual_seed(0)
        centres = torch.randn(self.N, self.D, generator=generator, dtype=DOUBLE)
        return torch.tensor(self.EACH, dtype=DOUBLE).view(-1, 1), centres

    def test_weighted_is_ef21_for_homogeneous_compressors(self) -> None:
        each, centres = self.problem()
        gamma = ef21_w_step(self.L, self.EACH, 1 / self.D)
        total = sum(self.EACH)
        methods = (EF21(TopK(k=1)), EF21W(TopK(k=1), [li / total for li in self.EACH]))
        xs = []
        for method in methods:
            simulation = Simulation(method, self.N, (self.D,), DOUBLE)
            x = torch.zeros(self.D, dtype=DOUBLE)
            for _ in range(60):
                x = x - gamma * simulation.step(list(each * (x - centres)))
            xs.append(x)
        assert float((xs[0] - xs[1]).abs().max()) < 1e-12

    def test_the_larger_step_saves_rounds(self) -> None:
        each, centres = self.problem()
        steps = [rule(self.L, self.EACH, 1 / self.D) for rule in (ef21_step, ef21_w_step)]
        gammas = torch.tensor(steps, dtype=DOUBLE).view(-1, 1)
        simulation = Simulation(EF21(rows(1, self.D)), 1, (2 * self.N, self.D), DOUBLE)
        x = torch.zeros(2, self.D, dtype=DOUBLE)
        rounds: dict[int, int] = {}
        for step in range(7000):
            gs = each * (x[:, None] - centres)
            for which in (gs.mean(1).square().sum(1) < 1e-10).nonzero().view(-1).tolist():
                rounds.setdefault(which, step)
            if len(rounds) == 2:
                break
            x -= gammas * simulation.step([gs.view(-1, self.D)]).view_as(gs).mean(1)
        print(f"rounds at the old step {rounds[0]}, at the new one {rounds[1]}")
        assert rounds[0] == pytest.approx(5350, rel=0.1)
        assert rounds[1] == pytest.approx(1350, rel=0.1)


class TestMomentum:
    """f = ||x||^2 / 2 in two dimensions, with skewed noise of variance 1 that Top-1 does not treat evenly."""

    NOISE = torch.tensor([[2, 0], [0, 1], [-2, -1]], dtype=DOUBLE) * math.sqrt(0.3)
    COPIES = 200
    """Independent runs, to average over."""

    def noise(self, generator: torch.Generator, *shape: int) -> Tensor:
        return self.NOISE[torch.randint(3, shape, generator=generator)]

    @pytest.mark.parametrize(("eta", "n"), [(1.0, 1), (1.0, 16), (0.1, 1)])
    def test_compressed_noise_is_biased(self, eta: float, n: int) -> None:
        """x -= gamma (x + mean C(eta xi)): the floor is eta^2 / 30, whatever n, for gamma to 0; 1/30 is ||E C(xi)||^2,
        and to that comes gamma / 2 of the variance of C(xi) / n, which is 13/15."""
        generator, gamma, c = torch.Generator().manual_seed(0), 0.01, rows(1, 2)
        x, total = torch.zeros(self.COPIES, 2, dtype=DOUBLE), 0.0
        for step in range(1200):
            xi = eta * self.noise(generator, self.COPIES * n)
            sent = torch.zeros_like(xi)
            c.compress(xi).add_to(sent)
            x -= gamma * (x + sent.view(self.COPIES, n, 2).mean(1))
            total += float(x.square().sum(1).mean()) if step >= 600 else 0.0
        found = total / 600
        print(f"eta = {eta}, n = {n}: {found:.3g}")
        assert found == pytest.approx(eta**2 * (1 / 30 + gamma / 2 * 13 / 15 / n), rel=0.03)

    @pytest.mark.parametrize(
        ("method", "expected"),
        [(EF21(rows(1, 2)), 0.0057), (EF21SGDM(rows(1, 2), 0.1), 0.0009), (EF21SGDM(rows(1, 2), 0.01), 0.0005)],
        ids=["ef21", "sgdm-0.1", "sgdm-0.01"],
    )
    def test_momentum_removes_the_floor(self, method: Feedback, expected: float) -> None:
        generator, gamma = torch.Generator().manual_seed(0), 0.001
        simulation = Simulation(method, 1, (self.COPIES, 2), DOUBLE)
        x, total = torch.zeros(self.COPIES, 2, dtype=DOUBLE), 0.0
        for step in range(4000):
            x -= gamma * simulation.step([x + self.noise(generator, self.COPIES)])
            total += float(x.square().sum(1).mean()) if step >= 2500 else 0.0
        found = total / 1500
        print(f"{method.name}: {found:.3g}")
        assert found == pytest.approx(expected, rel=0.15)


def test_guarantee_of_error_compensation() -> None:
    """EF14 at the step of its bound, on ranks that differ."""
    problem = Quadratics(20, 100, [10])
    alpha = 0.05
    gamma = ef14_step(problem.smoothness, alpha)
    simulation = Simulation(EF14(rows(5, 100)), 1, (20, 100), DOUBLE)
    x = problem.solution + 1
    gap = problem.smoothness / 2 * float((x - problem.solution).square().sum())
    squares, dissimilarity, steps = 0.0, 0.0, 1000
    for _ in range(steps):
        gs = problem.gradients(x)
        mean = problem.mean_gradient(x)
        squares += float(mean.square().sum())
        dissimilarity = max(dissimilarity, float((gs - mean[:, None]).square().sum(2).mean()))
        x = x - gamma * simulation.step([gs[0]]).mean(0)
    bound = ef14_bound(gap, gamma, steps, problem.smoothness, alpha, dissimilarity)
    print(f"mean squared gradient {squares / steps:.4g}, guaranteed {bound:.4g}")
    assert squares / steps <= bound


def test_residuals_in_8_bits() -> None:
    """Rounding them anew each step is noise; its size goes with the residuals, as EF14's own floor does."""
    found = {}
    for residual in ("full", "int8"):
        problem = Quadratics(20, 100, [0, 10])
        simulations = [Simulation(EF14(rows(5, 100), residual=residual), 1, (20, 100), DOUBLE) for _ in range(2)]
        x = problem.solution + 0.1
        total = torch.zeros(2, dtype=DOUBLE)
        for step in range(1200):
            parts = zip(simulations, problem.gradients(x), strict=True)
            x = x - 1e-3 * torch.stack([simulation.step([gs]).mean(0) for simulation, gs in parts])
            if step >= 900:
                total += problem.mean_gradient(x).square().sum(1) / 300
        found[residual] = total.tolist()
    print(found)
    assert max(found["full"][0], found["int8"][0]) < 1e-4, "same data: no floor, rounding or not"
    assert found["int8"][1] == pytest.approx(found["full"][1], rel=0.2)
