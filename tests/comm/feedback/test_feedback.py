"""Methods one by one: what they send, what they keep, what they refuse."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from outlast.comm.analysis.simulate import Simulation, Transport, rank_order_mean
from outlast.comm.compressors import COMPRESSORS, Dense, Int8, Natural, Sign, TopK, make_compressor
from outlast.comm.config import CommConfig
from outlast.comm.feedback import (
    EF14,
    EF21,
    EF21BC,
    EF21PP,
    EF21W,
    METHODS,
    EControl,
    Feedback,
    NoFeedback,
    Probe,
    make_feedback,
    packed,
)
from outlast.errors import CommError, NonFiniteGradient, OutOfRange, UnknownCompressor

SHAPE = (9, 8)


def draw(n: int, steps: int, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(shape, generator=generator) for _ in range(n)] for _ in range(steps)]


def build(name: str, n: int, compressor: str = "topk") -> Feedback:
    weights = [2 * (i + 1) / (n * (n + 1)) for i in range(n)] if name == "ef21-w" else None
    return make_feedback(name, make_compressor(compressor, density=0.1, rank=1), weights=weights)


def test_methods_by_name() -> None:
    for name in METHODS:
        method = build(name, 3)
        assert method.name == name
        assert isinstance(method.second, TopK)
    assert build("ef21", 1).second is not make_feedback("ef21", TopK(0.1), second=Dense()).second
    assert make_feedback("ef14", TopK(0.1), residual="int8").apart_slots == ("e_int8", "e_scale", "e_round")
    with pytest.raises(UnknownCompressor, match="did you mean 'ef21-sgdm'"):
        make_feedback("ef21-sgd", TopK(0.1))
    for settings_, what in (
        ({"eta": 0.1}, "'ef21' has no eta"),
        ({"weights": [1.0]}, "'ef21' has no weights"),
        ({"residual": "int8"}, "'ef21' has no residual"),
    ):
        with pytest.raises(OutOfRange, match=what):
            make_feedback("ef21", TopK(0.1), **settings_)  # type: ignore[arg-type]
    with pytest.raises(OutOfRange, match="has no weights"):
        make_feedback("ef21-w", TopK(0.1))
    with pytest.raises(OutOfRange, match="residual = 'int4'"):
        EF14(TopK(0.1), residual="int4")


@pytest.mark.parametrize("transport", ["all-gather", "two-phase"])
@pytest.mark.parametrize("name", [name for name in METHODS if name != "none"])
def test_dense_is_exact(name: str, transport: Transport) -> None:
    """With nothing compressed every method without momentum gives the mean, whatever its weights."""
    if (name, transport) == ("ef21-bc", "all-gather"):
        return
    weights = [0.5, 0.3, 0.2] if name == "ef21-w" else None
    eta = 1.0 if name == "ef21-sgdm" else None
    simulation = Simulation(
        make_feedback(name, Dense(), weights=weights, eta=eta), 3, SHAPE, torch.float64, transport=transport
    )
    for gs in draw(3, 4):
        doubles = [g.double() for g in gs]
        torch.testing.assert_close(simulation.step(doubles), rank_order_mean(doubles), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("transport", ["all-gather", "two-phase"])
@pytest.mark.parametrize("compressor", [name for name in COMPRESSORS if name != "dense"])
@pytest.mark.parametrize("name", ["ef14", "ef21", "ef21-w", "ef21-pp", "econtrol"])
def test_invariants(name: str, compressor: str, transport: Transport) -> None:
    """h (or w) is the weighted mean of the h_i; what EF14 has sent and what it holds is what it was given."""
    simulation = Simulation(build(name, 3, compressor), 3, SHAPE, torch.float64, transport=transport)
    given_, sent = torch.zeros(SHAPE, dtype=torch.float64), torch.zeros(SHAPE, dtype=torch.float64)
    for step, gs in enumerate(draw(3, 5)):
        doubles = [g.double() for g in gs]
        given_ += rank_order_mean(doubles)
        sent += simulation.step(doubles, whole=step == 3)
    if name == "ef14":
        held = rank_order_mean([local["e"] for local in simulation.local])
        if simulation.owned:
            held += torch.cat([owned["s"] for owned in simulation.owned])
        torch.testing.assert_close(sent + held, given_)
        return
    shares = [method.share for method in simulation.ranks]
    mean = rank_order_mean([share * local["h_i"] for share, local in zip(shares, simulation.local, strict=True)])
    held = torch.cat([owned["w"] for owned in simulation.owned]) if simulation.owned else simulation.replicated["h"]
    torch.testing.assert_close(held, mean)


def test_ef21_bc() -> None:
    """Its name for EF21 in the two-phase transport; a second compressor is for the way back."""
    ef21 = Simulation(EF21(TopK(0.2)), 3, SHAPE, transport="two-phase")
    ef21_bc = Simulation(EF21BC(TopK(0.2)), 3, SHAPE, transport="two-phase")
    both = Simulation(EF21BC(TopK(0.2), Int8()), 3, SHAPE, transport="two-phase")
    far, near = 0.0, 0.0
    for gs in draw(3, 5):
        expected = ef21.step(gs)
        assert torch.equal(ef21_bc.step(gs), expected)
        found = both.step(gs)
        w = torch.cat([owned["w"] for owned in both.owned])
        near += float((found - w).norm())
        far += float((expected - w).norm())
    assert near < 0.1 * far
    gathered = Simulation(EF21BC(TopK(0.2)), 3, SHAPE)
    gathered.step(draw(3, 1)[0])
    with pytest.raises(CommError, match="ef21-bc compresses on the way back"):
        gathered.step(draw(3, 1)[0])


class TestWeights:
    def test_what_is_refused(self) -> None:
        for weights in ([], [0.5, 0.6], [1.5, -0.5], [0.0, 1.0]):
            with pytest.raises(OutOfRange, match="weights"):
                EF21W(TopK(0.1), weights)
        method = EF21W(TopK(0.1), [0.5, 0.5])
        with pytest.raises(CommError, match="none for rank 2"):
            method.of_rank(2)
        with pytest.raises(CommError, match="weight of its rank"):
            method.start(torch.ones(3))
        with pytest.raises(CommError, match="messages of 3 ranks, weights of 2"):
            method.decode({"h": torch.zeros(8)}, [TopK(0.1).compress(torch.ones(8)).payload] * 3)

    def test_converges_where_it_is_not_ef21(self) -> None:
        """Natural compression rounds to powers of two, which no weight but those scales with."""
        each = torch.tensor([1.0, 2.0, 5.0, 12.0], dtype=torch.float64).view(-1, 1)
        centres = torch.randn(4, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        solution = (each * centres).sum(0) / each.sum()
        found = []
        for method in (EF21(Natural()), EF21W(Natural(), (each / each.sum()).view(-1).tolist())):
            simulation = Simulation(method, 4, (30,), torch.float64)
            x = torch.zeros(30, dtype=torch.float64)
            for _ in range(80):
                x = x - 0.1 * simulation.step(list(each * (x - centres)))
            found.append(x)
            torch.testing.assert_close(x, solution, rtol=1e-6, atol=1e-6)
        assert not torch.equal(found[0], found[1])


class TestPartialParticipation:
    @pytest.mark.parametrize("transport", ["all-gather", "two-phase"])
    @pytest.mark.parametrize("compressor", COMPRESSORS)
    def test_an_absent_rank_keeps_its_term(self, compressor: str, transport: Transport) -> None:
        simulation = Simulation(build("ef21-pp", 3, compressor), 3, SHAPE, transport=transport)
        steps = draw(3, 3)
        for gs in steps[:2]:
            simulation.step(gs)
        before = {slot: tensor.clone() for slot, tensor in simulation.local[1].items()}
        simulation.step(steps[2], participate=[True, False, True])
        for slot, tensor in before.items():
            assert torch.equal(tensor, simulation.local[1][slot])
        held = torch.cat([o["w"] for o in simulation.owned]) if simulation.owned else simulation.replicated["h"]
        torch.testing.assert_close(held, rank_order_mean([local["h_i"] for local in simulation.local]))

    def test_a_rank_that_is_not_heard(self) -> None:
        """None in the place of its payload comes to the same as its C(0)."""
        method = EF21PP(TopK(0.2))
        gs = draw(3, 2)
        simulations = [Simulation(method, 3, SHAPE) for _ in range(2)]
        for simulation in simulations:
            simulation.step(gs[0])
        expected = simulations[0].step(gs[1], participate=[True, True, False])
        other = simulations[1]
        payloads: list[Tensor | None] = [
            method.encode(local, g) for local, g in zip(other.local[:2], gs[1][:2], strict=True)
        ]
        found = method.decode(other.replicated, [*payloads, None])
        assert torch.equal(found, expected)
        with pytest.raises(CommError, match="ef21 needs a payload from every rank"):
            EF21(TopK(0.2)).decode(other.replicated, [*payloads, None])

    def test_whole_steps(self) -> None:
        simulation = Simulation(EF21PP(TopK(0.2)), 3, SHAPE)
        first, second = draw(3, 2)
        estimate = simulation.step(first, participate=[True, True, False])
        torch.testing.assert_close(estimate, (first[0] + first[1]) / 3)
        estimate = simulation.step(second, whole=True, participate=[False, True, True])
        torch.testing.assert_close(estimate, (first[0] + second[1] + second[2]) / 3)

    def test_converges_with_half_of_the_ranks(self) -> None:
        generator = torch.Generator().manual_seed(0)
        centres = torch.randn(4, 20, generator=generator, dtype=torch.float64)
        each = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64).view(-1, 1)
        simulation = Simulation(EF21PP(TopK(0.2)), 4, (20,), torch.float64)
        x = torch.zeros(20, dtype=torch.float64)
        for _ in range(300):
            present = (torch.rand(4, generator=generator) < 0.5).tolist()
            x = x - 0.1 * simulation.step(list(each * (x - centres)), participate=present)
        torch.testing.assert_close(x, (each * centres).sum(0) / each.sum(), rtol=1e-5, atol=1e-5)


class TestEControl:
    def test_strength(self) -> None:
        method = EControl(TopK(0.05))
        assert method.strength((10, 10)) == 0.05
        assert EControl(Dense()).strength((3,)) == 0.5
        with pytest.raises(OutOfRange, match="eta"):
            EControl(TopK(0.05), eta=0.6)
        with pytest.raises(OutOfRange, match=r"= 0.1 for a tensor of shape \(10, 10\)"):
            EControl(TopK(0.05), eta=0.11).start(torch.zeros(10, 10))


class TestProbe:
    @pytest.mark.parametrize("name", [name for name in METHODS if name != "ef21-bc"])
    def test_it_changes_nothing(self, name: str) -> None:
        with_probe, without = (Simulation(build(name, 3), 3, SHAPE) for _ in range(2))
        for gs in draw(3, 4):
            probe = Probe()
            assert torch.equal(with_probe.step(gs, probe=probe), without.step(gs))
        assert all(
            torch.equal(a["h_i"], b["h_i"]) for a, b in zip(with_probe.local, without.local, strict=True) if "h_i" in a
        )
        assert 0.1 <= probe.alpha_hat < 1
        assert probe.gradient_square == pytest.approx(sum(float(g.square().sum()) for g in gs), rel=1e-5)

    @pytest.mark.parametrize("residual", ["full", "int8"])
    def test_error_compensation(self, residual: str) -> None:
        method = EF14(TopK(k=1), residual=residual)
        g, probe = torch.tensor([3.0, 4.0]), Probe()
        local = method.start(g)
        method.encode(local, g, probe=probe)
        assert probe.alpha_hat == pytest.approx(16 / 25)
        assert probe.residual_ratio == pytest.approx(3 / 5)

    def test_trackers(self) -> None:
        for method in (EF21(TopK(k=1)), EF21W(TopK(k=1), [0.25, 0.75]).of_rank(0)):
            local, probe = method.start(torch.zeros(2)), Probe()
            method.encode(local, torch.tensor([3.0, 4.0]), probe=probe)
            assert probe.alpha_hat == pytest.approx(16 / 25)
            assert probe.residual_ratio == pytest.approx(3 / 5)

    def test_nothing_yet(self) -> None:
        assert (Probe().alpha_hat, Probe().residual_ratio) == (1.0, 0.0)
        assert Probe(residual_square=1.0).residual_ratio == math.inf


class TestPacked:
    @settings(max_examples=30)
    @given(
        numel=st.integers(0, 700),
        magnitude=st.sampled_from([1e-30, 1e-3, 1.0, 1e30]),
        seed=st.integers(0, 9),
        double=st.booleans(),
    )
    def test_within_a_unit(self, numel: int, magnitude: float, seed: int, double: bool) -> None:
        generator = torch.Generator().manual_seed(seed)
        x = magnitude * torch.randn(numel, generator=generator, dtype=torch.float64 if double else torch.float32)
        x[::3] = 0
        slots = packed.new_slot("e", (numel,), x.device)
        kept = x.clone()
        packed.pack_slot(slots, "e", kept)
        read = packed.unpack_slot(slots, "e", torch.empty_like(x))
        assert torch.equal(read, kept)
        unit = slots["e_scale"].repeat_interleave(256)[:numel].to(x.dtype)
        assert bool(((read - x).abs() <= unit * 1.001).all())
        assert not read[::3].any()

    def test_small_entries_are_kept_on_average(self) -> None:
        x = torch.full((300,), 0.01)
        x[0] = x[256] = 12.65  # so that the unit is 0.1
        slots = packed.new_slot("e", (300,), x.device)
        total = torch.zeros(300)
        for _ in range(200):
            kept = x.clone()
            packed.pack_slot(slots, "e", kept)
            total += kept
        torch.testing.assert_close(total / 200, x, rtol=0.15, atol=0)
        assert int(slots["e_round"]) == 200

    def test_what_is_not_finite_stays_so(self) -> None:
        for bad in (math.nan, math.inf, -math.inf):
            x = torch.ones(300)
            x[5] = bad
            slots = packed.new_slot("e", (300,), x.device)
            packed.pack_slot(slots, "e", x)
            assert x[:256].isnan().all()
            assert x[256:].isfinite().all()

    def test_bytes(self) -> None:
        method = EF14(TopK(0.01), residual="int8")
        local = method.start(torch.zeros(100, 100))
        assert sum(tensor.nbytes for tensor in local.values()) < 0.26 * 4 * 100 * 100

    @pytest.mark.parametrize("transport", ["all-gather", "two-phase"])
    def test_pack_is_the_inverse_of_unpack(self, transport: Transport) -> None:
        simulation = Simulation(EF14(TopK(0.1), residual="int8"), 3, SHAPE, transport=transport)
        for gs in draw(3, 3):
            simulation.step(gs)
        method = EF14(TopK(0.1), residual="int8")
        e = torch.randn(SHAPE)
        local = method.pack({"e": e})
        assert torch.equal(method.unpack(local, SHAPE, torch.float32)["e"], e), "pack leaves what is read back"


@pytest.mark.parametrize("transport", ["all-gather", "two-phase"])
@pytest.mark.parametrize("name", METHODS)
def test_nan_is_found(name: str, transport: Transport) -> None:
    if (name, transport) == ("ef21-bc", "all-gather"):
        return
    simulation = Simulation(build(name, 3), 3, SHAPE, transport=transport)
    steps = draw(3, 2)
    simulation.step(steps[0])
    steps[1][2][4, 3] = math.nan
    with pytest.raises(NonFiniteGradient):
        simulation.step(steps[1])


def test_without_feedback_nothing_is_kept() -> None:
    simulation = Simulation(NoFeedback(TopK(0.1)), 3, SHAPE, transport="two-phase")
    gs = draw(3, 1)[0]
    first = simulation.step(gs)
    assert torch.equal(simulation.step(gs), first)
    assert simulation.local == [{}, {}, {}]
    assert simulation.owned == [{}, {}, {}]


@pytest.mark.soak
def test_the_strength_of_signs_is_of_use() -> None:
    """Their guaranteed contraction, 1 / d, would make it nothing, and refuse one that is stable and better."""
    ends = {}
    b = torch.randn(6, 200, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 10
    for eta in (1 / 200, 0.1, None):
        method = EControl(Sign(), eta)
        x, simulation = torch.zeros(200, dtype=torch.float64), Simulation(method, 6, (200,), torch.float64)
        for _ in range(1500):
            x -= 0.002 * simulation.step([(i + 1) ** 2 / 6 * x - b[i] for i in range(6)])
        ends[eta] = float((91 / 36 * x - b.mean(0)).square().sum())
    assert ends[0.1] < ends[1 / 200]
    assert ends[None] < ends[1 / 200]
    assert EControl(Sign()).strength((1000, 1000)) == 0.5
    assert EControl(TopK(0.05, values="sign")).strength((1000,)) == pytest.approx(0.05 * 2 / math.pi)
    CommConfig(compressor="sign", feedback="econtrol", eta=0.1, target="gradient")
