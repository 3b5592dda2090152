"""One call and one interface for DDP, FSDP2 and DeepSpeed, over two ranks each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import outlast.comm
from outlast.comm import CommConfig, Reducer
from outlast.comm.reducer import Reducer as Protocol
from outlast.errors import CommError, CommStateMismatch, OutOfRange, UnknownCompressor, UnknownKey
from tests.comm.deepspeed.test_deepspeed import load as load_deepspeed
from tests.comm.deepspeed.test_deepspeed import needs_deepspeed
from tests.comm.ranks import Ranks
from tests.comm.tiny_gpt import cloned
from tests.comm.toy import CONFIG, Toy, frozen, gradients

Step = Callable[[int], dict[str, bytes]]
"""Trains one step, and returns what it made of the gradients, bit by bit."""


def ddp(rank: int, **settings: Any) -> tuple[Reducer, Step]:
    model = DistributedDataParallel(Toy())
    reducer = outlast.comm.attach(model, **settings)

    def step(number: int) -> dict[str, bytes]:
        model.zero_grad()
        model(gradients(number, rank)).backward()
        return bits(model.module)

    return reducer, step


def fsdp(rank: int, **settings: Any) -> tuple[Reducer, Step]:
    model: nn.Module = Toy()
    fully_shard(model)
    reducer = outlast.comm.attach(model, **settings)

    def step(number: int) -> dict[str, bytes]:
        model.zero_grad()
        model(gradients(number, rank)).backward()
        return bits(model)

    return reducer, step


def zero(rank: int, stage: int, **settings: Any) -> tuple[Reducer, Step]:
    model = Toy()
    engine = import_module("deepspeed").initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": stage},
        },
    )[0]
    reducer = outlast.comm.attach(engine, **settings)

    def step(number: int) -> dict[str, bytes]:
        # The weights become minus the sum of all estimates, so they begin at zero in every step.
        for tensor in [*model.parameters(), *getattr(engine.optimizer, "single_partition_of_fp32_groups", [])]:
            tensor.data.zero_()
        engine.global_steps = number - 1
        engine.backward(engine(gradients(number, rank)))
        engine.step()
        engine.global_steps = number  # so that begin_step() is asked for the next one
        return {name: p.detach().numpy().tobytes() for name, p in model.named_parameters()}

    return reducer, step


def bits(model: nn.Module) -> dict[str, bytes]:
    found = {}
    for name, p in model.named_parameters():
        grad: Any = p.grad
        found[name] = (grad.to_local() if hasattr(grad, "to_local") else grad).contiguous().numpy().tobytes()
    return found


def conforms(rank: int, make: Callable[..., tuple[Reducer, Step]], args: tuple[int, ...], reshards: bool) -> None:
    config = CommConfig(**CONFIG)
    first, step = make(rank, *args, config=config, density=0.05)
    with first as reducer:
        assert reducer is first
        assert reducer.config == CommConfig(**{**CONFIG, "density": 0.05})
        assert reducer.world_size == 2
        made = []
        for number in (1, 2, 3, 4):
            reducer.begin_step(number)
            made.append(step(number))
            stats = reducer.end_step()
            assert stats.wire_bytes > 0
            assert stats.collectives > 0
            if number == 2:
                state = cloned(reducer.state_dict())
        assert set(state) == {"local", "replicated", "meta"}
        expected = made[2:]
    reducer.close()
    for call in (lambda: reducer.begin_step(5), reducer.end_step, reducer.state_dict):
        with pytest.raises(CommError, match="was closed"):
            call()

    second, step = make(rank, *args, config=config, density=0.05)  # and without begin_step()
    with second:
        second.load_state_dict(state)
        assert frozen(second.state_dict()) == frozen(state)
        assert [step(3), step(4)] == expected
        second.load_resharded(lambda saved: state, 2)
        assert frozen(second.state_dict()) == frozen(state)
        with pytest.raises(CommStateMismatch, match="feedback = 'ef14'") as caught:
            second.load_state_dict({**state, "meta": {**state["meta"], "feedback": "ef14"}})
        assert caught.value.fix
        assert frozen(second.state_dict()) == frozen(state), "a state that is refused changes nothing"
        three = {**state, "meta": {**state["meta"], "world_size": 3}}
        if reshards:
            second.load_resharded(lambda saved: three, 3)
            assert second.state_dict()["meta"]["world_size"] == 2
            step(3)
        else:
            with pytest.raises(CommStateMismatch, match="of 3 ranks cannot be redistributed over 2 ranks") as caught:
                second.load_resharded(lambda saved: three, 3)
            assert "continue with 3 ranks" in caught.value.fix
            assert [step(3), step(4)] == expected


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def two_deepspeed_ranks() -> Iterator[Ranks]:
    ranks = Ranks(2, prepare=load_deepspeed)
    yield ranks
    ranks.close()


@pytest.mark.parametrize(("make", "reshards"), [(ddp, True), (fsdp, False)], ids=["ddp", "fsdp2"])
def test_reducers_share_one_interface(two_ranks: Ranks, make: Any, reshards: bool) -> None:
    two_ranks.run(conforms, make, (), reshards)


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize(("stage", "reshards"), [(0, True), (2, False)], ids=["whole gradients", "partitions"])
def test_deepspeed_reducers_share_it(two_deepspeed_ranks: Ranks, stage: int, reshards: bool) -> None:
    two_deepspeed_ranks.run(conforms, zero, (stage,), reshards)


def test_the_protocol_is_complete() -> None:
    public = {name for name in vars(Protocol) if not name.startswith("_")} | set(Protocol.__annotations__)
    assert public == {
        "config",
        "world_size",
        "begin_step",
        "end_step",
        "state_dict",
        "load_state_dict",
        "load_resharded",
        "checkpoint_parts",
        "load_parts",
        "kept",
        "close",
    }


def refused(rank: int) -> None:
    def message(act: Callable[[], object]) -> str:
        with pytest.raises(CommError) as caught:
            act()
        assert caught.value.fix
        return str(caught.value)

    wrapped = DistributedDataParallel(Toy())
    group: Any = wrapped.process_group
    assert "replicas does not apply to DistributedDataParallel" in message(
        lambda: outlast.comm.attach(wrapped, replicas=group)
    )
    sharded: nn.Module = Toy()
    fully_shard(sharded)
    assert "on_choice does not apply to FSDP2" in message(lambda: outlast.comm.attach(sharded, on_choice=print))
    assert "dense_direction does not apply to FSDP2" in message(
        lambda: outlast.comm.attach(sharded, dense_direction=outlast.comm.direction.Adam())
    )
    with outlast.comm.attach(sharded, target="gradient") as reducer:
        assert "cannot follow a loss scale under FSDP2" in message(lambda: reducer.begin_step(1, loss_scale=1024.0))
    assert "compressor = 'auto'" in message(lambda: outlast.comm.attach(sharded, compressor="auto"))


def test_what_does_not_apply_is_refused_by_name(two_ranks: Ranks) -> None:
    two_ranks.run(refused)


def steps_are_deepspeeds(rank: int) -> None:
    reducer, step = zero(rank, 2, config=CommConfig(**CONFIG))
    with reducer:
        step(1)
        with pytest.raises(CommError, match=r"begin_step\(1\), but the next step of the DeepSpeed engine is 2"):
            reducer.begin_step(1)
        with pytest.raises(CommError, match="cannot follow a loss scale under DeepSpeed"):
            reducer.begin_step(2, loss_scale=1024.0)
        engine: Any = reducer
        with pytest.raises(CommError, match="replicas does not apply to a DeepSpeed engine"):
            outlast.comm.attach(engine._engine, replicas=torch.distributed.group.WORLD)
        own = torch.optim.AdamW(engine._engine.module.parameters())
        with pytest.raises(CommError, match="optimizer does not apply to a DeepSpeed engine"):
            outlast.comm.attach(engine._engine, optimizer=own)


@pytest.mark.slow
@needs_deepspeed
def test_deepspeed_counts_its_steps_itself(two_deepspeed_ranks: Ranks) -> None:
    two_deepspeed_ranks.run(steps_are_deepspeeds)


@pytest.mark.parametrize("model", [Toy(), nn.Linear(2, 2), Tensor(), None], ids=lambda model: type(model).__name__)
def test_a_model_that_nothing_averages_is_refused(model: Any) -> None:
    with pytest.raises(CommError, match=f"gradients of a {type(model).__name__} yet") as caught:
        outlast.comm.attach(model)
    for way in ("DistributedDataParallel", "fully_shard", "deepspeed.initialize", "GradientReducer"):
        assert way in caught.value.fix


def test_settings_that_are_wrong_are_refused_before_anything_else() -> None:
    with pytest.raises(UnknownKey, match="did you mean 'density'"):
        outlast.comm.attach(None, densty=0.1)
    with pytest.raises(UnknownCompressor, match="did you mean 'topk'"):
        outlast.comm.attach(None, compressor="topq")
    with pytest.raises(OutOfRange, match=r"density = 2\.0"):
        outlast.comm.attach(None, CommConfig(), density=2.0)
