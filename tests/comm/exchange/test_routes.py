"""Two-phase and hierarchical transport, loss scales, directions: real ranks against the same sums in one process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from outlast.comm import (
    CommConfig,
    GradientReducer,
)
from outlast.comm.direction import (
    Adam,
    default_direction,
)
from outlast.comm.feedback.from_config import (
    feedback_from_config,
)
from outlast.comm.slices import slices
from outlast.errors import CommError, CommStateMismatch
from tests.comm.ranks import Ranks
from tests.comm.toy import CONFIG, FEEDBACKS, SHAPES, backward, estimates, frozen, gradients, rank_order_mean, wrap

STEPS = 4


@pytest.fixture(scope="module")
def four_ranks() -> Iterator[Ranks]:
    ranks = Ranks(4)
    yield ranks
    ranks.close()


def bits(found: dict[str, Tensor]) -> dict[str, bytes]:
    return {name: tensor.to(torch.float64).numpy().tobytes() for name, tensor in found.items()}


def two_phase(settings: dict[str, Any], per_step: list[list[dict[str, Tensor]]]) -> list[dict[str, Tensor]]:
    """What every rank's gradients must become; ``per_step[step][rank][name]``."""
    feedback = feedback_from_config(CommConfig(**{**CONFIG, **settings}))
    assert feedback is not None
    n = len(per_step[0])
    units: dict[tuple[str, int], dict[str, Any]] = {}
    result = []
    for ranks in per_step:
        found = {}
        for name, shape in SHAPES.items():
            if len(shape) < 2 or torch.Size(shape).numel() < CONFIG["dense_below"]:
                found[name] = rank_order_mean([rank[name] for rank in ranks])
                continue
            parts = []
            for j in range(n):
                gs = [slices(rank[name], n)[j].contiguous() for rank in ranks]
                first = (name, j) not in units
                if first:
                    units[name, j] = {
                        "local": [feedback.start(g) for g in gs],
                        "replicated": feedback.new_replicated(gs[0]),
                        "owned": feedback.new_owned(gs[0]),
                    }
                unit = units[name, j]
                if first and feedback.dense_start:
                    mean = rank_order_mean(gs)
                    feedback.settle(unit["owned"], mean)
                    parts.append(feedback.decode_dense(unit["replicated"], mean))
                    continue
                payloads = [feedback.encode(slots, g) for slots, g in zip(unit["local"], gs, strict=True)]
                payload = feedback.relay(unit["owned"], unit["replicated"], payloads, gs[0])
                parts.append(feedback.receive(unit["replicated"], payload, torch.empty_like(gs[0])))
            found[name] = torch.cat(parts)
        result.append(found)
    return result


def run(rank: int, settings: dict[str, Any], cap_mb: float, until: int = 0) -> Any:
    ddp, reducer = wrap(settings, cap_mb=cap_mb)
    seen = []
    for step in range(1, STEPS + 1):
        backward(ddp, gradients(step, rank))
        seen.append(estimates(ddp.module))
        if step == until:
            saved = reducer.state_dict()
            held = {
                part: {name: {s: t.clone() for s, t in slots.items()} for name, slots in saved[part].items()}
                for part in ("local", "replicated")
            }
            reducer.close()
            ddp, reducer = wrap(settings, cap_mb=25)
            reducer.load_state_dict({**held, "meta": saved["meta"]})
    state = frozen(reducer.state_dict())
    stats = reducer.end_step()
    reducer.close()
    return seen, state["replicated"], stats.wire_bytes


@pytest.mark.parametrize("feedback", FEEDBACKS)
def test_two_phase_gives_the_bits_of_the_simulation(three_ranks: Ranks, feedback: str) -> None:
    settings = {"feedback": feedback, "transport": "two-phase"}
    per_step = [[gradients(step, rank) for rank in range(3)] for step in range(1, STEPS + 1)]
    expected = [bits(found) for found in two_phase(settings, per_step)]
    replicated = []
    for cap_mb in (25, 0.01):
        for seen, state, _ in three_ranks.run(run, settings, cap_mb):
            assert seen == expected
            replicated.append(state)
    assert all(state == replicated[0] for state in replicated)
    assert [seen for seen, _, _ in three_ranks.run(run, settings, 0.01, 2)] == [expected] * 3, "resumed after step 2"


def test_two_phase_sends_fewer_bytes(three_ranks: Ranks) -> None:
    sent = {
        transport: three_ranks.run(run, {"transport": transport, "feedback": "ef14"}, 25)[0][2]
        for transport in ("all-gather", "two-phase", "auto")
    }
    # Of what is compressed, 2 (n - 1) / n instead of n - 1 messages: 4/3 of 2, and the small tensors besides.
    assert sent["two-phase"] < 0.8 * sent["all-gather"]
    assert sent["auto"] == sent["two-phase"]


@pytest.mark.parametrize("transport", ["all-gather", "two-phase"])
@pytest.mark.parametrize("feedback", ["ef14", "ef21"])
def test_nodes_average_densely_and_compress_between_them(four_ranks: Ranks, feedback: str, transport: str) -> None:
    """Two nodes of two: each rank's slice of rows is what one rank of two would exchange."""
    settings = {"feedback": feedback, "transport": transport, "ranks_per_node": 2}
    steps = []
    for step in range(1, STEPS + 1):
        ranks = [gradients(step, rank) for rank in range(4)]
        steps.append([{k: rank_order_mean([ranks[i][k], ranks[i + 1][k]]) for k in SHAPES} for i in (0, 2)])
    expected = []
    alone = {"feedback": feedback}
    method = feedback_from_config(CommConfig(**{**CONFIG, **alone}))
    assert method is not None
    states: dict[tuple[str, int], Any] = {}
    for nodes in steps:
        found = {}
        for name, shape in SHAPES.items():
            compress = len(shape) > 1 and torch.Size(shape).numel() >= CONFIG["dense_below"]
            parts = []
            for j in range(2):
                gs = [slices(node[name], 2)[j].contiguous() for node in nodes]
                if not compress:
                    parts.append(rank_order_mean(gs))
                    continue
                parts.append(unit_step(method, states.setdefault((name, j), {}), gs, transport))
            found[name] = torch.cat(parts)
        expected.append(bits(found))
    for cap_mb in (25, 0.01):
        for seen, _, _ in four_ranks.run(run, settings, cap_mb):
            assert seen == expected
    assert [seen for seen, _, _ in four_ranks.run(run, settings, 0.01, 2)] == [expected] * 4, "resumed after step 2"


def unit_step(feedback: Any, state: dict[str, Any], gs: list[Tensor], transport: str) -> Tensor:
    """One step of one slice over two ranks."""
    if transport == "two-phase":
        parts = []
        for j in range(2):
            inner = state.setdefault(j, {})
            hs = [slices(g, 2)[j].contiguous() for g in gs]
            if not inner:
                inner |= {
                    "local": [feedback.start(h) for h in hs],
                    "replicated": feedback.new_replicated(hs[0]),
                    "owned": feedback.new_owned(hs[0]),
                }
                if feedback.dense_start:
                    feedback.settle(inner["owned"], rank_order_mean(hs))
                    parts.append(feedback.decode_dense(inner["replicated"], rank_order_mean(hs)))
                    continue
            payloads = [feedback.encode(slots, h) for slots, h in zip(inner["local"], hs, strict=True)]
            payload = feedback.relay(inner["owned"], inner["replicated"], payloads, hs[0])
            parts.append(feedback.receive(inner["replicated"], payload, torch.empty_like(hs[0])))
        return torch.cat(parts)
    if not state:
        state |= {"local": [feedback.start(g) for g in gs], "replicated": feedback.new_replicated(gs[0])}
        if feedback.dense_start:
            result: Tensor = feedback.decode_dense(state["replicated"], rank_order_mean(gs))
            return result
    payloads = [feedback.encode(slots, g) for slots, g in zip(state["local"], gs, strict=True)]
    estimate: Tensor = feedback.decode(state["replicated"], payloads, torch.empty_like(gs[0]))
    return estimate


def test_only_averages_cross_the_links_between_nodes(four_ranks: Ranks) -> None:
    """Dense, so that bytes can be told by hand: in the node 2 x half a model, on the rail 2 x half of that."""
    entries = sum(torch.Size(shape).numel() for shape in SHAPES.values())
    sent = four_ranks.run(run, {"compressor": "dense", "ranks_per_node": 2}, 25)[0][2]
    assert sent == pytest.approx(4 * entries * (0.5 + 0.5 + 0.5), rel=0.01)


def run_odd_nodes(rank: int) -> str:
    with pytest.raises(CommError) as caught:
        wrap({"ranks_per_node": 2})
    return caught.value.what


def test_nodes_of_different_size_are_refused(three_ranks: Ranks) -> None:
    assert set(three_ranks.run(run_odd_nodes)) == {"the world size 3 is not a multiple of comm.ranks_per_node = 2"}


def run_scaled(rank: int, scales: list[float], overflow_at: int, settings: dict[str, Any]) -> Any:
    ddp, reducer = wrap(settings, cap_mb=0.01)
    seen = []
    for step, scale in enumerate(scales, 1):
        reducer.begin_step(step, loss_scale=scale)
        wanted = {name: g * scale for name, g in gradients(step, rank).items()}
        before = frozen(reducer.state_dict()) if step > 1 else None
        if step == overflow_at and rank == 1:
            wanted["mid"][3, 4] = torch.inf
        reducer.begin_step(step, loss_scale=scale)
        backward(ddp, wanted)
        stats = reducer.end_step()
        assert stats.skipped == (step == overflow_at)
        if stats.skipped:
            after = frozen(reducer.state_dict())
            assert before is not None
            assert (after["local"], after["replicated"]) == (before["local"], before["replicated"])
            assert any(not torch.isfinite(p.grad).all() for p in ddp.module.parameters() if p.grad is not None)
        else:
            seen.append({name: p.grad / scale for name, p in ddp.module.named_parameters()})
    state = frozen(reducer.state_dict())
    reducer.close()
    return [bits(found) for found in seen], state["local"], state["replicated"]


@pytest.mark.parametrize("settings", [{"feedback": "ef14"}, {"feedback": "ef21", "ranks_per_node": 1}])
def test_the_state_follows_a_loss_scale_and_an_overflow_leaves_it_alone(
    three_ranks: Ranks, settings: dict[str, Any]
) -> None:
    plain = three_ranks.run(run_scaled, [1.0] * 4, 3, settings)
    # Powers of two, so that scaling and unscaling are exact.
    assert three_ranks.run(run_scaled, [1024.0, 2048.0, 2048.0, 512.0], 3, settings) == plain


def run_directed(rank: int, settings: dict[str, Any]) -> Any:
    seen, replicated, _ = run(rank, {**settings, "target": "update"}, 0.01)
    resumed, _, _ = run(rank, {**settings, "target": "update"}, 0.01, 2)
    assert resumed == seen
    return seen, replicated


@pytest.mark.parametrize("settings", [{"feedback": "ef14"}, {"feedback": "ef21", "warmup_steps": 2}])
def test_directions_are_what_is_compressed(three_ranks: Ranks, settings: dict[str, Any]) -> None:
    feedback = feedback_from_config(CommConfig(**{**CONFIG, **settings}))
    assert feedback is not None
    adam = default_direction()
    slots: dict[Any, Any] = {}
    expected = []
    for step in range(1, STEPS + 1):
        found = {}
        for name, shape in SHAPES.items():
            gs = [gradients(step, rank)[name] for rank in range(3)]
            if len(shape) < 2 or gs[0].numel() < CONFIG["dense_below"]:
                mean = rank_order_mean(gs)
                moments = slots.setdefault(name, adam.start(mean))
                found[name] = adam.move(moments, mean, torch.empty_like(mean))
                continue
            us = [
                adam.move(slots.setdefault((name, i), adam.start(g)), g, torch.empty_like(g)) for i, g in enumerate(gs)
            ]
            state = slots.setdefault((name, "state"), {})
            if not state:
                state |= {"local": [feedback.start(u) for u in us], "replicated": feedback.new_replicated(us[0])}
                if feedback.dense_start or step <= settings.get("warmup_steps", 0):
                    found[name] = feedback.decode_dense(state["replicated"], rank_order_mean(us))
                    continue
            if step <= settings.get("warmup_steps", 0):
                messages = [feedback.encode_dense(local, u) for local, u in zip(state["local"], us, strict=True)]
                found[name] = feedback.decode_dense(state["replicated"], rank_order_mean(messages))
                continue
            payloads = [feedback.encode(local, u) for local, u in zip(state["local"], us, strict=True)]
            found[name] = feedback.decode(state["replicated"], payloads, torch.empty_like(us[0]))
        expected.append(bits(found))
    for seen, _ in three_ranks.run(run_directed, settings):
        assert seen == expected


@pytest.mark.parametrize("beta1", [0.8, 0.0])
def test_a_direction_is_a_step_of_adamw(beta1: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 30, generator=generator)
    theirs = x.clone().requires_grad_()
    mine = x.clone().requires_grad_()
    adamw = torch.optim.AdamW([theirs], lr=0.01, betas=(beta1, 0.9), weight_decay=0.1)
    sgd = torch.optim.SGD([mine], lr=0.01, weight_decay=0.1)
    direction = Adam(beta1, 0.9)
    slots = direction.start(x)
    for _ in range(20):
        g = torch.randn(40, 30, generator=generator)
        theirs.grad = g.clone()
        mine.grad = direction.move(slots, g, torch.empty_like(g))
        adamw.step()
        sgd.step()
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_a_direction_far_larger_than_those_before_is_scaled_down() -> None:
    generator = torch.Generator().manual_seed(0)
    plain, clipped = Adam(0.0, 0.95), Adam(0.0, 0.95, clip_rms=1.2)
    slots = [direction.start(torch.empty(40, 30)) for direction in (plain, clipped)]
    for step in range(1, 31):
        g = torch.randn(40, 30, generator=generator) * (30 if step == 30 else 1)
        one, other = (d.move(s, g, torch.empty_like(g)) for d, s in zip((plain, clipped), slots, strict=True))
        if step < 30:
            assert one.square().mean().sqrt() < 1.2
            assert torch.equal(one, other)
    assert one.square().mean().sqrt() > 2
    torch.testing.assert_close(other, one * (1.2 / one.square().mean().sqrt()))
    assert other.square().mean().sqrt() == pytest.approx(1.2)
    bad = g.clone()
    bad[3, 4] = torch.nan
    assert clipped.move(slots[1], bad, torch.empty_like(g)).isnan().any(), "for the codec to find"


def run_other_transport(rank: int) -> str:
    ddp, reducer = wrap({"feedback": "ef14"})
    backward(ddp, gradients(1, rank))
    saved = reducer.state_dict()
    _, other = wrap({"feedback": "ef14", "transport": "two-phase"})
    with pytest.raises(CommStateMismatch) as caught:
        other.load_state_dict(saved)
    reducer.close()
    other.close()
    return caught.value.what


def test_state_of_another_transport_is_named(three_ranks: Ranks) -> None:
    for what in three_ranks.run(run_other_transport):
        assert "transport = 'all-gather', this run has 'two-phase'" in what


def run_scaler(rank: int) -> Any:
    """GradScaler itself: an overflow is skipped on every rank, and its scale stays the same on all."""
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 64)
    ddp = torch.nn.parallel.DistributedDataParallel(model)
    reducer = GradientReducer(model.named_parameters(), CommConfig(feedback="ef14", density=0.1, dense_below=1))
    reducer.attach(ddp)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    scales = []
    for step in range(1, 7):
        x = torch.randn(8, 64, generator=torch.Generator().manual_seed(10 * step + rank))
        if step == 4 and rank == 2:
            x[0, 0] = torch.inf
        optimizer.zero_grad()
        reducer.begin_step(step, loss_scale=scaler.get_scale())
        scaler.scale(ddp(x).square().mean()).backward()
        reducer.end_step()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    reducer.close()
    return scales, model.weight.detach().numpy().tobytes()


def test_grad_scaler(three_ranks: Ranks) -> None:
    found = three_ranks.run(run_scaler)
    assert all(one == found[0] for one in found)
    scales, weight = found[0]
    assert scales[3] == scales[2] / 2, "step 4 overflowed on rank 2"
    assert torch.frombuffer(bytearray(weight), dtype=torch.float32).isfinite().all()
