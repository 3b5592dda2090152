"""What cannot be averaged is refused by name when a reducer is attached; what DDP hands over is checked; and the hook
works wherever torch calls it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from outlast.comm import CommConfig, GradientReducer, attach
from outlast.comm.ddp.checks import check_bucket
from outlast.errors import CommError
from tests.comm.ranks import Ranks

EXACT: dict[str, Any] = {"target": "gradient", "density": 1.0, "values": "fp32", "dense_below": 1}
"""With every entry sent as it is, an estimate is the mean."""


class Spectral(nn.Module):
    """A complex matrix, as in a spectral convolution, beside a real one."""

    def __init__(self, real: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        z = torch.randn(12, 12, dtype=torch.complex64)
        self.z = nn.Parameter(torch.view_as_real(z).clone() if real else z)
        self.w = nn.Parameter(torch.randn(12, 12))

    def forward(self, x: Tensor) -> Tensor:
        z = self.z if self.z.is_complex() else torch.view_as_complex(self.z)
        return (torch.fft.fft(x @ self.w) @ z).abs().square().mean()


def run_complex(rank: int) -> None:
    attempts: list[Callable[[], object]] = [
        lambda: attach(DistributedDataParallel(Spectral(real=False))),
        lambda: attach(fully_shard(Spectral(real=False))),
        lambda: GradientReducer(Spectral(real=False).named_parameters(), CommConfig()),
    ]
    for attempt in attempts:
        with pytest.raises(CommError, match=r"'(module\.)?z' is complex \(torch.complex64\)") as caught:
            attempt()
        assert "view_as_real" in caught.value.fix
    frozen = Spectral(real=False)
    frozen.z.requires_grad_(False)
    attach(DistributedDataParallel(frozen)).close()
    # What the error says to do is right.
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(rank))
    means = []
    for compressed in (True, False):
        model = Spectral(real=True)
        ddp = DistributedDataParallel(model)
        if compressed:
            reducer = attach(ddp, CommConfig(**EXACT))
        ddp(x).backward()
        means.append([p.grad for p in model.parameters()])
    reducer.close()
    for ours, theirs in zip(*means, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_complex_parameters(three_ranks: Ranks) -> None:
    three_ranks.run(run_complex)


def run_sparse(rank: int) -> None:
    for layer in (nn.Embedding(50, 8, sparse=True), nn.EmbeddingBag(50, 8, sparse=True, mode="sum")):
        for wrapped in (DistributedDataParallel, fully_shard):
            with pytest.raises(CommError, match="makes sparse gradients") as caught:
                attach(wrapped(nn.Sequential(layer)))
            assert "sparse=False" in caught.value.fix
            layer = type(layer)(50, 8, sparse=True)
    table = nn.Parameter(torch.ones(50, 8))
    reducer = GradientReducer([("table", table)], CommConfig(**EXACT))
    F.embedding(torch.tensor([1, 2]), table, sparse=True).sum().backward()
    with pytest.raises(CommError, match="gradient of 'table' is sparse"):
        reducer.reduce()
    table.grad = None
    F.embedding(torch.tensor([rank]), table).sum().backward()
    reducer.reduce()  # nothing was lost by the refusal
    assert table.grad is not None
    assert table.grad[:, 0].tolist() == pytest.approx([1 / 3] * 3 + [0.0] * 47)
    reducer.close()


def test_sparse_gradients(three_ranks: Ranks) -> None:
    three_ranks.run(run_sparse)


class Laid:
    """A bucket as DDP could lay it out, but does not."""

    def __init__(self, buffer: Tensor, grads: list[Tensor]) -> None:
        self._buffer, self._grads = buffer, grads

    def index(self) -> int:
        return 0

    def is_last(self) -> bool:
        return True

    def buffer(self) -> Tensor:
        return self._buffer

    def gradients(self) -> list[Tensor]:
        return self._grads

    def parameters(self) -> list[Tensor]:
        return self._grads


def test_gradients_cover_their_bucket() -> None:
    x = torch.arange(24.0)
    names = ["a", "b"]
    whole = [
        [x[:12].view(3, 4), x[12:]],
        [x[12:], x[:12]],  # in another order
        [x[:12].view(2, 2, 3).permute(2, 0, 1), x[12:]],  # as in channels-last
        [x, x[24:]],  # without entries
    ]
    for grads in whole:
        check_bucket(Laid(x, grads), names)
    wrong: list[tuple[list[Tensor], str]] = [
        ([x[:11], x[12:]], "'b'.*is not the next piece"),  # a gap
        ([x[:13], x[12:]], "'b'.*is not the next piece"),  # an overlap
        ([x[1:13], x[13:]], "'a'.*is not the next piece"),  # begins late
        ([x[:12], x[12:20]], "take 80 bytes, the bucket has 96"),  # ends early
        ([x[:12], x[12:].view(torch.complex64)], "'b'.*torch.complex64"),  # another type, with half as many entries
        ([x[:12], x[12:].view(torch.int32)], "'b'.*torch.int32"),
        ([x[:12], torch.zeros(12)], "'b'.*is not the next piece|'a'.*is not the next piece"),  # not in it
        ([x[0:24:2], x[1:24:2]], "'a'.*is not the next piece"),  # strided
        ([x[:12], x[:12]], "'b'.*is not the next piece"),  # twice the same
    ]
    for grads, said in wrong:
        with pytest.raises(CommError, match=said):
            check_bucket(Laid(x, grads), names)
    with pytest.raises(CommError, match="gradient of 'a' is sparse"):
        check_bucket(Laid(torch.eye(3).to_sparse(), [torch.eye(3).to_sparse()]), names)


def run_layouts(rank: int) -> None:
    """Layouts that DDP does have: channels-last, two types, a scalar, an empty parameter."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.scale = nn.Parameter(torch.tensor(2.0))
    model.none = nn.Parameter(torch.zeros(0, 5))
    model.wide = nn.Parameter(torch.ones(20, 20, dtype=torch.float64))
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True, bucket_cap_mb=0.001)
    reducer = attach(ddp, CommConfig(**EXACT))
    x = torch.full((2, 3, 9, 9), float(rank + 1)).to(memory_format=torch.channels_last)
    for _ in range(3):
        ddp.zero_grad()
        loss = ddp(x).sum() * model.scale + model.none.sum() + (model.wide * (rank + 1)).sum()
        loss.backward()
    assert model.wide.grad is not None
    assert torch.equal(model.wide.grad, torch.full((20, 20), 2.0, dtype=torch.float64))
    mean = 2 * torch.nn.grad.conv2d_weight(  # of the last layer, whose input is linear in the rank
        sum((r + 1) / 3 * model[0](x / (rank + 1)) for r in range(3))
        if model[0].bias is None
        else model[0](x * 2 / (rank + 1)),
        model[1].weight.shape,
        torch.ones(2, 4, 5, 5),
    )
    torch.testing.assert_close(model[1].weight.grad, mean, rtol=1e-3, atol=1e-3)
    reducer.close()


def test_layouts_that_occur(three_ranks: Ranks) -> None:
    three_ranks.run(run_layouts)


def run_settings(rank: int) -> None:
    small = nn.Linear(4, 4)
    made: list[tuple[Callable[[], DistributedDataParallel], str]] = [
        (lambda: DistributedDataParallel(small, skip_all_reduce_unused_params=True), "skip_all_reduce_unused_params"),
        (
            lambda: DistributedDataParallel(
                small,
                delay_all_reduce_named_params=[("bias", small.bias)],
                param_to_hook_all_reduce=small.weight,
            ),
            "delay_all_reduce_named_params",
        ),
    ]
    for make, said in made:
        with pytest.raises(CommError, match=said):
            attach(make())
    before = torch._dynamo.config.optimize_ddp
    torch._dynamo.config.optimize_ddp = "python_reducer"  # type: ignore[assignment]
    try:
        with pytest.raises(CommError, match="python_reducer") as caught:
            attach(DistributedDataParallel(nn.Linear(4, 4)))
    finally:
        torch._dynamo.config.optimize_ddp = before
    assert "ddp_optimizer" in caught.value.fix


def test_settings_that_bypass_the_hook(three_ranks: Ranks) -> None:
    three_ranks.run(run_settings)


def run_join(rank: int, comm: dict[str, Any], names: bool, unused: bool) -> None:
    """Rank r has 3 + 2r inputs. An estimate is DDP's own mean: zeros for the ranks that have run out."""
    finals = []
    for compressed in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 10))
        ddp = DistributedDataParallel(model, bucket_cap_mb=0.0005, find_unused_parameters=unused)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        if compressed:
            reducer = attach(ddp, CommConfig(**{**EXACT, "timeout_s": 30.0, **comm}))
        with ddp.join():
            for step in range(1, 4 + 2 * rank):
                x = torch.randn(4, 10, generator=torch.Generator().manual_seed(10 * step + rank))
                optimizer.zero_grad()
                if compressed and names:
                    reducer.begin_step(step)
                ddp(x).square().mean().backward()
                optimizer.step()
        finals.append([p.detach().clone() for p in model.parameters()])
    reducer.close()
    for ours, theirs in zip(*finals, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("comm", "names", "unused"),
    [
        ({"feedback": "ef14"}, False, False),
        ({"feedback": "ef21", "transport": "two-phase", "warmup_steps": 4}, True, False),
        ({"feedback": "ef21", "resync_every_steps": 2}, False, True),
        ({"compressor": "dense"}, True, False),
    ],
    ids=["ef14", "two-phase", "unused", "dense"],
)
def test_uneven_inputs(three_ranks: Ranks, comm: dict[str, Any], names: bool, unused: bool) -> None:
    three_ranks.run(run_join, comm, names, unused)


def run_other_divisor(rank: int) -> None:
    ddp = DistributedDataParallel(nn.Linear(8, 8))
    reducer = attach(ddp, CommConfig(**EXACT))
    with ddp.join(divide_by_initial_world_size=False):
        loss = ddp(torch.ones(2, 8)).sum()
        with pytest.raises(CommError, match="divide_by_initial_world_size=False"):
            loss.backward()
    reducer.close()


def test_another_divisor_is_refused(three_ranks: Ranks) -> None:
    three_ranks.run(run_other_divisor)


class Branch(nn.Module):
    """With a layer that no step uses."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12))
        self.unused = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.used(x)
        return y


@pytest.fixture(scope="module")
def compiling_ranks() -> Iterator[Ranks]:
    """Three that have never set ``optimize_ddp = "python_reducer"``: torch then traces into DDP for good, and breaks
    its own ``_DDPSink``, with a hook or without one."""
    ranks = Ranks(3)
    yield ranks
    ranks.close()


def run_compiled(rank: int, mode: str, unused: bool) -> None:
    """Under torch.compile, with compiled autograd too, the hook gets what it gets without."""
    x = torch.randn(4, 12, generator=torch.Generator().manual_seed(rank))
    means = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = Branch() if unused else Branch().used
        ddp = DistributedDataParallel(model, find_unused_parameters=unused)
        reducer = attach(ddp, CommConfig(**EXACT, feedback="ef21"))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        run = torch.compile(ddp, backend="aot_eager") if compiled else ddp
        with torch._dynamo.config.patch(compiled_autograd=compiled and mode == "autograd"):
            for _ in range(2):
                optimizer.zero_grad()
                run(x).square().mean().backward()
                optimizer.step()
        means.append([p.grad for p in model.parameters()])
        reducer.close()
    for ours, theirs in zip(*means, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("unused", [False, True], ids=["all used", "one unused"])
@pytest.mark.parametrize("mode", ["graph", "autograd"])
def test_compiled(compiling_ranks: Ranks, mode: str, unused: bool) -> None:
    compiling_ranks.run(run_compiled, mode, unused)
