"""Values that are not finite: which module, which parameter, which rank first; before they reach the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from outlast.diagnostics.numerics import NotFinite, NumericsConfig, NumericsEvent, NumericsWatch
from outlast.errors import NonFiniteGradient, TrainingDiverged


class Faulty(nn.Module):
    """A Linear whose output, or its gradient, can be spoiled."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.spoil: Callable[[Tensor], Tensor] = lambda x: x

    def forward(self, x: Tensor) -> Tensor:
        return self.spoil(self.linear(x))


class Net(nn.Module):
    """Blocks with random numbers and a buffer, and a loss inside."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Faulty(8) for _ in range(3))
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x).relu()
        return self.head(self.drop(self.norm(x))).square().mean()


class Root(torch.autograd.Function):
    """Finite forward, and a gradient of NaN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * torch.nan


def batch(rank: int = 0) -> Tensor:
    return torch.randn(16, 8, generator=torch.Generator().manual_seed(rank))


def watched(model: nn.Module, **settings: Any) -> tuple[NumericsWatch, torch.optim.Optimizer, list[NumericsEvent]]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    found: list[NumericsEvent] = []
    return NumericsWatch(model, optimizer, NumericsConfig(**settings), on_event=found.append), optimizer, found


def step(watch: NumericsWatch, model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    model(x).backward()
    optimizer.step()
    optimizer.zero_grad()
    watch.end_step()


def spoiled(value: float) -> Callable[[Tensor], Tensor]:
    def spoil(x: Tensor) -> Tensor:
        return x * torch.where(torch.arange(x.numel()).view_as(x) == 5, value, 1.0)

    return spoil


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_first_module_in_forward_order_is_named_and_nothing_is_updated(value: float) -> None:
    model = Net()
    watch, optimizer, found = watched(model)
    step(watch, model, optimizer, batch())
    assert found == []
    before = {name: one.clone() for name, one in model.state_dict().items()}
    model.blocks[1].spoil = spoiled(value)
    generator = torch.get_rng_state()
    with pytest.raises(TrainingDiverged) as caught:
        step(watch, model, optimizer, batch())
    assert "step 2: the gradient norm is nan; the parameters were not updated" in str(caught.value)
    assert "first module whose output is not finite is blocks.1 (Faulty), here: its inputs are finite" in str(
        caught.value
    )
    (event,) = found
    assert isinstance(event, NotFinite)
    assert (event.step, event.ranks, event.module, event.transient) == (2, (0,), "blocks.1", False)
    assert event.told in str(caught.value)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if "norm." not in name)
    # A forward was run again, and left no trace: one batch was counted, one mask drawn.
    assert int(after["norm.num_batches_tracked"]) == 2
    torch.set_rng_state(generator)
    model(batch())
    assert not any(module._forward_hooks for module in model.modules())
    watch.close()
    assert not model._forward_pre_hooks


def test_a_weight_that_is_not_finite_and_a_batch_that_is_not() -> None:
    model = Net()
    watch, optimizer, found = watched(model)
    with torch.no_grad():
        model.blocks[2].linear.bias[3] = torch.inf
    with pytest.raises(TrainingDiverged, match=r"blocks\.2\.linear \(Linear\).*and its own weights are not"):
        step(watch, model, optimizer, batch())
    model = Net()
    watch, optimizer, found = watched(model)
    with pytest.raises(TrainingDiverged, match=r"blocks\.0\.linear .*its inputs are not finite either"):
        step(watch, model, optimizer, batch() * torch.nan)
    assert len(found) == 1


def test_what_begins_in_backward_names_the_parameter() -> None:
    model = Net()
    watch, optimizer, found = watched(model)
    model.blocks[1].spoil = Root.apply
    with pytest.raises(TrainingDiverged) as caught:
        step(watch, model, optimizer, batch())
    said = "in backward the first gradient that is not is that of blocks.1.linear.bias, here"
    assert said in str(caught.value)
    assert "4 of 10 are not" in str(caught.value)  # weights and biases of the first two blocks
    assert [(one.module, one.parameter) for one in found if isinstance(one, NotFinite)] == [
        ("", "blocks.1.linear.bias")
    ]


def test_clipping_before_the_watch_looks_hides_no_cause() -> None:
    model = Net()
    _watch, optimizer, _ = watched(model)
    model.blocks[1].spoil = Root.apply
    model(batch()).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    with pytest.raises(TrainingDiverged) as caught:
        optimizer.step()
    assert "that of blocks.1.linear.bias, here" in str(caught.value)
    assert "none of 10 gradients is finite" in str(caught.value)


def test_a_fault_that_does_not_come_again_is_transient() -> None:
    model = Net()
    watch, optimizer, found = watched(model)
    calls: list[int] = []

    def once(x: Tensor) -> Tensor:
        calls.append(1)
        return x * torch.nan if len(calls) == 1 else x

    model.blocks[0].spoil = once
    with pytest.raises(TrainingDiverged, match=r"run again, are finite on this rank(.|\n)*test that node"):
        step(watch, model, optimizer, batch())
    assert isinstance(found[0], NotFinite)
    assert found[0].transient


def test_a_norm_that_overflows_names_the_largest_gradient() -> None:
    model = Net()
    _watch, optimizer, _ = watched(model, rerun_batches=0)
    model(batch()).backward()
    assert model.head.weight.grad is not None
    model.head.weight.grad.fill_(1e30)
    with pytest.raises(TrainingDiverged, match=r"all gradients are finite, and the square of that of head\.weight"):
        optimizer.step()


def test_the_micro_batch_is_named() -> None:
    model = Net()
    _watch, optimizer, _ = watched(model, rerun_batches=3)
    for x in (batch(0), batch(1), batch(2) * torch.inf, batch(3)):
        model(x).backward()
    with pytest.raises(TrainingDiverged, match=r"\(micro-batch 2\)"):  # of the newest three
        optimizer.step()


def test_evaluation_is_not_remembered_and_inputs_are_let_go() -> None:
    model = Net()
    watch, optimizer, found = watched(model)
    model.eval()
    with torch.no_grad():
        model(batch() * torch.nan)
    model.train()
    step(watch, model, optimizer, batch())
    assert found == []
    assert not watch._memory._calls


@pytest.mark.parametrize("fused", [False, True])
def test_an_overflow_that_a_scaler_searches_with_is_no_incident(*, fused: bool) -> None:
    model = nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    found: list[NumericsEvent] = []
    watch = NumericsWatch(model, optimizer, on_event=found.append)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    for _ in range(3):
        scaler.scale(model(torch.full((2, 4), 1e3)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        watch.end_step()
    assert scaler.get_scale() == 2.0**124
    assert found == []
    assert all(bool(torch.isfinite(one).all()) for one in model.parameters())


def test_after_the_update_it_is_told_one_step_late() -> None:
    model = Net()
    watch, optimizer, found = watched(model, not_finite="after_update")
    model.blocks[1].spoil = spoiled(float("nan"))
    step(watch, model, optimizer, batch())
    with pytest.raises(TrainingDiverged, match=r"step 1: .* which the parameters have been updated with"):
        step(watch, model, optimizer, batch())
    assert [one.step for one in found] == [1]


def test_off_is_off() -> None:
    model = Net()
    watch, optimizer, found = watched(model, not_finite="off")
    model.blocks[1].spoil = spoiled(float("nan"))
    step(watch, model, optimizer, batch())
    error = NonFiniteGradient("as it was")
    assert watch.explained(error) is error
    assert found == []


def test_an_error_of_compression_is_explained_and_stays_what_it_is() -> None:
    model = Net()
    watch, _, found = watched(model)
    model.blocks[2].spoil = spoiled(float("nan"))
    model(batch()).backward()
    error = watch.explained(NonFiniteGradient("gradient of head.bias on rank 0 holds NaN", "look"), 7)
    assert type(error) is NonFiniteGradient
    assert error.what.startswith("gradient of head.bias on rank 0 holds NaN; the first module")
    assert error.fix == "look"
    assert [one.step for one in found] == [7]


def test_a_loss_outside_of_the_model_is_not_taken_for_a_transient_fault() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))
    watch, optimizer, found = watched(model)
    (model(batch()) * 0).sqrt().mean().backward()
    with pytest.raises(TrainingDiverged) as caught:
        optimizer.step()
    assert "forward, run again, is finite on this rank: what happened came after it" in str(caught.value)
    assert "none of 4 gradients is finite" in str(caught.value)
    assert "test that node" not in str(caught.value)
    assert isinstance(found[0], NotFinite)
    assert not found[0].transient
    watch.close()


def test_a_loss_that_is_not_finite_with_gradients_that_are_is_told_once() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))
    watch, optimizer, found = watched(model)
    for number in range(1, 7):
        value = (model(batch()) * (-1 if number in (2, 3, 5) else 0) - 9 * (number in (2, 3, 5)) + 1).log().mean()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        watch.end_step(loss=value)
    assert [(one.step, one.told) for one in found] == [
        (step, "the loss of rank 0 is nan, and its gradients did not stop the update") for step in (2, 5)
    ]
    watch.close()
