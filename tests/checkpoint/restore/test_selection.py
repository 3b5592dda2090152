"""A step whose tensors are not those of the running state: refused with the argument that helps, which does help."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from outlast.checkpoint import Mismatch, Restored, load
from outlast.errors import CheckpointError, StateMismatch
from tests.checkpoint.helpers import checkpointer
from tests.checkpoint.states import same

PACKED = pytest.mark.parametrize("pack_below_kb", [0, 16], ids=["files", "packed"])


class Net(nn.Module):
    def __init__(self, classes: int = 3, seed: int = 1) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8))
        self.head = nn.Linear(8, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(self.body(x))
        return y


def save(url: Path, state: dict[str, Any], **settings: Any) -> None:
    with checkpointer(url, **settings) as saver:
        saver.save(1, replicated=state, local={"rank": 0})


def restored(url: Path, how: str, **arguments: Any) -> Restored:
    """By either way in, which take the same arguments."""
    if how == "load":
        return load(url, **arguments)
    with checkpointer(url, attempt_id="two") as reader:
        back = reader.restore("auto", **arguments)
    assert back is not None
    return back


def refused(url: Path, **arguments: Any) -> str:
    with pytest.raises(StateMismatch) as error:
        load(url, **arguments)
    return str(error.value)


def kinds(back: Restored) -> dict[str, str]:
    return {mismatch.name: mismatch.kind for mismatch in back.not_taken}


@PACKED
@pytest.mark.parametrize("how", ["load", "restore"])
def test_a_changed_head(tmp_path: Path, how: str, pack_below_kb: float) -> None:
    old, new = Net(3), Net(5, seed=2)
    save(tmp_path, {"model": old.state_dict() | {"old.bias": torch.ones(2)}}, pack_below_kb=pack_below_kb)
    into = {"model": new.state_dict() | {"new.bias": torch.zeros(7)}}
    head = new.head.weight.detach().clone()
    said = refused(tmp_path, into=into)
    assert "model/head.weight: (3, 8) torch.float32 in the checkpoint, (5, 8)" in said
    assert "pass strict=False" in said
    back = restored(tmp_path, how, into=into, strict=False)
    assert kinds(back) == {
        "model/head.bias": "shape",
        "model/head.weight": "shape",
        "model/new.bias": "missing",
        "model/old.bias": "unexpected",
    }
    (first, *_) = back.not_taken
    assert isinstance(first, Mismatch)
    assert (first.saved, first.running) == (((3,), torch.float32), ((5,), torch.float32))
    assert same(new.body.state_dict(), old.body.state_dict())
    assert torch.equal(new.head.weight, head)
    assert sorted(back.replicated["model"]) == sorted(f"body.{name}" for name in old.body.state_dict())
    assert not back.as_saved


def test_strict_below_some_keys(tmp_path: Path) -> None:
    save(tmp_path, {"model": Net(3).state_dict(), "extra": {"ema": torch.ones(2)}})
    model = Net(3, seed=2)
    back = load(tmp_path, into={"model": model.state_dict(), "extra": {"other": torch.ones(1)}}, strict=("model",))
    assert kinds(back) == {"extra/ema": "unexpected", "extra/other": "missing"}
    assert same(model.state_dict(), Net(3).state_dict())
    assert "model/head.bias" in refused(tmp_path, into={"model": Net(5).state_dict()}, strict=("model",))


def test_a_part_alone(tmp_path: Path) -> None:
    save(tmp_path, {"model": Net().state_dict(), "optimizer": {"m": torch.ones(3)}, "epoch": 7})
    said = refused(tmp_path, into={"model": Net(seed=2).state_dict()})
    assert "optimizer/m: in the checkpoint, not in the running state" in said
    assert "pass parts=('model',)" in said
    model = Net(seed=2)
    back = load(tmp_path, into={"model": model.state_dict()}, parts=("model",))
    assert same(model.state_dict(), Net().state_dict())
    assert list(back.replicated) == ["model"]
    assert load(tmp_path, parts=("epoch",)).replicated == {"epoch": 7}


def test_a_part_that_the_checkpoint_lacks(tmp_path: Path) -> None:
    save(tmp_path, {"model": Net().state_dict()})
    model = Net(seed=2)
    state = {"model": model.state_dict(), "optimizer": {"m": torch.ones(3)}}
    assert "the checkpoint has no 'optimizer': pass a state without it, or strict=('model',)" in refused(
        tmp_path, into=state
    )
    assert kinds(load(tmp_path, into=state, strict=("model",))) == {"optimizer/m": "missing"}
    assert same(model.state_dict(), Net().state_dict())


@PACKED
@pytest.mark.parametrize("how", ["load", "restore"])
@pytest.mark.parametrize(
    ("saved", "running"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float64, torch.float16)],
)
def test_another_precision(
    tmp_path: Path, how: str, saved: torch.dtype, running: torch.dtype, pack_below_kb: float
) -> None:
    state = {"model": {"w": torch.randn(33, 7).to(saved), "n": torch.tensor(3)}}
    save(tmp_path, state, pack_below_kb=pack_below_kb, chunk_mb=0.0002)
    like = {"model": {"w": torch.zeros(33, 7, dtype=running), "n": torch.tensor(0)}}
    said = refused(tmp_path, like=like)
    assert f"model/w: (33, 7) {saved} in the checkpoint, (33, 7) {running} in the running state" in said
    assert "pass cast=True" in said
    expected = {"w": state["model"]["w"].to(running), "n": torch.tensor(3)}
    assert same(dict(restored(tmp_path, how, like=like, cast=True).replicated["model"]), expected)
    restored(tmp_path, how, into=like, cast=True)
    assert same(like["model"], expected)
    assert same(dict(restored(tmp_path, how, cast=running).replicated["model"]), expected)


def test_what_is_never_converted(tmp_path: Path) -> None:
    save(tmp_path, {"model": {"w": torch.tensor([1.0, 1e30]), "n": torch.tensor([3])}})
    for like in ({"w": torch.zeros(2), "n": torch.zeros(1)}, {"w": torch.zeros(2, dtype=torch.complex64)}):
        refused(tmp_path, like={"model": like}, cast=True)
    said = refused(tmp_path, cast=torch.float16)
    assert "'model/w' has elements that torch.float16 cannot hold, 1.0000000150474662e+30 for example" in said
    assert load(tmp_path, cast=torch.bfloat16).replicated["model"]["n"].dtype == torch.int64
    save(tmp_path / "inf", {"model": {"w": torch.tensor([math.inf, math.nan, 2.0])}})
    found = load(tmp_path / "inf", cast=torch.float16).replicated["model"]["w"]
    assert found.isinf().tolist() == [True, False, False]


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("saved", ["plain", "compiled", "checkpointed", "both"])
@pytest.mark.parametrize("running", ["plain", "compiled", "checkpointed", "both"])
def test_names_are_the_same_under_wrappers(tmp_path: Path, saved: str, running: str) -> None:
    def wrapped(how: str, seed: int) -> nn.Module:
        net = Net(seed=seed)
        if how in ("checkpointed", "both"):
            net.body[0] = checkpoint_wrapper(net.body[0])
        return torch.compile(net) if how in ("compiled", "both") else net  # type: ignore[return-value]

    def state(module: nn.Module) -> dict[str, Any]:
        return {"model": dict(module.named_parameters())}

    old, new = wrapped(saved, 1), wrapped(running, 2)
    save(tmp_path, state(old))
    back = load(tmp_path, into=state(new))
    assert sorted(back.replicated["model"]) == sorted(dict(new.named_parameters()))
    for one, other in zip(old.parameters(), new.parameters(), strict=True):
        assert torch.equal(one, other)
    plain = load(tmp_path, rename="unwrapped").replicated["model"]
    assert sorted(plain) == sorted(dict(Net().named_parameters()))


def test_optimizer_state_under_a_wrapper_moves_with_its_values(tmp_path: Path) -> None:
    saved = {"state": {"_orig_mod.w": {"m": torch.ones(2), "since": 5}, "b": {"m": torch.zeros(1)}}, "lr": 0.1}
    save(tmp_path, {"optimizer": saved})
    like = {"optimizer": {"state": {"w": {"m": torch.zeros(2)}, "b": {"m": torch.ones(1)}}}}
    back = load(tmp_path, like=like).replicated["optimizer"]
    assert back["lr"] == 0.1
    assert sorted(back["state"]) == ["b", "w"]
    assert same(dict(back["state"]["w"]), {"m": torch.ones(2), "since": 5})


def test_who_is_whose_is_not_guessed(tmp_path: Path) -> None:
    save(tmp_path, {"model": {"module.w": torch.ones(1), "_orig_mod.w": torch.zeros(1)}})
    said = refused(tmp_path, like={"model": {"w": torch.ones(1)}})
    assert "model/w: in the running state, not in the checkpoint" in said
    # A module of that name inside is somebody's own.
    save(tmp_path / "inner", {"model": {"body.module.w": torch.ones(1)}})
    refused(tmp_path / "inner", like={"model": {"body.w": torch.ones(1)}})


@PACKED
@pytest.mark.parametrize("how", ["load", "restore"])
def test_other_names(tmp_path: Path, how: str, pack_below_kb: float) -> None:
    save(tmp_path, {"model": Net().state_dict(), "step": 3}, pack_below_kb=pack_below_kb)
    new = Net(seed=2)
    into = {"model": {name.replace("body.", "encoder.layers."): t for name, t in new.state_dict().items()}}
    said = refused(tmp_path, into=into)
    assert "pass rename={'model/body.': 'model/encoder.layers.'}" in said
    back = restored(tmp_path, how, into=into, rename={"model/body.": "model/encoder.layers."})
    assert same(new.state_dict(), Net().state_dict())
    assert back.replicated["step"] == 3
    assert sorted(back.replicated["model"]) == sorted(into["model"])

    def without_head(name: str) -> str | None:
        return None if "/head." in name else name.replace("model/body", "model/trunk")

    found = restored(tmp_path, how, rename=without_head).replicated
    assert sorted(found["model"]) == ["trunk.0.bias", "trunk.0.weight", "trunk.1.bias", "trunk.1.weight"]
    assert restored(tmp_path, how, rename={"model": "teacher"}).replicated.keys() == {"teacher", "step"}


def test_renaming_is_by_whole_names(tmp_path: Path) -> None:
    save(tmp_path, {"model": {"w": torch.ones(1), "w2": torch.zeros(1)}, "state": {5: torch.ones(2)}})
    back = load(tmp_path, rename={"model/w": "model/v", "state": "held/state"})
    assert same(back.replicated["model"], {"w2": torch.zeros(1), "v": torch.ones(1)})
    assert torch.equal(back.replicated["held"]["state"]["5"], torch.ones(2))
    with pytest.raises(StateMismatch, match="'model/w' and 'model/w2' of the checkpoint would both become 'model/w2'"):
        load(tmp_path, rename={"model/w": "model/w2"})
    with pytest.raises(CheckpointError, match=r"rename\('.*'\) returned 5"):
        load(tmp_path, rename=lambda name: 5)  # type: ignore[arg-type, return-value]


def test_integers_stay_integers(tmp_path: Path) -> None:
    save(tmp_path, {"a": {"state": {5: {"m": torch.ones(2)}}}})
    back = load(tmp_path, rename={"a": "b"})
    assert list(back.replicated["b"]["state"]) == [5]


def adam(model: nn.Module, *unused: str) -> tuple[torch.optim.Optimizer, dict[str, Any]]:
    """An optimizer after a step in which some parameters had no gradient, and its state by name."""
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 4)).sum().backward()
    for name, parameter in model.named_parameters():
        if name in unused:
            parameter.grad = None
    optimizer.step()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return optimizer, {names[id(parameter)]: state for parameter, state in optimizer.state.items()}


def test_a_parameter_that_never_had_a_gradient(tmp_path: Path) -> None:
    old, new = Net(), Net(seed=2)
    _, state = adam(old, "head.bias")
    save(tmp_path, {"model": old.state_dict(), "optimizer": {"state": state, "lr": 0.1}})
    _, running = adam(new)
    like = {"model": new.state_dict(), "optimizer": {"state": running}}
    said = refused(tmp_path, like=like)
    assert "optimizer/state/head.bias/exp_avg: in the running state, not in the checkpoint" in said
    assert "never had a gradient" in said
    assert "pass strict=('model',)" in said
    back = load(tmp_path, like=like, strict=("model",))
    assert {mismatch.name.split("/")[2] for mismatch in back.not_taken} == {"head.bias"}
    assert same(dict(back.replicated["optimizer"]["state"]), state)
    # The other way round: what is frozen now.
    save(tmp_path / "all", like)
    fewer = {"model": old.state_dict(), "optimizer": {"state": state}}
    said = refused(tmp_path / "all", like=fewer)
    assert "the running optimizer has no state of these parameters" in said
    back = load(tmp_path / "all", like=fewer, strict=("model",))
    assert set(kinds(back).values()) == {"unexpected"}
    assert "head.bias" not in back.replicated["optimizer"]["state"]


def test_an_optimizer_that_has_no_state_yet(tmp_path: Path) -> None:
    model = Net()
    _, state = adam(model)
    save(tmp_path, {"model": model.state_dict(), "optimizer": {"state": state}})
    said = refused(tmp_path, like={"model": model.state_dict(), "optimizer": {"state": {}}})
    assert "pass parts=('model',)" in said
    assert "its state must be there first: torch.distributed.checkpoint.state_dict.get_state_dict makes it" in said
    some = {"state": {}, "ema": {"w": torch.ones(1)}}
    save(tmp_path / "ema", {"model": model.state_dict(), "optimizer": {"state": state, "ema": some["ema"]}})
    said = refused(tmp_path / "ema", like={"model": model.state_dict(), "optimizer": some})
    assert "the running optimizer has no state yet, which must be there first" in said


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"parts": "model"}, r"parts=\('model',\)"),
        ({"parts": ()}, "parts is empty"),
        ({"strict": "model"}, r"strict=\('model',\)"),
        ({"rename": 3}, "pass a mapping of names"),
        ({"cast": True}, r"pass a torch\.dtype"),
        ({"cast": torch.int32}, "pass a floating-point type"),
        ({"cast": "bfloat16"}, r"pass True, False or a floating-point torch\.dtype"),
        ({"cast": torch.float32, "like": {"model": {}}}, "pass cast=True"),
    ],
)
def test_arguments_that_mean_nothing(tmp_path: Path, wrong: dict[str, Any], said: str) -> None:
    save(tmp_path, {"model": {"w": torch.ones(1)}})
    with pytest.raises(CheckpointError, match=said):
        load(tmp_path, **wrong)


def test_a_state_in_part_is_not_copied_back_into_memory(tmp_path: Path) -> None:
    """The copy that a restore makes where memory was lost would be committed as the step."""
    settings: dict[str, Any] = {"memory_every_steps": 1}
    state = {"model": Net().state_dict(), "optimizer": {"m": torch.ones(3)}}
    with checkpointer(tmp_path, **settings) as saver:
        saver.save(1, replicated=state, local={"rank": 0})
    with checkpointer(tmp_path, attempt_id="two", **settings) as reader:
        back = reader.restore("auto", parts=("model",))
        assert back is not None
        again = reader.restore("auto")
        assert again is not None
        assert same(dict(again.replicated["optimizer"]), state["optimizer"])
