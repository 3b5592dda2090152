"""DeepSpeed's ZeRO 0, 1 and 2 over gloo: the loss of its own averaging, exact resume, and what is refused."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from outlast.comm import (
    CommConfig,
)
from outlast.comm.deepspeed import attach_deepspeed
from outlast.comm.direction import default_direction
from outlast.comm.feedback.from_config import (
    feedback_from_config,
)
from outlast.errors import CommError, CommStateMismatch, MissingDependency, NonFiniteGradient
from tests.comm.ranks import Ranks
from tests.comm.tiny_gpt import GRADIENT, STEPS, UPDATE, batch, cloned, digest, final, optimizer_of, tiny_gpt

needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="deepspeed is not installed: pip install 'outlast[deepspeed]'"
)

SHAPES = {"wide": (61, 103), "bias": (51,), "small": (7, 11), "mid": (40, 50), "flat": (1, 901)}
TOY: dict[str, Any] = {"density": 0.05, "dense_below": 100, "values": "fp32"}


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    ranks = Ranks(2, prepare=load)
    yield ranks
    ranks.close()


def load(rank: int) -> None:
    """Once in each process."""
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_RANK=str(rank))
    warnings.simplefilter("default")  # DeepSpeed's are not ours
    deepspeed = import_module("deepspeed")
    import_module("deepspeed.utils").logger.setLevel(logging.ERROR)
    # It would spend most of a minute with a compiler on its all-reduce through shared memory, which nothing here calls.
    import_module("deepspeed.ops").__compatible_ops__ = {}
    deepspeed.init_distributed("gloo", verbose=False)


def engine_of(model: nn.Module, optimizer: torch.optim.Optimizer, stage: int, **more: Any) -> Any:
    zero = {"stage": stage, "reduce_bucket_size": 30_000, **more.pop("zero", {})}
    settings = {
        "train_micro_batch_size_per_gpu": 8,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # DeepSpeed clips to a norm of 1 unless told not to
        "zero_optimization": zero,
        **more,
    }
    return import_module("deepspeed").initialize(model=model, optimizer=optimizer, config=settings)[0]


class Toy(nn.Module):
    """Its gradients are what a test wants."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))

    def forward(self, wanted: dict[str, Tensor]) -> Tensor:
        return sum(((p * wanted[name]).sum() for name, p in self.named_parameters()), torch.zeros(()))


def gradients(step: int, rank: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def weights(engine: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in engine.module.named_parameters()}


def toy_run(rank: int, stage: int, settings: dict[str, Any], steps: int) -> dict[str, Tensor]:
    """With a learning rate of 1 the weights are minus the sum of all estimates."""
    model = Toy()
    engine = engine_of(model, torch.optim.SGD(model.parameters(), lr=1.0), stage, gradient_accumulation_steps=2)
    with attach_deepspeed(engine, CommConfig(**{**TOY, **settings})) as reducer:
        for step in range(1, steps + 1):
            for _ in range(2):
                engine.backward(engine(gradients(step, rank)))
                engine.step()
            assert reducer.end_step().wire_bytes > 0
    return weights(engine)


def owners_of(name: str) -> list[tuple[int, int]]:
    """(first entry, end) of each rank's part: ZeRO cuts all parameters end to end in two halves."""
    total = sum(torch.Size(shape).numel() for shape in SHAPES.values())
    half = -(-total // 4) * 2
    start = 0
    for other, shape in SHAPES.items():
        if other == name:
            break
        start += torch.Size(shape).numel()
    numel = torch.Size(SHAPES[name]).numel()
    cut = min(max(half - start, 0), numel)
    return [(0, cut), (cut, numel)]


def simulate(settings: dict[str, Any], steps: int) -> dict[str, Tensor]:
    """The same in one process, part by part."""
    config = CommConfig(**{**TOY, **settings})
    method, direction = feedback_from_config(config), default_direction() if config.target == "update" else None
    assert method is not None
    found = {}
    for name, shape in SHAPES.items():
        weight = torch.zeros(shape)
        for start, stop in owners_of(name):
            x = weight.view(-1)[start:stop]
            if start == stop:
                continue
            row = shape[-1]
            rows = len(shape) > 1 and start % row == 0 and stop % row == 0
            slots: Any = None
            replicated: Any = None
            moments: Any = [direction.start(x.view(-1, row) if rows else x) for _ in range(2)] if direction else None
            for step in range(1, steps + 1):
                parts = [gradients(step, rank)[name].view(-1)[start:stop] for rank in range(2)]
                parts = [part.view(-1, row) if rows else part for part in parts]
                if len(shape) < 2 or weight.numel() < config.dense_below:
                    estimate = (parts[0] + parts[1]) / 2
                    if direction:
                        estimate = direction.move(moments[0], estimate, torch.empty_like(estimate))
                else:
                    if direction:
                        pairs = zip(moments, parts, strict=True)
                        parts = [direction.move(m, part, torch.empty_like(part)) for m, part in pairs]
                    if slots is None:
                        slots = [method.start(part) for part in parts]
                        replicated = method.new_replicated(parts[0])
                        first = method.dense_start
                    if first:
                        estimate = method.decode_dense(replicated, (parts[0] + parts[1]) / 2)
                        first = False
                    else:
                        payloads = [method.encode(s, part) for s, part in zip(slots, parts, strict=True)]
                        estimate = method.decode(replicated, payloads, torch.empty_like(parts[0]))
                x -= estimate.reshape(-1)
        found[name] = weight
    return found


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(
    "settings",
    [
        {"feedback": "ef14", "target": "gradient"},
        {"feedback": "ef21", "target": "gradient"},
        {"feedback": "ef14", "target": "update"},
        {"compressor": "lowrank", "rank": 2, "feedback": "ef21-sgdm", "target": "gradient"},
    ],
    ids=lambda settings: "-".join(str(value) for value in settings.values()),
)
def test_partitions_get_the_bits_of_the_simulation(two_ranks: Ranks, stage: int, settings: dict[str, Any]) -> None:
    expected = simulate(settings, 4)
    for found in two_ranks.run(toy_run, stage, settings, 4):
        wrong = [name for name in SHAPES if not torch.equal(found[name], expected[name])]
        assert not wrong


KINDS: dict[str, dict[str, Any]] = {
    "zero0": {"stage": 0},
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero0-clipped": {"stage": 0, "gradient_accumulation_steps": 2, "gradient_clipping": 0.5},
    "zero2-clipped": {"stage": 2, "gradient_accumulation_steps": 2, "gradient_clipping": 0.5},
    "zero0-bf16": {"stage": 0, "bf16": {"enabled": True}},
    "zero1-bf16-fp32": {"stage": 1, "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
    "zero2-bf16-fp32": {"stage": 2, "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
}


def gpt_engine(kind: str, settings: dict[str, Any] | None) -> Any:
    model = tiny_gpt()
    return engine_of(model, optimizer_of(model.parameters(), settings), **KINDS[kind])


def steps_of(engine: Any, rank: int, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last + 1):
        for micro in range(engine.gradient_accumulation_steps()):
            loss = engine(*batch(step, rank, micro))
            engine.backward(loss)
            engine.step()
        value = loss.detach().float()
        dist.all_reduce(value)
        losses.append(float(value) / dist.get_world_size())
    return losses


def gpt_run(rank: int, kind: str, settings: dict[str, Any] | None) -> tuple[list[float], str]:
    engine = gpt_engine(kind, settings)
    reducer = attach_deepspeed(engine, CommConfig(**settings)) if settings else None
    losses = steps_of(engine, rank, 1, STEPS)
    if reducer:
        stats = reducer.end_step()
        assert stats.wire_bytes < 0.4 * stats.dense_bytes
        reducer.close()
    return losses, digest(weights(engine))


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_dense_training(two_ranks: Ranks, kind: str) -> None:
    dense = two_ranks.run(gpt_run, kind, None)
    # What is clipped must be a gradient, and behind compressed gradients Adam lags: the denser, the less.
    for settings in [{**GRADIENT, "density": 0.2}] if "clipped" in kind else [GRADIENT, UPDATE]:
        runs = two_ranks.run(gpt_run, kind, settings)
        assert final(runs[0][0]) < 1.02 * final(dense[0][0])
        assert runs[0][1] == runs[1][1], "the ranks' weights differ"
    if kind in ("zero0", "zero2"):
        assert two_ranks.run(gpt_run, kind, settings) == runs


def gpt_resumed(rank: int, kind: str, settings: dict[str, Any], folder: str) -> tuple[str, str]:
    settings = {**settings, "warmup_steps": 2}
    engine = gpt_engine(kind, settings)
    with attach_deepspeed(engine, CommConfig(**settings)) as reducer:
        steps_of(engine, rank, 1, 4)
        engine.save_checkpoint(folder, tag="four")
        saved = cloned(reducer.state_dict())
        steps_of(engine, rank, 5, 7)
        straight = digest(weights(engine))
    engine = gpt_engine(kind, settings)
    with attach_deepspeed(engine, CommConfig(**settings)) as reducer:
        engine.load_checkpoint(folder, tag="four")
        reducer.load_state_dict(saved)
        steps_of(engine, rank, 5, 7)
        return straight, digest(weights(engine))


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("kind", ["zero0", "zero1", "zero2", "zero1-bf16-fp32"])
@pytest.mark.parametrize("settings", [GRADIENT, UPDATE], ids=["ef21", "update"])
def test_a_resumed_run_has_the_same_bits(two_ranks: Ranks, kind: str, settings: dict[str, Any], tmp_path: Any) -> None:
    for straight, resumed in two_ranks.run(gpt_resumed, kind, settings, str(tmp_path)):
        assert straight == resumed


def closed(rank: int, stage: int) -> bool:
    used = []
    for attached in (False, True):
        model = Toy()
        engine = engine_of(model, torch.optim.SGD(model.parameters(), lr=1.0), stage)
        if attached:
            attach_deepspeed(engine, CommConfig(target="gradient")).close()
        engine.backward(engine(gradients(1, rank)))
        engine.step()
        used.append(weights(engine))
    return all(torch.equal(used[0][name], used[1][name]) for name in SHAPES)


@pytest.mark.slow
@needs_deepspeed
def test_a_closed_reducer_leaves_deepspeed_as_it_was(two_ranks: Ranks) -> None:
    for stage in (0, 2):
        assert two_ranks.run(closed, stage) == [True, True]


def with_nan(rank: int, stage: int) -> str:
    model = Toy()
    engine = engine_of(model, torch.optim.SGD(model.parameters(), lr=1.0), stage)
    with attach_deepspeed(engine, CommConfig(**TOY, target="gradient")) as reducer:
        wanted = gradients(1, rank)
        if rank == 1:
            wanted["wide"][0, 0] = torch.nan
        with pytest.raises(NonFiniteGradient) as caught:
            engine.backward(engine(wanted))
        with pytest.raises(NonFiniteGradient):
            reducer.state_dict()
    return str(caught.value)


@pytest.mark.slow
@needs_deepspeed
def test_nan_is_an_error_on_every_rank(two_ranks: Ranks) -> None:
    messages = two_ranks.run(with_nan, 2)
    assert messages[0] == messages[1]
    assert "gradient of wide on rank 1 holds NaN" in messages[0]


def refused(rank: int) -> list[str]:
    def error(act: Any, kind: type[CommError] = CommError) -> str:
        with pytest.raises(kind) as caught:
            act()
        assert caught.value.fix
        return str(caught.value)

    def made(stage: int, **more: Any) -> Any:
        model = Toy()
        return engine_of(model, torch.optim.SGD(model.parameters(), lr=1.0), stage, **more)

    def adamw(stage: int) -> Any:
        model = Toy()
        return engine_of(model, torch.optim.AdamW(model.parameters()), stage)

    gradient = CommConfig(**TOY, target="gradient")
    found = [
        error(lambda: attach_deepspeed(Toy(), gradient)),
        error(lambda: attach_deepspeed(made(2, zero={"overlap_comm": True}), gradient)),
        error(lambda: attach_deepspeed(made(1, zero={"contiguous_gradients": False}), gradient)),
        error(lambda: attach_deepspeed(made(2, gradient_clipping=1.0), CommConfig(target="update"))),
        error(lambda: attach_deepspeed(adamw(2), CommConfig(target="update"))),
        error(lambda: attach_deepspeed(adamw(0), CommConfig(target="update"))),
        error(lambda: attach_deepspeed(made(2), CommConfig(compressor="auto"))),
        error(lambda: attach_deepspeed(made(2, managed_gradient_accumulation=False), gradient)),
    ]
    engine = made(1)
    with attach_deepspeed(engine, gradient) as reducer:
        found.append(error(lambda: attach_deepspeed(engine, gradient)))
        engine.backward(engine(gradients(1, rank)))
        engine.step()
        state = cloned(reducer.state_dict())
    with attach_deepspeed(made(0), gradient) as whole:
        found.append(error(lambda: whole.load_state_dict(state), CommStateMismatch))

    engine = made(2, gradient_accumulation_steps=2)
    with attach_deepspeed(engine, gradient) as reducer:
        engine.backward(engine(gradients(1, rank)))
        found.append(error(reducer.state_dict))
    optimizer = made(2).optimizer
    cls = type(optimizer)
    average = cls.average_tensor
    try:
        cls.average_tensor = lambda self, tensor: None
        found.append(error(lambda: attach_deepspeed(made(2), gradient)))
    finally:
        cls.average_tensor = average
    return found


@pytest.mark.slow
@needs_deepspeed
def test_what_cannot_be_right_is_refused(two_ranks: Ranks) -> None:
    expected = [
        "is not a DeepSpeedEngine",
        "overlap_comm",
        "contiguous_gradients",
        "gradient_clipping = 1",
        "the optimizer is AdamW",
        "the optimizer is AdamW",
        "compressor = 'auto'",
        "managed_gradient_accumulation = false",
        "is already replaced",
        "was saved with version",
        "were accumulated and not exchanged",
        "takes ('tensor',), expected",
    ]
    for found in two_ranks.run(refused):
        assert len(found) == len(expected)
        for message, part in zip(found, expected, strict=True):
            assert part in message


def test_a_missing_deepspeed_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "deepspeed", None)
    with pytest.raises(MissingDependency, match=r"outlast\[deepspeed\]"):
        attach_deepspeed(object())


@pytest.mark.slow
@needs_deepspeed
def test_four_ranks_train_as_without_compression() -> None:
    ranks = Ranks(4, prepare=load)
    try:
        dense = ranks.run(gpt_run, "zero2", None)[0]  # the stages differ in who holds what, not in what is averaged
        for kind in ("zero1", "zero2"):
            runs = ranks.run(gpt_run, kind, GRADIENT)
            assert final(runs[0][0]) < 1.02 * final(dense[0])
            assert len({run[1] for run in runs}) == 1, "the ranks' weights differ"
    finally:
        ranks.close()
