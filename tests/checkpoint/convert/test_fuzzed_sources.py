"""Sources changed at random, with right checksums: imported as a step that verifies, or refused by an error of ours."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import struct
import zipfile
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from outlast.checkpoint.convert import import_step
from outlast.checkpoint.convert.pickle_reader import Maker, PickleReader
from outlast.checkpoint.tools import verify
from outlast.errors import CheckpointError
from tests.checkpoint.convert.hostile import archive, little_memory, safetensors_file
from tests.checkpoint.convert.test_hostile_sources import described
from tests.checkpoint.converting import needs_safetensors
from tests.checkpoint.forging import REMOVED, places_in, put_at

EXAMPLES = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
KEYS = (
    st.none() | st.booleans() | st.integers(-(1 << 63), 1 << 63) | st.floats(allow_nan=False) | st.text() | st.binary()
)
VALUES = st.recursive(
    KEYS | st.integers(-(1 << 2000), 1 << 2000),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=4)
        | st.sets(KEYS, max_size=4)
    ),
    max_leaves=20,
)


def find(module: str, name: str) -> Any:
    if module in ("__builtin__", "builtins") and name in ("set", "bytes"):
        return Maker(name, {"set": set, "bytes": bytes}[name])
    if (module, name) == ("_codecs", "encode"):
        return Maker(name, lambda text, encoding: text.encode(encoding))
    raise CheckpointError(f"refused: {module}.{name}")


@settings(max_examples=80, deadline=None)
@given(VALUES, st.integers(2, pickle.HIGHEST_PROTOCOL))
def test_plain_values_are_read_as_python_reads_them(value: Any, protocol: int) -> None:
    data = pickle.dumps(value, protocol)
    assert PickleReader(data, "a pickle", find).read() == value


PIECES = [*(bytes([op]) for op in b"N)]}(.a0bseutcRhjqr2QoiXUBCJKMGIL\x80\x81\x82\x85\x86\x87\x88\x89\x8a\x8b\x8c\x8d")]
PIECES += [b"\x8e\x8f", b"\x90", b"\x91", b"\x93", b"\x94", b"\x95", b"\x96", b"\x97", b"\x98", b"\xff" * 4, b"\0" * 8]
PIECES += [b"q\x00", b"h\x00", b"h\x00h\x00\x86q\x00", b"c__builtin__\nset\n", b"X\x01\x00\x00\x00a", b"K\x01", b"\x10"]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=60).map(b"".join))
def test_any_operations_end(data: bytes) -> None:
    with little_memory(256 << 20), suppress(CheckpointError):
        PickleReader(b"\x80\x02" + data + b".", "a pickle", find).read()


def outcome(source: Path, format: Any, folder: Path) -> None:
    steps = folder / "steps"
    shutil.rmtree(steps, ignore_errors=True)
    try:
        with little_memory():
            import_step(source, steps, format)
    except CheckpointError:
        return
    assert verify(steps, 0).ok


CHANGES = st.lists(
    st.tuples(st.integers(0, 1 << 20), st.one_of(st.integers(0, 255), st.binary(max_size=6), st.none())),
    min_size=1,
    max_size=4,
)


def changed(data: bytes, changes: list[tuple[int, int | bytes | None]]) -> bytes:
    """Some bytes replaced, inserted, or cut out."""
    result = bytearray(data)
    for place, change in changes:
        at = place % max(1, len(result))
        if change is None:
            del result[at : at + 3]
        elif isinstance(change, int):
            result[at : at + 1] = bytes([change])
        else:
            result[at:at] = change
    return bytes(result)


@EXAMPLES
@given(changes=CHANGES)
def test_metadata(tmp_path: Path, changes: Any) -> None:
    described(tmp_path / "x", lambda *_: None)
    file = tmp_path / "x" / ".metadata"
    file.write_bytes(changed(file.read_bytes(), changes))
    outcome(tmp_path / "x", "dcp", tmp_path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("saved") / "x"
    value = OrderedDict(
        w=torch.nn.Parameter(torch.ones(3)), n={1: (2.5, b"b", {3})}, t=torch.arange(6).reshape(2, 3).t()
    )
    torch.save(value, file)
    return file


@EXAMPLES
@given(changes=CHANGES)
def test_the_pickle_of_an_archive(tmp_path: Path, saved: Path, changes: Any) -> None:
    with zipfile.ZipFile(saved) as found:
        data = changed(found.read("x/data.pkl"), changes)
        parts = {key: found.read(f"x/data/{key}") for key in ("0", "1")}
    archive(tmp_path / "x", data, parts)
    outcome(tmp_path / "x", "torch", tmp_path)


@EXAMPLES
@given(changes=CHANGES, old=st.booleans())
def test_an_archive(tmp_path: Path, saved: Path, changes: Any, old: bool) -> None:
    if old:
        torch.save({"w": torch.ones(3)}, tmp_path / "old", _use_new_zipfile_serialization=False)
    (tmp_path / "x").write_bytes(changed((tmp_path / "old" if old else saved).read_bytes(), changes))
    outcome(tmp_path / "x", "torch", tmp_path)


NEW = st.one_of(
    st.just(REMOVED),
    VALUES.filter(lambda value: _is_json(value)),
    st.sampled_from([1 << 62, -1, 10**30, [0, 4], [1] * 99]),
)


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


@needs_safetensors
@EXAMPLES
@given(data=st.data())
def test_a_header(tmp_path: Path, data: st.DataObject) -> None:
    tensor = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    header = {"__metadata__": {"a": "b"}, "v": tensor, "w": {**tensor, "data_offsets": [8, 16]}}
    changed_header = copy.deepcopy(header)
    put_at(changed_header, data.draw(st.sampled_from(list(places_in(header)))), data.draw(NEW))
    text = changed(json.dumps(changed_header).encode(), data.draw(st.just([]) | CHANGES))
    safetensors_file(tmp_path / "x", text, struct.pack("<4f", 1, 2, 3, 4))
    outcome(tmp_path / "x", "safetensors", tmp_path)


@needs_safetensors
@EXAMPLES
@given(data=st.data())
def test_the_state_in_a_file_of_ours(tmp_path: Path, data: st.DataObject) -> None:
    from safetensors.torch import save_file

    from outlast.checkpoint.convert.safetensors import _checksums

    state: Any = {"w": {"outlast_type": "tensor", "name": "w"}, "n": {"outlast_tuple": [1, {"outlast_float": "NaN"}]}}
    put_at(state, data.draw(st.sampled_from(list(places_in(copy.deepcopy(state))))), data.draw(NEW))
    tensors = {"w": torch.ones(2)}
    texts = {"outlast.step": "1", "outlast.state": json.dumps(state)}
    texts["outlast.crc32c"] = json.dumps(_checksums(texts, tensors))
    save_file(tensors, tmp_path / "x", metadata=texts)
    outcome(tmp_path / "x", "safetensors", tmp_path)
