"""Sources that ask for far more than they have: refused in one line, before any memory is taken or time spent."""

from __future__ import annotations

import json
import os
import pickle
import socket
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from outlast.checkpoint.convert import import_step
from outlast.checkpoint.tools import list_steps
from outlast.cli.main import main
from outlast.errors import CheckpointError
from tests.checkpoint.convert.hostile import (
    DOUBLED,
    TERA,
    Call,
    archive,
    little_memory,
    old_archive,
    pickled,
    safetensors_file,
    tensor,
)
from tests.checkpoint.converting import needs_safetensors

pytestmark = pytest.mark.timeout(60)


def refused(source: Path, format: Any, said: str, tmp_path: Path) -> None:
    """It is refused with one line that names the file and says this, and no step is made."""
    with little_memory(), pytest.raises(CheckpointError, match=said) as caught:
        import_step(source, tmp_path / "steps", format)
    assert str(tmp_path) in caught.value.what
    assert "\n" not in caught.value.what
    assert len(caught.value.what) < 600
    assert list_steps(tmp_path / "steps") == []


METADATA: dict[str, tuple[bytes, str]] = {
    "a memo of 2^31": (b"\x80\x02Nr\xff\xff\xff\x7f.", "found None"),
    "a tuple of 2^60 as a key": (b"\x80\x02}" + DOUBLED + b"Ns.", "a tuple of 510 values"),
    "a tuple of 2^60 in a set": (b"\x80\x04\x8f(" + DOUBLED + b"\x90.", "a tuple of 510 values"),
    "lists of 2^60": (b"\x80\x02]q\x00" + b"](h\x00h\x00eq\x00" * 60 + b".", r"found \[\["),
    "a list in itself": (b"\x80\x02]q\x00h\x00a.", r"found \[\["),
    "a text of 2^60 bytes": (b"\x80\x04\x8d" + b"\x00" * 7 + b"\x10.", "1152921504606846976 bytes are announced"),
    "bytes of 2^62": (b"\x80\x04\x8e" + b"\x00" * 7 + b"\x40.", "bytes are announced"),
    "a bytearray of 2^60": (b"\x80\x05\x96" + b"\x00" * 7 + b"\x10.", "not needed"),
    "an integer of 2^31 bytes": (b"\x80\x02\x8b\xff\xff\xff\x7f.", "an integer of 2147483647 bytes"),
    "a negative length": (b"\x80\x02\x8b\xff\xff\xff\xff.", "an integer of -1 bytes"),
    "keys of one hash": (b"\x80\x02}\x8a\x20" + b"\x01" * 32 + b"Ns.", "a key that is an integer of 249 bits"),
    "a decimal of a million digits": (b"\x80\x00L" + b"9" * 1_000_000 + b"L\n.", "the operation b'L'"),
    "a value that was never there": (b"\x80\x02h\x07.", "repeats the value 7"),
    "nothing on the stack": (b"\x80\x020.", "the operation b'0'"),
    "too few values": (b"\x80\x02N\x87.", "pop from empty list"),
    "no end": (b"\x80\x02" + b"]" * 100_000, "announced, 0 are left"),
    "a mark too few": (b"\x80\x02t.", "pop from empty list"),
    "a state of a number": (b"\x80\x02K\x01}b.", "gives a state to a int"),
    "a call of a number": (b"\x80\x02K\x01)R.", "calls what cannot be called"),
    "nothing": (b"", "1 bytes are announced"),
}


@pytest.mark.parametrize("case", METADATA)
def test_metadata_of_a_distributed_checkpoint(tmp_path: Path, case: str) -> None:
    data, said = METADATA[case]
    (tmp_path / ".metadata").write_bytes(data)
    refused(tmp_path, "dcp", said, tmp_path)


def described(folder: Path, change: Callable[[Any, dict[str, Any], dict[Any, Any]], None]) -> None:
    """A distributed checkpoint of one tensor in two halves, with a change of its metadata."""
    from torch.distributed.checkpoint import metadata as m
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    folder.mkdir(exist_ok=True)
    torch.save(torch.arange(4.0), folder / "half")
    nbytes = (folder / "half").stat().st_size
    data = (folder / "half").read_bytes()
    (folder / "x.distcp").write_bytes(data + data)
    chunks = [m.ChunkStorageMetadata(torch.Size([at]), torch.Size([4])) for at in (0, 4)]
    entry = m.TensorStorageMetadata(m.TensorProperties(dtype=torch.float32), torch.Size([8]), chunks)
    places = {
        m.MetadataIndex("w", torch.Size([at]), at // 4): _StorageInfo("x.distcp", at // 4 * nbytes, nbytes)
        for at in (0, 4)
    }
    paths = {"w": ("w",)}
    change(entry, paths, places)
    (folder / ".metadata").write_bytes(pickle.dumps(m.Metadata({"w": entry}, paths, places)))


def sized(*size: int) -> Callable[..., None]:
    return lambda entry, paths, places: setattr(entry, "size", torch.Size(size))


def overlapping(entry: Any, paths: Any, places: dict[Any, Any]) -> None:
    list(places.values())[1].offset = 0


def chunk(**fields: Any) -> Callable[..., None]:
    return lambda entry, paths, places: [setattr(entry.chunks[1], name, value) for name, value in fields.items()]


def place(**fields: Any) -> Callable[..., None]:
    return lambda entry, paths, places: [setattr(next(iter(places.values())), *field) for field in fields.items()]


DESCRIBED: dict[str, tuple[Callable[..., None], str]] = {
    "2^38 elements": (sized(TERA), "parts of the tensor 'w' are missing: it has 274877906944 elements"),
    "2^38 elements, all in chunks": (
        lambda entry, paths, places: (
            setattr(entry, "size", torch.Size([TERA])),
            setattr(entry.chunks[1], "sizes", torch.Size([TERA - 4])),
        ),
        "274877906944 elements, its parts 274877906944, in",
    ),
    "more elements than integers": (sized((1 << 62) + 1), "no integer from 0"),
    "a thousand dimensions": (sized(*[1] * 200), "a size is too long"),
    "the same bytes twice": (overlapping, "have the same bytes of 'x.distcp'"),
    "a part elsewhere": (chunk(offsets=torch.Size([5])), r"the part of 'w' at \[5\] is not within \[8\]"),
    "a part of another shape": (chunk(sizes=torch.Size([2, 2])), "'w'|zip"),
    "a path of 300 keys": (lambda entry, paths, places: paths.update(w=("a",) * 300), "a tuple of 300 values"),
    "a path of 200 keys": (lambda entry, paths, places: paths.update(w=("a",) * 200), "nested more than 100 deep"),
    "a list of 2^40": (lambda entry, paths, places: paths.update(w=("a", 1 << 40)), "one at index 1099511627776"),
    "a place that is a float": (place(offset=0.5), "bytes at 0.5"),
    "a negative place": (place(offset=-1), "bytes at -1"),
    "a place behind the file": (place(offset=1 << 40), "ends before 'w' does"),
    "a place of 2^60 bytes": (place(offset=1 << 30, length=1 << 60), "ends before 'w' does"),
    "a NUL in a path": (place(relative_path="x\0y"), "points outside of the folder"),
    "a path that is a number": (place(relative_path=7), "expected a text"),
}


@pytest.mark.parametrize("case", DESCRIBED)
def test_tensors_of_a_distributed_checkpoint(tmp_path: Path, case: str) -> None:
    change, said = DESCRIBED[case]
    described(tmp_path / "x", change)
    refused(tmp_path / "x", "dcp", said, tmp_path)


def test_the_distributed_checkpoint_of_these_tests_is_imported_unchanged(tmp_path: Path) -> None:
    described(tmp_path / "x", lambda *_: None)
    assert import_step(tmp_path / "x", tmp_path / "steps", "dcp").tensors == 1


def lists(depth: int) -> list[Any]:
    """Each holds the one before twice."""
    value: list[Any] = []
    for _ in range(depth):
        value = [value, value]
    return value


def in_itself() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


def attached() -> OrderedDict[str, Any]:
    value: OrderedDict[str, Any] = OrderedDict()
    value.more = lists(60)  # type: ignore[attr-defined]
    return value


ELEMENT = {"0": b"\0" * 4}
ARCHIVES: dict[str, tuple[Any, dict[str, bytes], str]] = {
    "a tensor larger than its storage": ({"w": tensor(TERA)}, ELEMENT, "needs 1099511627776 bytes of a storage"),
    "a storage larger than its part": ({"w": tensor(1, stored=TERA)}, ELEMENT, "to have 1099511627776 bytes, and has"),
    "a storage smaller than its part": ({"w": tensor(1)}, {"0": b"\0" * 8}, "to have 4 bytes, and has 8"),
    "a storage that is not there": ({"w": tensor(1)}, {}, "has None"),
    "one element 2^38 times": ({"w": tensor(TERA, stride=0)}, ELEMENT, "its tensors have more than"),
    "a negative stride": ({"w": tensor(1, stride=-1)}, ELEMENT, "a size has what is no integer"),
    "a bytearray of 2^40": ({"w": Call(bytearray, 1 << 40)}, {}, "calls bytearray with a int"),
    "a constructor of 2^38": ({"w": Call(torch.FloatTensor, TERA)}, {}, "names torch.FloatTensor"),
    "a storage of 2^38": ({"w": Call(torch.FloatStorage, TERA)}, {}, "calls what cannot be called"),
    "a nested tensor": ({"w": Call(torch._utils._rebuild_nested_tensor, 1)}, {}, "names torch._utils._rebuild_nested"),
    "lists of 2^60": ({"w": lists(60)}, {}, "holds more than 2000000 values"),
    "a list in itself": ({"w": in_itself()}, {}, "nested more than 100 deep"),
    "lists of 2^60 as an attribute": (attached(), {}, "holds more than 2000000 values"),
    "a tensor a thousand times": (
        {"w": [tensor(1 << 18, stored=1 << 18)] * 1000},
        {"0": bytes(4 << 18)},
        "its tensors",
    ),
    "copies of copies": ({"w": Counter({str(n): n for n in range(9000)})}, {}, ""),
}


@pytest.mark.parametrize("case", ARCHIVES)
def test_torch_save_files(tmp_path: Path, case: str) -> None:
    value, parts, said = ARCHIVES[case]
    data = pickled(value)
    if case == "copies of copies":  # one dictionary, copied and dropped again and again
        name = b"X\x01\x00\x00\x00nccollections\nCounter\nr\xff\xff\xff\x00s"
        whole = b"X\x01\x00\x00\x00w" + pickle.dumps({str(n): n for n in range(9000)}, 2)[2:-1] + b"r\xfe\xff\xff\x00s"
        data = b"\x80\x02}" + whole + name + b"X\x01\x00\x00\x00wj\xff\xff\xff\x00j\xfe\xff\xff\x00\x85Rs" * 2000 + b"."
        said = "from one container to another"
    archive(tmp_path / "x", data, parts)
    refused(tmp_path / "x", "torch", said, tmp_path)


def test_a_tuple_of_tuples_is_not_hashed(tmp_path: Path) -> None:
    archive(tmp_path / "x", b"\x80\x02}" + DOUBLED + b"Ns.")
    refused(tmp_path / "x", "torch", "a tuple of 510 values", tmp_path)


def test_old_torch_save_files(tmp_path: Path) -> None:
    old_archive(tmp_path / "good", {"w": tensor(1)}, b"\0\0\x80?")
    assert import_step(tmp_path / "good", tmp_path / "fine", "torch").tensors == 1
    for value, said in (
        ({"w": tensor(1, stored=TERA)}, "its storages are to have 1099511627776 bytes"),
        ({"w": tensor(TERA)}, "needs 1099511627776 bytes"),
        ({"w": Call(bytearray, 1 << 40)}, "calls bytearray"),
    ):
        old_archive(tmp_path / "x", value, b"\0\0\x80?")
        refused(tmp_path / "x", "torch", said, tmp_path)
    (tmp_path / "x").write_bytes(b"\x80\x02Nr\xff\xff\xff\x7f.")
    refused(tmp_path / "x", "torch", "begins neither as a zip archive", tmp_path)


def test_zip_bombs(tmp_path: Path) -> None:
    archive(tmp_path / "x", pickled({"w": tensor(1)}), {"0": bytes(1 << 22)}, packed=True)
    refused(tmp_path / "x", "torch", "compressed, which torch.save never does", tmp_path)
    archive(tmp_path / "x", pickled({"w": tensor(1)}), ELEMENT)
    good = (tmp_path / "x").read_bytes()
    # The same local part for all, each said to be of 2^31 bytes.
    directory = good.index(b"PK\x01\x02")
    data = bytearray(good)
    for at in (20, 24):
        data[directory + at : directory + at + 4] = (1 << 31).to_bytes(4, "little")
    (tmp_path / "x").write_bytes(data)
    refused(tmp_path / "x", "torch", "its parts have 2147483", tmp_path)
    (tmp_path / "x").write_bytes(good[:4] + b"prefix" + good)  # readers differ in where they look for the parts
    refused(tmp_path / "x", "torch", "does not end at", tmp_path)
    assert good
    (tmp_path / "x").write_bytes(good)
    assert import_step(tmp_path / "x", tmp_path / "fine", "torch").tensors == 1


def spans(**tensors: tuple[int, int]) -> dict[str, Any]:
    return {
        name: {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end]}
        for name, (start, end) in tensors.items()
    }


F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
HEADERS: dict[str, tuple[bytes | dict[str, Any], int | None, str]] = {
    "a header of 2^63 bytes": ({"w": F32}, 1 << 63, "its header is to have 9223372036854775808 bytes"),
    "a header of 2^40 bytes": ({"w": F32}, 1 << 40, "its header is to have 1099511627776 bytes"),
    "overlapping": (spans(a=(0, 3), b=(2, 4)), None, "'b' at 2 overlaps 'a'"),
    "the same bytes": (spans(a=(0, 4), b=(0, 4)), None, "overlaps"),
    "negative": (spans(a=(-4, 4)), None, "-4 to 4"),
    "backwards": ({"w": {**F32, "data_offsets": [4, 0]}}, None, "4 to 0"),
    "far behind": (spans(a=(0, 1 << 62)), None, "0 to 4611686018427387904"),
    "a gap": (spans(a=(0, 1), b=(3, 4)), None, "leaves out bytes"),
    "bytes of nobody": (spans(a=(0, 2)), None, "have 2 bytes, the file has 4"),
    "2^38 elements": ({"w": {**F32, "shape": [TERA]}}, None, "274877906944 elements of F32 do not have 4 bytes"),
    "more than integers": ({"w": {**F32, "shape": [1 << 40, 1 << 40]}}, None, "has more than 46116860184273"),
    "a product that overflows to 1": ({"w": {**F32, "shape": [(1 << 64) + 1]}}, None, "no integer from 0"),
    "a negative shape": ({"w": {**F32, "shape": [-1, -1]}}, None, "no integer from 0"),
    "a shape of floats": ({"w": {**F32, "shape": [1.0]}}, None, "no integer from 0"),
    "a thousand dimensions": ({"w": {**F32, "shape": [1] * 1000}}, None, "a size is too long"),
    "a tensor twice": (b'{"w":%b,"w":%b}' % ((json.dumps(F32).encode(),) * 2), None, "the key 'w' is there twice"),
    "offsets twice": (b'{"w":{"dtype":"U8","shape":[4],"data_offsets":[0,1],"data_offsets":[0,4]}}', None, "twice"),
    "an unknown field": ({"w": {**F32, "file": "/etc/passwd"}}, None, "the unknown field 'file'"),
    "no object": (b"[]", None, "must be an object"),
    "no JSON": (b"{", None, "malformed"),
    "nested": (b"[" * 100_000, None, "nested too deeply"),
    "metadata of numbers": ({"__metadata__": {"a": 1}, "w": F32}, None, "what is not a text"),
}


@needs_safetensors
@pytest.mark.parametrize("case", HEADERS)
def test_safetensors_headers(tmp_path: Path, case: str) -> None:
    header, length, said = HEADERS[case]
    safetensors_file(tmp_path / "x", header, b"\0" * 4, length)
    refused(tmp_path / "x", "safetensors", said, tmp_path)


@needs_safetensors
def test_a_state_that_names_one_tensor_many_times(tmp_path: Path) -> None:
    """The checksums of a file of ours can be forged, too."""
    from safetensors.torch import save_file

    from outlast.checkpoint.convert.safetensors import _checksums

    named = {"outlast_type": "tensor", "name": "w"}
    tensors = {"w": torch.zeros(1 << 20)}
    metadata = {"outlast.step": "1", "outlast.state": json.dumps({"a": [named] * 1000})}
    metadata["outlast.crc32c"] = json.dumps(_checksums(metadata, tensors))
    save_file(tensors, tmp_path / "x", metadata=metadata)
    refused(tmp_path / "x", "safetensors", "its tensors have more than", tmp_path)


@pytest.mark.parametrize(
    ("format", "stem", "ending"), [("safetensors", "model", "safetensors"), ("torch", "pytorch_model", "bin")]
)
@needs_safetensors
def test_indices_of_shards(tmp_path: Path, format: Any, stem: str, ending: str) -> None:
    folder = tmp_path / "x"
    (folder / "inner").mkdir(parents=True)
    index = folder / f"{stem}.{ending}.index.json"
    (folder / "loop").symlink_to(folder)
    os.mkfifo(folder / "pipe")
    (folder / "zeros").symlink_to("/dev/zero")
    for shard, said in (
        (index.name, "which is an index itself"),
        ("loop", "which is a folder"),
        ("inner", "which is a folder"),
        ("pipe", "it is a pipe, not a regular file"),
        ("zeros", "it is a device, not a regular file"),
        ("../x", "not beside it"),
        ("x\0y", "not beside it"),
        ("", "not beside it"),
    ):
        index.write_text(json.dumps({"weight_map": {"w": shard}}))
        refused(folder, format, said, tmp_path)
    for text, said in (
        ('{"weight_map": {"w": "a", "w": "b"}}', "the key 'w' is there twice"),
        ("[" * 100_000, "RecursionError"),
        ('{"weight_map": {"w": ["a"]}}', "no dictionary of file names"),
    ):
        index.write_text(text)
        refused(folder, format, said, tmp_path)
    index.unlink()
    os.mkfifo(index)
    refused(folder, format, "it is a pipe", tmp_path)


def test_what_is_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A pipe would wait for ever for whoever writes to it, a device may have any effect."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        for name, kind in (("pipe", "a pipe"), ("zeros", "a device"), ("s", "a socket")):
            for format in ("torch", "safetensors"):
                words = ["ckpt", "import", str(tmp_path / name), str(tmp_path / "steps"), "--format", format]
                assert main(words) == 1
                assert f"it is {kind}, not a regular file" in capsys.readouterr().err
    described(tmp_path / "x", lambda *_: None)
    for name in ("x.distcp", ".metadata"):
        (tmp_path / "x" / name).unlink()
        os.mkfifo(tmp_path / "x" / name)
        refused(tmp_path / "x", "dcp", "it is a pipe", tmp_path)
