"""How a backward pass, a reducer and a failure end: in bounded time, with DDP intact, and the culprit named to its
peers."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from outlast.comm import CommConfig, GradientReducer, attach
from outlast.errors import CommError, NonFiniteGradient
from tests.comm.ranks import Ranks
from tests.comm.toy import CONFIG, Toy, backward, estimates, gradients, wrap

SHORT_S = 20.0
"""More than any exchange here takes; whoever waits for a rank that left waits less."""


class Blocks(nn.Module):
    """Some of its blocks run again in backward, each in a backward of its own inside the outer one."""

    def __init__(self, reentrant: bool | None, placed: tuple[int, ...]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(24, 24), nn.Tanh()) for _ in range(4))
        self.reentrant = reentrant
        self.placed = placed

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            if self.reentrant is not None and index in self.placed:
                x = checkpoint(block, x, use_reentrant=self.reentrant)
            else:
                x = block(x)
        return x.square().mean()


def run_checkpointed(rank: int, comm: dict[str, Any], reentrant: bool | None, placed: tuple[int, ...]) -> Any:
    model = Blocks(reentrant, placed)
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.001, static_graph=False)
    settings = {**CONFIG, "density": 0.2, "dense_below": 1, "timeout_s": SHORT_S, **comm}
    scaled = settings.pop("scaled", False)
    reducer = attach(ddp, CommConfig(**settings))
    seen = []
    for step in range(1, 4):
        ddp.zero_grad()
        x = torch.randn(5, 24, generator=torch.Generator().manual_seed(10 * step + rank), requires_grad=True)
        reducer.begin_step(step, loss_scale=8.0 if scaled else None)
        (ddp(x) * (8.0 if scaled else 1.0)).backward()
        seen.append(estimates(model))
    collectives = reducer.end_step().collectives
    reducer.close()
    return seen, collectives


@pytest.mark.parametrize(
    "comm",
    [{"transport": "two-phase"}, {"ranks_per_node": 3}, {"feedback": "ef14", "scaled": True}, {"compressor": "dense"}],
    ids=["two-phase", "nodes", "scaled", "dense"],
)
def test_reentrant_checkpoints_give_the_same_bits(three_ranks: Ranks, comm: dict[str, Any]) -> None:
    plain = three_ranks.run(run_checkpointed, comm, None, ())
    assert plain[0][1] >= 4, "several buckets, or this test says nothing"
    # The last bucket's gradients come in an inner backward, in the outer one, or all in inner ones.
    for placed in ((0, 1, 2, 3), (1, 2), (0,)):
        assert three_ranks.run(run_checkpointed, comm, True, placed) == plain
    assert three_ranks.run(run_checkpointed, comm, False, (0, 1, 2, 3)) == plain


class Breaks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, here: bool) -> Tensor:
        ctx.here = here
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        if ctx.here:
            raise RuntimeError("a loader's cable fell out")
        return grad, None


class Breaking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(40, 40) for _ in range(4))

    def forward(self, x: Tensor, breaks: bool) -> Tensor:
        for index, block in enumerate(self.blocks):
            x = block(Breaks.apply(x, breaks) if index == 2 else x)
        return x.square().mean()


def run_broken_backward(rank: int, comm: dict[str, Any], ending: str) -> tuple[str, float]:
    ddp = DistributedDataParallel(Breaking(), bucket_cap_mb=0.001)
    settings = {**CONFIG, "dense_below": 1, "timeout_s": SHORT_S, **comm}
    reducer = attach(ddp, CommConfig(**settings))
    x = torch.randn(3, 40)
    for step in (1, 2):
        reducer.begin_step(step)
        ddp(x, False).backward()
    reducer.begin_step(3)
    loss = ddp(x, rank == 1)
    started = time.monotonic()
    if rank == 1:
        if ending == "with":
            with pytest.raises(RuntimeError, match="cable"), reducer:
                loss.backward()
        elif ending == "close":
            try:
                loss.backward()
            except RuntimeError:
                reducer.close()
        else:
            with pytest.raises(RuntimeError, match="cable"):
                loss.backward()
            with pytest.raises(CommError, match="step 3 ended before all of its gradients had come"):
                reducer.begin_step(4)
            with pytest.raises(CommError, match="step 3 failed"):
                reducer.state_dict()
            reducer.close()
        said = ""
    else:
        with pytest.raises(CommError) as caught:
            loss.backward()
        said = str(caught.value)
        reducer.close()
    seconds = time.monotonic() - started
    # The ranks' own group is whole: nothing was sent that its collectives could be mistaken for.
    total = torch.tensor([float(rank)])
    dist.all_reduce(total)
    assert float(total) == 3.0
    return said, seconds


@pytest.mark.parametrize("ending", ["close", "with", "next step"])
@pytest.mark.parametrize("comm", [{}, {"transport": "two-phase"}], ids=["all-gather", "two-phase"])
def test_a_rank_that_fails_alone_is_named_to_its_peers(three_ranks: Ranks, comm: dict[str, Any], ending: str) -> None:
    for rank, (said, seconds) in enumerate(three_ranks.run(run_broken_backward, comm, ending)):
        assert seconds < SHORT_S  # nobody waited for the limit
        if rank != 1:
            assert "rank 1 left the exchange" in said
            reason = "ended before all of its gradients had come" if ending == "next step" else "a loader's cable fell"
            assert reason in said


def run_leaving_between_steps(rank: int) -> str:
    """A rank whose loader raises between steps."""
    ddp, reducer = wrap({"timeout_s": SHORT_S}, cap_mb=0.01)
    for step in (1, 2):  # in the second forward DDP itself waits for all ranks, to rebuild its buckets
        backward(ddp, gradients(step, rank))
    if rank == 2:
        with pytest.raises(OSError, match="disk"), reducer:
            raise OSError("disk is gone")
        return ""
    with pytest.raises(CommError) as caught:
        backward(ddp, gradients(3, rank))
    reducer.close()
    return str(caught.value)


def test_a_rank_that_leaves_between_steps_is_named(three_ranks: Ranks) -> None:
    found = three_ranks.run(run_leaving_between_steps)
    assert all(
        "rank 2 left the exchange: it closed its reducer after OSError: disk is gone" in said for said in found[:2]
    )


def run_after_nan(rank: int, how: str) -> Any:
    """After a caught NonFiniteGradient the model goes on with a new reducer, and says so until then."""
    ddp, reducer = wrap({"feedback": "ef21", "timeout_s": SHORT_S}, cap_mb=0.01, view=how == "view")
    backward(ddp, gradients(1, rank))
    poisoned = gradients(2, rank)
    if rank == 1:
        poisoned["mid"][3, 4] = torch.nan
    with pytest.raises(NonFiniteGradient, match="gradient of mid on rank 1 holds NaN"):
        backward(ddp, poisoned)
    for step in (3, 4, 5):  # each says what has happened, and DDP never says it for us
        with pytest.raises(NonFiniteGradient, match=r"because step 2 failed: gradient of mid on rank 1") as caught:
            backward(ddp, gradients(step, rank))
        assert "attach() a new one" in caught.value.fix
    reducer.close()
    reducer = GradientReducer(ddp.module.named_parameters(), CommConfig(**CONFIG))
    reducer.attach(ddp)
    seen = []
    for step in (6, 7):
        backward(ddp, gradients(step, rank))
        seen.append(estimates(ddp.module))
    reducer.close()
    return seen


@pytest.mark.parametrize("how", ["copy", "view"])
def test_a_model_goes_on_after_a_nan(three_ranks: Ranks, how: str) -> None:
    found = three_ranks.run(run_after_nan, how)
    assert found[0] == found[1] == found[2]
    assert found[0] == three_ranks.run(run_fresh)[0]


def run_fresh(rank: int) -> Any:
    ddp, reducer = wrap({"feedback": "ef21"})
    seen = []
    for step in (6, 7):
        backward(ddp, gradients(step, rank))
        seen.append(estimates(ddp.module))
    reducer.close()
    return seen


def run_detached(rank: int) -> None:
    """close() gives DDP its own averaging back; another reducer may follow, at any time, but not beside."""
    ddp, reducer = wrap({"feedback": "ef14"}, cap_mb=0.01)
    with pytest.raises(CommError, match="averaged by another reducer"):
        attach(ddp)
    backward(ddp, gradients(1, rank))
    reducer.close()
    backward(ddp, gradients(2, rank))
    for name, p in ddp.module.named_parameters():
        mean = sum(gradients(2, r)[name] for r in range(3)) / 3
        torch.testing.assert_close(p.grad, mean)
    with attach(ddp, CommConfig(**CONFIG)) as again:
        backward(ddp, gradients(3, rank))
        assert again.end_step().wire_bytes > 0
    backward(ddp, gradients(4, rank))
    other = DistributedDataParallel(Toy())
    other.register_comm_hook(None, lambda state, bucket: None)
    with pytest.raises(CommError, match="communication hook already"):
        attach(other)


def test_a_model_can_be_had_back(three_ranks: Ranks) -> None:
    three_ranks.run(run_detached)
