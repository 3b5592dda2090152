"""States of any containers are taken apart and put together again without loss."""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter, OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from outlast.checkpoint.deepspeed.containers import SkeletonAndTensors, put_together, take_apart
from outlast.checkpoint.format.json_values import from_json, to_json
from outlast.checkpoint.format.kinds import kind_of_fields
from outlast.errors import CheckpointError
from tests.checkpoint.state.storable_rows import STORED
from tests.checkpoint.states import alike


class Scaler:
    """An object with attributes."""

    def __init__(self, scale: float) -> None:
        self.scale = scale


KINDS = (kind_of_fields("scaler", Scaler),)
CPU = torch.device("cpu")


def back(state: Any, stays: bool = True) -> Any:
    taken = take_apart(state, "state.pt", KINDS, lambda path, tensor: stays)
    skeleton = from_json(json.loads(json.dumps(to_json(taken.skeleton, ""), allow_nan=False)))
    return put_together(skeleton, taken.tensors, taken.changing, kinds=KINDS, device=CPU, where="state.pt")


def same(a: Any, b: Any) -> bool:
    """Type, order, attributes, bits."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return len(a) == len(b) and all(
            same(k, j) and same(v, w) for (k, v), (j, w) in zip(a.items(), b.items(), strict=True)
        )
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, Scaler):
        return same(vars(a), vars(b))
    return bool(a == b) or (a != a and b != b)


KEYS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    st.sampled_from(["outlast_kind", "outlast_float", "0", "(key)", "(empty)"]),
    st.integers(-2, 2),
    st.booleans(),
    st.none(),
    st.tuples(st.integers(0, 1), st.text("ab", max_size=1)),
)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    st.sampled_from([torch.bfloat16, torch.Size([2, 3]), torch.device("cpu"), frozenset({1, "a"}), {2, 3}]),
    st.builds(Scaler, st.floats()),
    st.integers(0, 4).map(lambda size: torch.arange(size).float()),
    st.just(torch.ones(2, dtype=torch.bfloat16)),
)


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    pairs = st.dictionaries(KEYS, inner, max_size=4)
    return st.one_of(st.lists(inner, max_size=3), st.lists(inner, max_size=3).map(tuple), pairs, pairs.map(OrderedDict))


@given(st.recursive(LEAVES, containers, max_leaves=12), st.booleans())
def test_what_comes_back_is_what_was_saved(state: Any, stays: bool) -> None:
    assert same(back(state, stays), state)


def test_attributes_parameters_and_sharing_come_back() -> None:
    model = nn.BatchNorm1d(3)
    module = model.state_dict()
    found = back({"module": module, "counts": Counter({3: 2}), "weight": nn.Parameter(torch.ones(2), False)})
    assert found["module"]._metadata == module._metadata  # type: ignore[attr-defined]
    assert found["counts"] == Counter({3: 2})
    assert type(found["weight"]) is nn.Parameter
    assert not found["weight"].requires_grad

    tied = torch.ones(5)
    found = back([tied, tied, tied[:2]])
    assert found[0] is found[1]
    assert found[2].data_ptr() == tied.data_ptr()


def test_tensors_lie_under_the_keys_that_lead_to_them() -> None:
    state = {"module": {"a.b": torch.ones(1)}, "groups": [{0: torch.zeros(1), "0": torch.zeros(2)}]}
    taken = take_apart(state, "f", KINDS, lambda path, tensor: path[0] == "module")
    assert list(taken.tensors["module"]) == ["a.b"]
    assert list(taken.changing["groups"]["0"]) == ["0", "0'"]


@pytest.mark.parametrize("row", STORED)
def test_whatever_other_states_hold_comes_back(row: str) -> None:
    for value in STORED[row]:
        assert alike(back({"value": value, "deep": [{"a": value}]}), {"value": value, "deep": [{"a": value}]})


def test_what_the_version_before_took_apart_is_put_together() -> None:
    def tensor(*at: str) -> dict[str, Any]:
        return {"outlast_kind": "tensor", "at": list(at), "changing": False}

    skeleton = {
        "module": {
            "outlast_kind": "OrderedDict",
            "items": {"w": tensor("module", "w")},
            "attributes": {"_metadata": {"outlast_kind": "OrderedDict", "items": {"": {"version": 1}}}},
        },
        "state": {
            "outlast_kind": "dict",
            "pairs": [[0, tensor("state", "0")], ["0", {"outlast_kind": "set", "value": [1]}]],
        },
        "size": {"outlast_kind": "torch.Size", "value": [2, 3]},
        "dtype": {"outlast_kind": "torch.dtype", "value": "bfloat16"},
        "device": {"outlast_kind": "torch.device", "value": "cpu"},
        "betas": {"outlast_kind": "tuple", "value": [0.9, math.inf]},
        "scaler": {"outlast_kind": "scaler", "value": {"scale": 2.0}},
    }
    tensors = {"module": {"w": torch.ones(2)}, "state": {"0": torch.zeros(1)}}
    found = put_together(skeleton, tensors, {}, kinds=KINDS, device=CPU, where="f")
    module = OrderedDict(w=torch.ones(2))
    module._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    assert same(found.pop("scaler"), Scaler(2.0))
    assert alike(
        found,
        {
            "module": module,
            "state": {0: torch.zeros(1), "0": {1}},
            "size": torch.Size([2, 3]),
            "dtype": torch.bfloat16,
            "device": CPU,
            "betas": (0.9, math.inf),
        },
    )


class Text(str):
    """No plain string."""


HOLDS_ITSELF: list[Any] = []
HOLDS_ITSELF.append(HOLDS_ITSELF)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"args": {"deep": [argparse.Namespace()]}}, "f: args/deep/0 is a argparse.Namespace"),
        ({"lr": Text("a")}, "f: lr is a .*Text"),
        ({"n": np.array([None])}, "f: n is a NumPy array of dtype object"),
        ({Text("k"): 1}, "Text"),
        ({"t": torch.ones(2).to_sparse()}, "f: t"),
        ({"t": torch.ones(2, device="meta")}, "meta"),
        (HOLDS_ITSELF, "contains itself"),
        (lambda: None, "f: the state is a builtins.function"),
        (math.inf.__class__, "builtins.type"),
    ],
)
def test_what_cannot_be_stored_is_named(state: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        take_apart(state, "f", KINDS, lambda path, tensor: True)


@pytest.mark.parametrize("kind", ["unheard-of", "tensor"])
def test_a_skeleton_that_does_not_fit_is_an_error(kind: str) -> None:
    taken = SkeletonAndTensors({"outlast_kind": kind, "value": 1, "at": ["a"], "changing": False}, {}, {})
    with pytest.raises(CheckpointError, match=r"unheard-of|is missing"):
        put_together(taken.skeleton, taken.tensors, taken.changing, kinds=(), device=CPU, where="f")
