"""FSDP2 and HSDP in real processes: the bits of the simulation, the loss of dense training, exact resume."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from outlast.comm import (
    CommConfig,
)
from outlast.comm.direction import default_direction
from outlast.comm.feedback.from_config import (
    feedback_from_config,
)
from outlast.comm.fsdp import ShardedReducer, attach_fsdp
from outlast.errors import CommError, CommStateMismatch, NonFiniteGradient
from tests.comm.ranks import Ranks
from tests.comm.tiny_gpt import GRADIENT, STEPS, UPDATE, batch, cloned, digest, final, optimizer_of, tiny_gpt

SHAPES = {
    "left.wide": (301, 303),
    "left.bias": (51,),
    "left.small": (7, 11),
    "right.mid": (40, 50),
    "right.across": (30, 42),
    "right.flat": (1, 900),
    "top": (131, 20),
    "idle": (50, 20),
    "frozen": (60, 20),
}
"""Rows that two ranks cannot share evenly, a tensor of which one rank has nothing, one that is sharded by columns, one
that gets no gradient, and one that needs none."""
TOY: dict[str, Any] = {"density": 0.03, "dense_below": 100, "values": "fp32"}


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


class Half(nn.Module):
    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))

    def forward(self, wanted: dict[str, Tensor], path: str) -> Tensor:
        return sum(((p * wanted[f"{path}.{name}"]).sum() for name, p in self.named_parameters()), torch.zeros(()))


class Toy(nn.Module):
    """Its gradients are what a test wants."""

    def __init__(self) -> None:
        super().__init__()
        for half in ("left", "right"):
            setattr(self, half, Half({n.split(".")[1]: s for n, s in SHAPES.items() if n.startswith(half)}))
        for name in ("top", "idle", "frozen"):
            self.register_parameter(name, nn.Parameter(torch.zeros(SHAPES[name]), requires_grad=name != "frozen"))

    def forward(self, wanted: dict[str, Tensor]) -> Tensor:
        frozen = (self.frozen * wanted["frozen"]).sum()
        return self.left(wanted, "left") + self.right(wanted, "right") + (self.top * wanted["top"]).sum() + frozen


def gradients(step: int, rank: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def sharded_toy(mesh: DeviceMesh | None = None) -> Toy:
    model = Toy()
    fully_shard(model.left, mesh=mesh)
    fully_shard(model.right, mesh=mesh, shard_placement_fn=lambda p: Shard(1) if tuple(p.shape) == (30, 42) else None)
    fully_shard(model, mesh=mesh)
    return model


def local_gradients(model: nn.Module) -> dict[str, bytes]:
    found = {}
    for name, param in model.named_parameters():
        if name == "frozen":
            assert param.grad is None
            continue
        assert isinstance(param.grad, DTensor)
        found[name] = param.grad.to_local().contiguous().numpy().tobytes()
    return found


def slices_of(name: str, x: Tensor, n: int) -> list[Tensor]:
    if name == "right.across":
        return [part.contiguous() for part in x.chunk(n, dim=1)]
    rows = -(-len(x) // n)
    edges = [min(rank * rows, len(x)) for rank in range(n + 1)]
    return [x[a:b] for a, b in pairwise(edges)]


def simulate(settings: dict[str, Any], steps: list[list[dict[str, Tensor]]]) -> list[list[dict[str, bytes]]]:
    """``[step][rank][name]``: what each shard's gradient must become, through the feedback classes alone."""
    config = CommConfig(**{**TOY, **settings})
    method, direction = feedback_from_config(config), default_direction() if config.target == "update" else None
    n = len(steps[0])
    slots: dict[Any, Any] = {}
    result = []
    for step, ranks in enumerate(steps, 1):
        found: list[dict[str, bytes]] = [{} for _ in range(n)]
        for name, shape in SHAPES.items():
            if name == "frozen":
                continue
            for owner in range(n):
                parts = [slices_of(name, rank[name], n)[owner] for rank in ranks]
                if name == "idle":
                    parts = [torch.zeros_like(part) for part in parts]
                out = torch.empty_like(parts[0])
                key = (name, owner)
                compress = method is not None and len(shape) > 1 and torch.Size(shape).numel() >= config.dense_below
                if not out.numel():
                    pass
                elif not compress:
                    mean = (parts[0] + parts[1]) / 2 if n == 2 else parts[0]
                    if direction is not None:
                        moments = slots.setdefault((key, "m"), direction.start(mean))
                        mean = direction.move(moments, mean, torch.empty_like(mean))
                    out.copy_(mean)
                else:
                    assert method is not None
                    if direction is not None:
                        moved = []
                        for rank, part in enumerate(parts):
                            moments = slots.setdefault((key, "m", rank), direction.start(part))
                            moved.append(direction.move(moments, part, torch.empty_like(part)))
                        parts = moved
                    first = key not in slots
                    if first:
                        slots[key] = [method.start(part) for part in parts]
                        slots[key, "h"] = method.new_replicated(out)
                    if (first and method.dense_start) or step <= config.warmup_steps:
                        pairs = zip(slots[key], parts, strict=True)
                        whole = parts if first and method.dense_start else [method.encode_dense(s, g) for s, g in pairs]
                        mean = (whole[0] + whole[1]) / 2 if n == 2 else whole[0]
                        method.decode_dense(slots[key, "h"], mean, out)
                    else:
                        payloads = [method.encode(s, g) for s, g in zip(slots[key], parts, strict=True)]
                        method.decode(slots[key, "h"], payloads, out)
                found[owner][name] = out.numpy().tobytes()
        result.append(found)
    return result


def toy_run(rank: int, settings: dict[str, Any], steps: int, accumulate: bool) -> list[dict[str, bytes]]:
    model = sharded_toy()
    reducer = attach_fsdp(model, CommConfig(**{**TOY, **settings}))
    seen = []
    for step in range(1, steps + 1):
        model.zero_grad()
        if accumulate:
            reducer.begin_step(step)
            wanted = gradients(step, rank)
            model.set_requires_gradient_sync(False)
            model({name: 0.5 * g for name, g in wanted.items()}).backward()
            model.set_requires_gradient_sync(True)
            model({name: 0.5 * g for name, g in wanted.items()}).backward()
        else:
            model(gradients(step, rank)).backward()
        seen.append(local_gradients(model))
        stats = reducer.end_step()
        assert stats.collectives == 3
        assert stats.wire_bytes > 0
    reducer.close()
    return seen


@pytest.mark.parametrize(
    ("settings", "accumulate"),
    [
        ({"feedback": "ef14", "target": "gradient"}, True),
        ({"feedback": "ef21", "target": "gradient", "warmup_steps": 2}, False),
        ({"feedback": "econtrol", "target": "gradient"}, False),
        ({"compressor": "lowrank", "rank": 2, "feedback": "ef21-sgdm", "target": "gradient"}, False),
        ({"compressor": "randk", "feedback": "ef14", "target": "gradient", "warmup_steps": 1}, False),
        ({"compressor": "gear", "feedback": "ef21", "target": "gradient"}, False),
        ({"compressor": "sign", "feedback": "ef14", "target": "update"}, False),
        ({"feedback": "ef14", "residual": "int8", "values": "int4", "target": "update"}, False),
        ({"compressor": "dense"}, True),
    ],
    ids=lambda value: "-".join(str(v) for v in value.values()) if isinstance(value, dict) else "",
)
def test_every_shard_gets_the_bits_of_the_simulation(
    two_ranks: Ranks, settings: dict[str, Any], accumulate: bool
) -> None:
    steps = 4
    expected = simulate(settings, [[gradients(step, rank) for rank in range(2)] for step in range(1, steps + 1)])
    for rank, seen in enumerate(two_ranks.run(toy_run, settings, steps, accumulate)):
        for step in range(steps):
            wrong = [name for name in seen[step] if seen[step][name] != expected[step][rank][name]]
            assert not wrong, f"step {step + 1}, rank {rank}"


def measured(rank: int, shape: tuple[int, ...] | None) -> list[tuple[Any, Any, Any]]:
    model = sharded_toy(mesh_of(shape))
    every = {"probe_every_steps": 2, "resync_every_steps": 3}
    found = []
    with attach_fsdp(model, CommConfig(**TOY, **every, feedback="ef21", target="gradient")) as reducer:
        for step in range(1, 5):
            model(gradients(step, rank)).backward()
            stats = reducer.end_step()
            found.append((stats.alpha, stats.residual, stats.drift))
    return found


@pytest.mark.parametrize("shape", [None, (2, 1)], ids=["fsdp", "hsdp"])
def test_loss_of_information_and_drift_are_measured(two_ranks: Ranks, shape: tuple[int, ...] | None) -> None:
    for found in two_ranks.run(measured, shape):
        first, second, third, fourth = found
        assert first == (None, None, None)
        assert 0.03 < second[0] < 1
        assert second[1] > 0
        assert third[:2] == (None, None)
        assert 0 <= third[2] < 1e-5
        assert fourth[2] is None


def sharded_gpt(mesh: DeviceMesh | None, policy: MixedPrecisionPolicy | None = None) -> nn.Module:
    model = tiny_gpt()
    policy = policy or MixedPrecisionPolicy()
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def shards_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.to_local() for name, p in model.named_parameters() if isinstance(p, DTensor)}


def mesh_of(shape: tuple[int, ...] | None) -> DeviceMesh | None:
    return None if shape is None else init_device_mesh("cpu", shape, mesh_dim_names=("copies", "shards"))


def steps_of(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last + 1):
        loss = model(*batch(step, rank))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        value = loss.detach().float()
        dist.all_reduce(value)
        losses.append(float(value) / dist.get_world_size())
    return losses


def gpt_run(
    rank: int, settings: dict[str, Any] | None, shape: tuple[int, ...] | None, low: bool = False
) -> tuple[list[float], str, float]:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16) if low else None
    model = sharded_gpt(mesh_of(shape), policy)
    reducer = attach_fsdp(model, CommConfig(**settings)) if settings else None
    losses = steps_of(model, optimizer_of(model.parameters(), settings), rank, 1, STEPS)
    share = 1.0
    if reducer:
        stats = reducer.end_step()
        share = stats.wire_bytes / stats.dense_bytes
        reducer.close()
    return losses, digest(shards_of(model)), share


@pytest.mark.slow
@pytest.mark.parametrize("shape", [None, (2, 1)], ids=["fsdp", "hsdp"])
def test_the_loss_is_that_of_dense_training(two_ranks: Ranks, shape: tuple[int, ...] | None) -> None:
    dense = two_ranks.run(gpt_run, None, shape)
    for settings in (GRADIENT, UPDATE):
        runs = two_ranks.run(gpt_run, settings, shape)
        assert runs[0][2] < 0.25
        assert final(runs[0][0]) < 1.02 * final(dense[0][0])
        if shape:
            assert runs[0][1] == runs[1][1], "copies of a shard differ"
    again = two_ranks.run(gpt_run, UPDATE, shape)
    assert [(run[0], run[1]) for run in again] == [(run[0], run[1]) for run in runs]


@pytest.mark.slow
def test_the_buffers_may_be_bf16(two_ranks: Ranks) -> None:
    dense, compressed = (two_ranks.run(gpt_run, settings, None, True)[0] for settings in (None, GRADIENT))
    assert final(compressed[0]) < 1.02 * final(dense[0])


def gpt_resumed(rank: int, settings: dict[str, Any], shape: tuple[int, ...] | None) -> tuple[str, str]:
    def fresh() -> tuple[nn.Module, ShardedReducer, torch.optim.Optimizer]:
        model = sharded_gpt(mesh_of(shape))
        return (
            model,
            attach_fsdp(model, CommConfig(**{**settings, "warmup_steps": 2})),
            optimizer_of(model.parameters(), settings),
        )

    model, reducer, optimizer = fresh()
    steps_of(model, optimizer, rank, 1, 4)
    weights = {name: shard.clone() for name, shard in shards_of(model).items()}
    saved = cloned(reducer.state_dict())
    moments = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in model.parameters()]
    steps_of(model, optimizer, rank, 5, 7)
    straight = digest(shards_of(model))
    reducer.close()

    model, reducer, optimizer = fresh()
    with torch.no_grad():
        for name, shard in shards_of(model).items():
            shard.copy_(weights[name])
    reducer.load_state_dict(saved)
    for p, slots in zip(model.parameters(), moments, strict=True):
        optimizer.state[p] = slots
    steps_of(model, optimizer, rank, 5, 7)
    resumed = digest(shards_of(model))
    reducer.close()
    return straight, resumed


@pytest.mark.parametrize(
    ("settings", "shape"),
    [(GRADIENT, None), ({**UPDATE, "residual": "int8"}, None), ({**GRADIENT, "compressor": "lowrank"}, (2, 1))],
    ids=["ef21", "update-int8", "lowrank-hsdp"],
)
def test_a_resumed_run_has_the_same_bits(
    two_ranks: Ranks, settings: dict[str, Any], shape: tuple[int, ...] | None
) -> None:
    for straight, resumed in two_ranks.run(gpt_resumed, settings, shape):
        assert straight == resumed


def closed(rank: int) -> tuple[bool, bool]:
    same = []
    for shape in (None, (2, 1)):
        plain, used = sharded_toy(mesh_of(shape)), sharded_toy(mesh_of(shape))
        with attach_fsdp(used, CommConfig(**TOY, target="gradient")):
            used(gradients(1, rank)).backward()
        used.zero_grad()
        for model in (plain, used):
            model(gradients(2, rank)).backward()
        expected, found = (
            {name: p.grad for name, p in model.named_parameters() if p.grad is not None} for model in (plain, used)
        )
        same.append(all(torch.equal(expected[name].to_local(), found[name].to_local()) for name in expected))
        assert set(expected) == set(found)
    return same[0], same[1]


def test_a_closed_reducer_leaves_fsdp_as_it_was(two_ranks: Ranks) -> None:
    assert two_ranks.run(closed) == [(True, True)] * 2


def with_nan(rank: int) -> str:
    model = sharded_toy()
    reducer = attach_fsdp(model, CommConfig(**TOY, target="gradient"))
    model(gradients(1, rank)).backward()
    wanted = gradients(2, rank)
    if rank == 1:
        wanted["right.mid"][39, 49] = torch.nan  # in the slice that rank 1 owns
    with pytest.raises(NonFiniteGradient) as caught:
        model(wanted).backward()
    with pytest.raises(NonFiniteGradient):
        reducer.end_step()
    reducer.close()
    return str(caught.value)


def test_nan_is_an_error_on_every_rank(two_ranks: Ranks) -> None:
    messages = two_ranks.run(with_nan)
    assert messages[0] == messages[1]
    assert "gradient of right.mid on rank 1 holds NaN" in messages[0]


def refused(rank: int) -> list[str]:
    def error(kind: type[CommError], act: Any) -> str:
        with pytest.raises(kind) as caught:
            act()
        assert caught.value.fix
        return str(caught.value)

    gradient = CommConfig(target="gradient")
    half = MixedPrecisionPolicy(param_dtype=torch.float16)
    found = [
        error(CommError, lambda: attach_fsdp(Toy(), gradient)),
        error(CommError, lambda: attach_fsdp(sharded_gpt(None, half), gradient)),
        error(CommError, lambda: attach_fsdp(sharded_toy(), CommConfig(ranks_per_node=2, target="gradient"))),
        error(CommError, lambda: attach_fsdp(sharded_toy(), CommConfig(compressor="auto"))),
        error(
            CommError,
            lambda: attach_fsdp(sharded_toy(mesh_of((2, 1))), CommConfig(transport="two-phase")),
        ),
    ]
    model = sharded_toy()
    with attach_fsdp(model, CommConfig(**TOY, target="gradient")) as reducer:
        reducer.begin_step(1)
        model(gradients(1, rank)).backward()
        found.append(error(CommError, lambda: model(gradients(1, rank)).backward()))
        model.reset_iter_state()
        state = cloned(reducer.state_dict())
    with attach_fsdp(sharded_toy(), CommConfig(**TOY, target="gradient", feedback="ef21")) as other:
        found.append(error(CommStateMismatch, lambda: other.load_state_dict(state)))
    with attach_fsdp(sharded_toy(), CommConfig(**{**TOY, "dense_below": 10_000}, target="gradient")) as other:
        found.append(error(CommStateMismatch, lambda: other.load_state_dict(state)))
    return found


def test_what_cannot_be_right_is_refused(two_ranks: Ranks) -> None:
    expected = [
        "no parameters sharded by FSDP2",
        "float16",
        "ranks_per_node",
        "compressor = 'auto'",
        "two-phase",
        "averaged twice in step 1",
        "feedback = 'ef14', this run has 'ef21'",
        "no such compressed parameter",
    ]
    for found in two_ranks.run(refused):
        assert len(found) == len(expected)
        for message, part in zip(found, expected, strict=True):
            assert part in message


@pytest.mark.slow
def test_four_ranks_train_as_without_compression() -> None:
    ranks = Ranks(4)
    try:
        dense = ranks.run(gpt_run, None, None)[0]  # copies of a shard change nothing in what is averaged
        for shape in (None, (2, 2)):
            runs = ranks.run(gpt_run, GRADIENT, shape)
            assert final(runs[0][0]) < 1.02 * final(dense[0])
            if shape:
                assert [runs[0][1], runs[1][1]] == [runs[2][1], runs[3][1]], "copies of a shard differ"
    finally:
        ranks.close()
