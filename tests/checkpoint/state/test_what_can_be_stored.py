"""Every row of the table in docs/checkpointing.md: what is stored comes back exactly, with type and order; what is not
stored is refused by name."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import OrderedDict, defaultdict, deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from outlast.checkpoint.convert import export_step, import_step
from outlast.checkpoint.format.classes import Unloaded
from outlast.checkpoint.format.json_values import from_json, to_json
from outlast.checkpoint.tools import describe, diff, verify
from outlast.errors import CheckpointError, StateMismatch
from tests.checkpoint.helpers import checkpointer
from tests.checkpoint.state.storable import Colour, Moments, Phase, Priority
from tests.checkpoint.state.storable_rows import CHANGED, REFUSED, STORED
from tests.checkpoint.states import alike

DOCS = Path(__file__).parents[3] / "docs" / "checkpointing.md"


def rows() -> list[str]:
    section = DOCS.read_text().partition("## What can be stored\n")[2].partition("\n## ")[0]
    return [line.split("|")[1].strip() for line in section.splitlines() if line.startswith("|")][2:]


def test_the_table_is_what_is_tested() -> None:
    elsewhere = {"DTensors", "wrappers of tensors (`__tensor_flatten__`)", "tensors without memory of their own"}
    assert set(rows()) == {*STORED, *CHANGED, *REFUSED} | elsewhere


@pytest.mark.parametrize("pack_below_kb", [0, 64], ids=["files", "packed"])
@pytest.mark.parametrize("row", [*STORED, *CHANGED])
def test_what_is_stored_comes_back(tmp_path: Path, row: str, pack_below_kb: int) -> None:
    pairs = [(value, value) for value in STORED.get(row, ())] + CHANGED.get(row, [])
    values = [value for value, _ in pairs]
    state = {"row": {f"z{index}" if index % 2 else index: value for index, value in enumerate(values)}, "a": values}
    expected = [after for _, after in pairs]
    with checkpointer(tmp_path, pack_below_kb=pack_below_kb) as saver:
        saver.save(1, replicated=state, local={"own": {"deep": values}})
        back = saver.restore(1)
    assert back is not None
    assert [*back.replicated] == ["row", "a"]
    for found in (back.replicated["row"].values(), back.replicated["a"], back.local["own"]["deep"]):
        for index, (before, after) in enumerate(zip(expected, found, strict=True)):
            assert alike(before, after), (index, before, after)
    assert [*back.replicated["row"]] == [*state["row"]]
    assert verify(tmp_path).ok
    assert diff(tmp_path, tmp_path).equal
    assert describe(tmp_path).tensors or "ensor" not in row
    zarr.open_group(str(tmp_path / "step_00000001"), mode="r")["row"]  # stock Zarr opens it


@pytest.mark.parametrize("row", REFUSED)
def test_what_is_refused_is_named(tmp_path: Path, row: str) -> None:
    with checkpointer(tmp_path) as saver:
        for value, word in REFUSED[row]:
            for state in ({"part": {"name": value}}, {"part": {"name": [value, torch.ones(1)]}}):
                with pytest.raises(CheckpointError, match=word) as error:
                    saver.save(1, replicated=state)
                assert "'part/name" in str(error.value)
                with pytest.raises(CheckpointError, match=word):
                    saver.save(1, local=state)
        saver.save(2, replicated={"fine": {}})
    assert verify(tmp_path, 2).ok


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=3),
    st.complex_numbers(),
    st.sampled_from([Colour.RED, Priority.LOW, Phase.TRAIN, np.float32(0.5), np.int64(3)]),
)
hashable = st.recursive(scalars, lambda inner: st.lists(inner, max_size=2).map(tuple), max_leaves=3)
tensors = st.integers(0, 3).map(lambda size: torch.arange(size))


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    lists, pairs = st.lists(inner, max_size=3), st.dictionaries(hashable, inner, max_size=3)
    return st.one_of(
        lists,
        lists.map(tuple),
        lists.map(deque),
        pairs,
        pairs.map(OrderedDict),
        pairs.map(lambda d: defaultdict(int, d)),
        st.sets(hashable, max_size=2),
        st.builds(Moments, inner, inner),
    )


@settings(max_examples=60)
@given(st.dictionaries(st.text(min_size=1), st.recursive(scalars | tensors, containers, max_leaves=10), max_size=4))
def test_any_state_comes_back(state: dict[str, Any]) -> None:
    state.pop("outlast", None)
    with checkpointer("memory://any-state", attempt_id=str(id(state)), pack_below_kb=64) as saver:
        saver._store.remove_tree("step_00000001")
        saver.save(1, replicated=state, local={"own": state})
        back = saver.restore(1)
    assert back is not None
    assert alike(back.replicated, state)
    assert alike(back.local["own"], state)


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [3, 5, 5]),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),
        lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.5),
        lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.1, cycle_momentum=False),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o, [torch.optim.lr_scheduler.ConstantLR(o), torch.optim.lr_scheduler.MultiStepLR(o, [2])], [2]
        ),
    ],
)
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["float", "tensor"])
def test_schedulers_and_learning_rates_of_either_kind_go_on(tmp_path: Path, scheduler: Any, lr: Any) -> None:
    def make() -> tuple[nn.Module, torch.optim.Optimizer, Any]:
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr.clone() if isinstance(lr, torch.Tensor) else lr)
        return model, optimizer, scheduler(optimizer)

    def train(of: tuple[nn.Module, torch.optim.Optimizer, Any], steps: int) -> None:
        model, optimizer, schedule = of
        for step in range(steps):
            model(torch.full((4, 3), float(step))).sum().backward()
            optimizer.step()
            plateau = isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau)
            schedule.step(*([1.0] if plateau else []))
            optimizer.zero_grad()

    one, other = make(), make()
    train(one, 4)
    with checkpointer(tmp_path) as saver:
        saver.save(1, replicated={name: part.state_dict() for name, part in zip("mos", one, strict=True)})
        saver.wait_copied()
        back = saver.restore(1)
    assert back is not None
    for name, part in zip("mos", other, strict=True):
        assert alike(back.replicated[name], one["mos".index(name)].state_dict())
        part.load_state_dict(back.replicated[name])
    train(one, 4)
    train(other, 4)
    assert alike([p.detach() for p in one[0].parameters()], [p.detach() for p in other[0].parameters()])


def test_tensors_in_lists_are_restored_in_place(tmp_path: Path) -> None:
    saved = {"groups": [{"lr": torch.tensor(0.1), "w": [torch.ones(3), 5]}, {"lr": torch.tensor(0.2), "w": []}]}
    running = {"groups": [{"lr": torch.tensor(0.0), "w": [torch.zeros(3), 7]}, {"lr": torch.tensor(0.0), "w": []}]}
    with checkpointer(tmp_path) as saver:
        saver.save(1, replicated=saved)
        back = saver.restore(1, into=running)
    assert back is not None
    assert alike(back.replicated, saved)
    assert back.replicated["groups"][0]["w"][0] is running["groups"][0]["w"][0]


@pytest.mark.parametrize(
    "node",
    [
        {"outlast_type": "numpy.ndarray", "value": ["O", [1], "AAAAAAAAAAA="]},
        {"outlast_type": "numpy.ndarray", "value": ["<f8", [10**12], "AAAA"]},
        {"outlast_type": "numpy.scalar", "value": ["<f8", [2], "AAAAAAAAAAAAAAAAAAAAAA=="]},
        {"outlast_type": "torch.dtype", "value": "load"},
        {"outlast_type": "torch.device", "value": "no such"},
        {"outlast_type": "defaultdict", "factory": "eval", "items": {}},
        {"outlast_type": "OrderedDict", "items": {}, "attributes": {"items": 5}},
        {"outlast_type": "enum", "class": "tests.checkpoint.state.storable:Colour", "names": ["RED", "BLUE"]},
        {"outlast_type": "enum", "class": 5, "names": []},
        {"outlast_type": "namedtuple", "class": "os:stat_result", "fields": ["a"], "items": []},
        {"outlast_type": "set", "value": [[1]]},
        {"outlast_type": ["set"], "value": []},
        {"outlast_float": "one"},
    ],
)
def test_json_that_was_not_written_here_makes_nothing(node: Any) -> None:
    with pytest.raises((LookupError, TypeError, ValueError, RuntimeError)):
        from_json({"x": [node]}, stand_ins=True)


def test_a_class_is_found_only_where_the_program_has_imported_it() -> None:
    for name in ("os:system", "outlast.lazy:Rooms", "subprocess:Popen", "xmlrpc.client:Fault"):
        for kind in ("enum", "namedtuple"):
            node = {"outlast_type": kind, "class": name, "names": ["A"], "fields": ["a"], "items": [1]}
            stand_in = from_json(node, stand_ins=True)
            assert type(stand_in).__name__ == "Unloaded"
            assert to_json(stand_in, "x").items() <= node.items()
            with pytest.raises(CheckpointError, match=re.escape(name)):
                from_json(node)


def test_a_program_that_has_not_imported_a_class_is_told_so_and_tools_work(tmp_path: Path) -> None:
    (tmp_path / "palette.py").write_text(
        "from enum import Enum\nfrom typing import NamedTuple\n"
        "class Hue(Enum):\n    RED = 1\n"
        "class Dot(NamedTuple):\n    hue: Hue\n    w: object\n"
    )
    code = f"""
import sys, torch
sys.path.insert(0, {str(tmp_path)!r})
import palette
from tests.checkpoint.helpers import checkpointer
with checkpointer({str(tmp_path / "c")!r}) as saver:
    saver.save(1, replicated={{"x": {{"dot": palette.Dot(palette.Hue.RED, torch.ones(2)), "hue": palette.Hue.RED}}}})
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    url = tmp_path / "c"
    running = {"x": {"dot": {"w": torch.zeros(2)}}}
    with checkpointer(url) as reader:
        for how in ({}, {"into": running}, {"like": running}):
            with pytest.raises(StateMismatch, match=r"palette:(Dot|Hue).* not imported"):
                reader.restore("auto", **how)
    assert torch.equal(running["x"]["dot"]["w"], torch.zeros(2))
    assert "palette" not in sys.modules
    assert verify(url).ok
    assert diff(url, url).equal
    assert describe(url).values["x/hue"] == Unloaded("enum", "palette:Hue", ("RED",))
    export_step(url, tmp_path / "x.safetensors", "safetensors")
    import_step(tmp_path / "x.safetensors", tmp_path / "again", "safetensors")
    assert diff(url, tmp_path / "again").equal
    subprocess.run(
        [sys.executable, "-c", code.partition("with checkpointer")[0] + f"""
with checkpointer({str(tmp_path / "again")!r}) as reader:
    x = reader.restore("auto").replicated["x"]
    assert x["hue"] is palette.Hue.RED and type(x["dot"]) is palette.Dot and x["dot"].hue is palette.Hue.RED
    assert torch.equal(x["dot"].w, torch.ones(2))
"""],
        check=True,
        timeout=120,
    )  # fmt: skip
