"""What is written is Zarr v3 that stock zarr reads, and what is read back is what was saved."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from outlast.checkpoint import (
    Checkpointer,
)
from outlast.checkpoint.format.dtypes import DISGUISED, NATIVE
from outlast.checkpoint.format.json_values import from_json, to_json
from outlast.checkpoint.format.names import decode_key, encode_key, parse_step
from outlast.checkpoint.tools import describe
from outlast.errors import CheckpointError
from tests.checkpoint.helpers import QUICK, checkpointer, save_steps
from tests.checkpoint.states import local, same, state

DTYPES = [*NATIVE, *DISGUISED]


def filled(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Any bits at all, NaN payloads included (0 and 1 for bool)."""
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    raw = torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape)


def round_trip(
    url: Path | str, replicated: dict[str, Any], own: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    with checkpointer(url) as saver:
        saver.save(3, replicated=replicated, local=own)
        back = saver.restore(3)
    assert back is not None
    return back.replicated, back.local


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stock_zarr_reads_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    shapes = [(), (1,), (7,), (3, 5), (2, 1, 4), (0,), (3, 0, 2)]
    tensors = {f"t{index}": filled(shape, dtype, index) for index, shape in enumerate(shapes)}
    back, _ = round_trip(tmp_path, {"model": tensors}, {})
    assert same(back["model"], tensors)
    group = zarr.open_group(str(tmp_path / "step_00000003"), mode="r")["model"]
    assert isinstance(group, zarr.Group)
    for name, tensor in tensors.items():
        array = group[name]
        assert isinstance(array, zarr.Array)
        assert array.attrs["outlast_dtype"] == str(dtype).removeprefix("torch.")
        values = np.asarray(array[...])
        assert values.shape == tuple(tensor.shape)
        stored = NATIVE.get(dtype) or DISGUISED[dtype]
        assert str(values.dtype) == stored
        assert values.tobytes() == tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_tensors_of_any_layout_and_natural_names(tmp_path: Path) -> None:
    base = torch.arange(60.0).reshape(3, 4, 5)
    tensors = {
        "blocks.0.attn.qkv.weight": base,
        "transposed": base.permute(2, 0, 1),
        "every second": base[:, ::2, 1::2],
        "expanded": torch.tensor([1.0, 2.0]).expand(3, 2),
        "a/b": base[1],
        "../up": base[0],
        "..": torch.tensor(1),
        "ungewöhnlich": torch.tensor([True, False]),
        "zarr.json": torch.ones(2),
        "c": torch.zeros(2),
        "100%": torch.ones(1),
        "conjugated": torch.tensor([1 + 2j]).conj(),
        "grad": torch.nn.Parameter(torch.ones(3)),
    }
    back, _ = round_trip(tmp_path, {"model": tensors}, {})
    assert all(same(back["model"][name], tensor.detach()) for name, tensor in tensors.items())
    step = zarr.open_group(str(tmp_path / "step_00000003"), mode="r")
    assert np.array_equal(np.asarray(step["model/blocks.0.attn.qkv.weight"][...]), base.numpy())
    model = step["model"]
    assert isinstance(model, zarr.Group)
    assert np.array_equal(np.asarray(model["a%2Fb"][...]), base[1].numpy())
    # The group lists as what it is; zarr warns of anything in it that is none of its own.
    assert {decode_key(name) for name, _ in model.members()} == set(tensors)


def test_values_are_attributes_of_their_group(tmp_path: Path) -> None:
    save_steps(tmp_path, 7)
    step = zarr.open_group(str(tmp_path / "step_00000007"), mode="r")
    assert step["scheduler"].attrs["last_step"] == 7
    assert step["data"].attrs["position"] == [7, 21]
    assert step.attrs["outlast"]["step"] == 7  # type: ignore[index,call-overload]
    told = describe(tmp_path)
    assert told.values["scheduler/worst"] == math.inf
    assert {(t.name, t.rank) for t in told.tensors} >= {("model/blocks.0.norm.bias", None), ("rng/cpu", 0)}


def test_reserved_names_at_the_top_are_told_apart(tmp_path: Path) -> None:
    replicated = {
        "votes": {"x": torch.ones(1)},
        "commit.json": {"y": 1},
        "rank_00000": {"z": torch.zeros(1)},
        "n": None,
    }
    back, own = round_trip(tmp_path, replicated, {"votes": {"w": torch.ones(2)}})
    assert same(back, replicated)
    assert same(own, {"votes": {"w": torch.ones(2)}})


def test_what_cannot_be_stored_is_refused_by_name(tmp_path: Path) -> None:
    with checkpointer(tmp_path) as saver:
        for bad, word in [
            ({"model": {"w": torch.ones(2).to_sparse()}}, "model/w"),
            ({"model": {"w": torch.empty(2, device="meta")}}, "model/w"),
            ({"model": {"w": torch.empty(2, dtype=torch.float8_e8m0fnu)}}, "model/w"),
            ({0: torch.ones(1)}, "the top"),
            ({"outlast": 3}, "reserved"),
        ]:
            with pytest.raises(CheckpointError) as error:
                saver.save(1, replicated=bad, local={})
            assert word in str(error.value)


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
keys = st.one_of(st.sampled_from(["a.b", "a/b", "..", ".", "c", "zarr.json", "__x", "~", "%2F", "weight", " "]), texts)
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5))
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(keys, inner, max_size=3)
    ),
    max_leaves=6,
)
tensors = st.builds(
    filled,
    st.lists(st.integers(0, 3), max_size=3).map(tuple),
    st.sampled_from(DTYPES),
    st.integers(0, 99),
)
numbered = st.dictionaries(st.integers(), tensors | st.dictionaries(keys, tensors | values, max_size=3), max_size=3)
trees = st.recursive(tensors | values | numbered, lambda inner: st.dictionaries(keys, inner, max_size=4), max_leaves=12)
states = st.dictionaries(keys, trees, max_size=4)


@hypothesis_settings(max_examples=60)
@given(replicated=states, own=states)
def test_any_nested_state_comes_back(replicated: dict[str, Any], own: dict[str, Any]) -> None:
    url = "memory://round-trip"
    saver = Checkpointer(url, QUICK, rank=0, world_size=1, attempt_id=f"{id(replicated)}", on_event=lambda event: None)
    with saver:
        saver._store.remove_tree("step_00000001")  # type: ignore[attr-defined]
        saver.save(1, replicated=replicated, local=own)
        back = saver.restore(1)
    assert back is not None
    assert same(back.replicated, replicated)
    assert same(back.local, own)


@given(values)
def test_json_values_are_exact(value: Any) -> None:
    assert same(from_json(to_json(value, "x")), value)


@given(keys)
def test_keys_become_one_safe_component(key: str) -> None:
    name = encode_key(key, at_root=True)
    assert decode_key(name) == key
    assert name.isascii()
    assert not set(name) & set('/\\*?[]{}:#&$!"<>|\0\n')
    assert name not in (".", "..", "zarr.json", "votes", "commit.json")
    assert not name.startswith(("__", "~"))


def test_step_names() -> None:
    assert parse_step("step_00000040") == 40
    assert parse_step("step_123456789012") == 123456789012
    assert parse_step("step_00000040.aside-1") is None


def test_restored_tensors_can_be_changed(tmp_path: Path) -> None:
    back, own = round_trip(tmp_path, state(3), local(3))
    back["model"]["blocks.0.attn.qkv.weight"].add_(1)
    own["rng"]["cpu"].zero_()
