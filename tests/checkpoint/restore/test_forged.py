"""Steps that somebody forged, with the right checksums: every command rejects them, like damaged ones."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from outlast.checkpoint import tools
from outlast.checkpoint.format.records import crc_hex
from outlast.cli.main import main
from outlast.errors import CheckpointError, UnknownFormatVersion
from outlast.events import CheckpointRejected, Event
from tests.checkpoint.damage import steps_at
from tests.checkpoint.forging import REMOVED, Record, forge, places_in, put_at
from tests.checkpoint.helpers import checkpointer, of, save_by_ranks, save_steps
from tests.checkpoint.ranks import Orders, run
from tests.checkpoint.states import same, state

WEIGHT = "model/blocks.0.attn.qkv.weight"
DEEP: Any = None
for _ in range(400):
    DEEP = [DEEP]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps in files, and a third in a pack."""
    url = tmp_path_factory.mktemp("original") / "checkpoints"
    save_steps(url, 1, 2)
    save_steps(url, 3, pack_below_kb=64)
    return url


def copied(original: Path, tmp_path: Path, *steps: int) -> Path:
    """A new place with some of the steps."""
    url = tmp_path / "checkpoints"
    shutil.rmtree(url, ignore_errors=True)
    for step in steps:
        shutil.copytree(original / f"step_{step:08d}", url / f"step_{step:08d}")
    return url


def outcome(url: Path) -> tuple[int | None, str]:
    """The step that ``restore("auto")`` takes, and why it rejects others."""
    events: list[Event] = []
    with checkpointer(url, events, attempt_id="later") as saver:
        back = saver.restore("auto")
    reasons = [f"{event.file}: {event.reason}" for event in of(CheckpointRejected, events)]
    return (None if back is None else back.step), "; ".join(reasons)


def agree(url: Path, step: int) -> str:
    """Every tool, and ``restore("auto")``, must come to one result about a step; returns the reason."""
    verification = tools.verify(url, step)
    assert tools.list_steps(url)
    for look in (lambda: tools.describe(url, step), lambda: tools.diff(url, url, 1, step)):
        try:
            look()
        except CheckpointError:
            assert not verification.ok
    if [info.status for info in tools.list_steps(url)] == ["committed", "committed"]:
        assert tools.prune(url, 1, dry_run=True).kept == ((step,) if verification.ok else (1, step))
    taken, reasons = outcome(url)
    assert taken == (step if verification.ok else 1), (verification, reasons)
    assert bool(reasons) is not verification.ok
    return reasons


@pytest.mark.parametrize("part", ["vote", "commit", "document"])
def test_no_command_shows_a_traceback(
    part: str, original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = copied(original, tmp_path, 1, 2)
    if part == "document":
        forge(url / "step_00000002", files={"model/zarr.json": b"[" * 9999})
    else:
        forge(url / "step_00000002", **{part: setting("step", to=DEEP)})
    named = {"vote": "votes/rank_00000.json", "commit": "commit.json", "document": "model/zarr.json"}[part]
    for command, status in (("show", 1), ("verify", 1), ("ls", 0), ("memory", 0)):
        words = ["--step", "2"] if status else []
        assert main(["ckpt", command, str(url), *words]) == status
        printed = capsys.readouterr()
        assert not status or named in printed.out + printed.err
    assert main(["ckpt", "diff", str(url), "--step", "1", "--other-step", "2"]) == 1
    assert main(["ckpt", "prune", str(url), "--keep-last", "1"]) == 0
    assert steps_at(url) == ["step_00000001", "step_00000002"]


def entry(body: Record, path: str) -> Record:
    """A file in a vote."""
    return next(item for item in body["files"] if item["path"] == path)


def listed(path: str, size_bytes: int = 8, *, chunk: bool = True) -> Callable[[Record], None]:
    """Adds a file to a vote."""
    return lambda body: body["files"].append(
        {"path": path, "size_bytes": size_bytes, "crc32c": "00000000", "chunk": chunk}
    )


def setting(*path: Any, to: Any) -> Callable[[Record], None]:
    """Replaces a value."""
    return lambda body: put_at(body, path, to)


VOTES: dict[str, Callable[[Record], object]] = {
    "a path up": listed("../../x"),
    "a path up in the middle": listed("model/../../../x/c.0"),
    "an absolute path": listed("/etc/passwd"),
    "an absolute chunk": listed("/etc/c.0"),
    "an empty component": listed("model//c.0"),
    "a NUL": listed("model/a\0b/c.0"),
    "a surrogate": listed("model/\ud800/c.0"),
    "bytes that are no text": listed("model/%FF/c.0"),
    "an integer key of 300 digits": listed(f"model/~{'9' * 300}/c.0"),
    "two ways to write a key": listed("model/%62locks/c.0"),
    "a vote among the files": listed("votes/rank_00000.json", chunk=False),
    "the commit record among the files": listed("commit.json", chunk=False),
    "another rank's file": listed("rank_00007/zarr.json", chunk=False),
    "another rank's pack": listed("packed/rank_00007.0/c.0"),
    "no pack's name": listed("packed/other/c.0"),
    "a file twice": lambda body: body["files"].append(dict(body["files"][0])),
    "a chunk without an array": listed("model/none/c.0"),
    "a chunk beyond its array": listed(f"{WEIGHT}/c.7.7", 100),
    "a missing chunk": lambda body: body["files"].remove(entry(body, f"{WEIGHT}/c.0.0")),
    "a missing root": lambda body: body["files"].remove(entry(body, "zarr.json")),
    "a missing group": lambda body: body["files"].remove(entry(body, "model/zarr.json")),
    "a missing local state": lambda body: body["files"].remove(entry(body, "rank_00000/zarr.json")),
    "a size of 2^38": lambda body: entry(body, f"{WEIGHT}/c.0.0").update(size_bytes=1 << 38),
    "a negative size": lambda body: entry(body, f"{WEIGHT}/c.0.0").update(size_bytes=-1),
    "a size that is a truth value": lambda body: entry(body, f"{WEIGHT}/c.0.0").update(size_bytes=True),
    "a size that is a float": lambda body: entry(body, f"{WEIGHT}/c.0.0").update(size_bytes=1e300),
    "a chunk that is a document": lambda body: entry(body, f"{WEIGHT}/c.0.0").update(chunk=False),
    "a document that is a chunk": lambda body: entry(body, "zarr.json").update(chunk=True),
    "files that are a text": setting("files", to="zarr.json"),
    "files that are nested": setting("files", to=DEEP),
    "more ranks": setting("world_size", to=2),
    "another rank": setting("rank", to=1),
    "a rank that is a list": setting("rank", to=[0]),
    "another step": setting("step", to=1),
    "an unknown field": setting("more", to=1),
    "a layout that is a number": setting("layout", to=1),
}
COMMITS: dict[str, Callable[[Record], object]] = {
    "no votes": setting("votes", to=[]),
    "a million ranks": setting("world_size", to=1_000_000),
    "a vote elsewhere": setting("votes", 0, "path", to="../step_00000001/votes/rank_00000.json"),
    "an absolute vote": setting("votes", 0, "path", to="/etc/passwd"),
    "a vote of 2^38 bytes": setting("votes", 0, "size_bytes", to=1 << 38),
    "a vote that is a chunk": setting("votes", 0, "chunk", to=True),
    "a checksum that is a list": setting("votes", 0, "crc32c", to=["00000000"]),
    "a step beyond integers": setting("step", to=10**30),
    "an attempt that is a list": setting("epoch", to=["one"]),
    "another size": setting("size_bytes", to=1),
    "a size beyond integers": setting("size_bytes", to=10**400),
    "a time beyond calendars": setting("saved_at", to=1e18),
    "a time that is none": setting("saved_at", to=float("nan")),
    "a negative time": setting("saved_at", to=-1e18),
    "a nested step": setting("step", to=DEEP),
    "a version that is a list": setting("format_version", to=[2]),
    "another kind": setting("kind", to=["commit"]),
}
DOCUMENTS: dict[str, tuple[str, Callable[[Record], object] | bytes]] = {
    "a shape of 2^38": (f"{WEIGHT}/zarr.json", setting("shape", to=[1 << 38, 6])),
    "a grid of 2^60 chunks": (
        f"{WEIGHT}/zarr.json",
        lambda document: document.update(
            shape=[1 << 60, 1],
            chunk_grid={"name": "regular", "configuration": {"chunk_shape": [1, 1]}},
        ),
    ),
    "a shape beyond integers": (f"{WEIGHT}/zarr.json", setting("shape", to=[10**30, 6])),
    "a negative shape": (f"{WEIGHT}/zarr.json", setting("shape", to=[-4, 6])),
    "a shape of floats": (f"{WEIGHT}/zarr.json", setting("shape", to=[4.0, 6.0])),
    "a thousand dimensions": (f"{WEIGHT}/zarr.json", setting("shape", to=[1] * 1000)),
    "a chunk shape of zero": (
        f"{WEIGHT}/zarr.json",
        setting("chunk_grid", "configuration", "chunk_shape", to=[0, 6]),
    ),
    "a larger chunk": (f"{WEIGHT}/zarr.json", setting("chunk_grid", "configuration", "chunk_shape", to=[8, 6])),
    "another type of data": (f"{WEIGHT}/zarr.json", setting("data_type", to="float64")),
    "a type that is a list": (f"{WEIGHT}/zarr.json", setting("attributes", "outlast_dtype", to=["float32"])),
    "another codec": (f"{WEIGHT}/zarr.json", setting("codecs", to=[{"name": "gzip"}])),
    "a group that is an array": ("model/zarr.json", setting("node_type", to="array")),
    "an array that is a group": (f"{WEIGHT}/zarr.json", setting("node_type", to="group")),
    "an array that is a pack": (f"{WEIGHT}/zarr.json", setting("attributes", "outlast_packed", to={})),
    "attributes that are a list": ("model/zarr.json", setting("attributes", to=[])),
    "an attribute named like a tensor": (
        "model/zarr.json",
        setting("attributes", "blocks.0.attn.qkv.weight", to=1),
    ),
    "a float that is no word": ("scheduler/zarr.json", setting("attributes", "worst", to={"outlast_float": []})),
    "a tuple that is a number": ("scheduler/zarr.json", setting("attributes", "worst", to={"outlast_tuple": 7})),
    "no JSON": ("model/zarr.json", b"{" * 100_000),
    "nested JSON": ("model/zarr.json", b"[" * 100_000 + b"]" * 100_000),
    "NaN": ("model/zarr.json", b'{"zarr_format":3,"node_type":"group","attributes":{"a":NaN}}'),
    "no UTF-8": ("model/zarr.json", b"\xff\xfe\x00"),
    "no object": ("zarr.json", b"[]"),
}
PACKED = "packed/rank_00000.0/zarr.json"
INDICES: dict[str, Callable[[Record], object]] = {
    "100,000 names": lambda index: index.update({f"model/n{number}": [0, [1], "float32"] for number in range(100_000)}),
    "30,000 names without elements": lambda index: index.update(
        {f"none/n{number}": [0, [0], "float32"] for number in range(30_000)}
    ),
    "one place for two": lambda index: index.update({"model/other": list(index[WEIGHT])}),
    "a place before the pack": lambda index: index[WEIGHT].__setitem__(0, -64),
    "a place behind the pack": lambda index: index[WEIGHT].__setitem__(0, 1 << 40),
    "a place that is a float": lambda index: index[WEIGHT].__setitem__(0, 0.0),
    "a shape of 2^60": lambda index: index[WEIGHT].__setitem__(1, [1 << 60]),
    "an empty shape beyond memory": lambda index: index[WEIGHT].__setitem__(1, [0, 1 << 62, 1 << 62]),
    "a type that is a number": lambda index: index[WEIGHT].__setitem__(2, 7),
    "four values": lambda index: index[WEIGHT].append(1),
    "a text": lambda index: index.update({WEIGHT: "0"}),
    "a path up": lambda index: index.update({"../x": index.pop(WEIGHT)}),
    "an absolute path": lambda index: index.update({"/model/x": index.pop(WEIGHT)}),
    "no group": lambda index: index.update({"none/x": index.pop(WEIGHT)}),
    "a group's own path": lambda index: index.update({"model": index.pop(WEIGHT)}),
    "another rank's": lambda index: index.update({"rank_00004/x": index.pop(WEIGHT)}),
}


@pytest.mark.parametrize("name", VOTES)
def test_a_forged_vote(name: str, original: Path, tmp_path: Path) -> None:
    url = copied(original, tmp_path, 1, 2)
    forge(url / "step_00000002", vote=VOTES[name])
    assert "CorruptCheckpoint" in (reason := agree(url, 2)) or "IncompleteCheckpoint" in reason


@pytest.mark.parametrize("name", COMMITS)
def test_a_forged_commit_record(name: str, original: Path, tmp_path: Path) -> None:
    url = copied(original, tmp_path, 1, 2)
    forge(url / "step_00000002", commit=COMMITS[name])
    assert "CorruptCheckpoint" in agree(url, 2)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_forged_document(name: str, original: Path, tmp_path: Path) -> None:
    url = copied(original, tmp_path, 1, 2)
    path, change = DOCUMENTS[name]
    forge(url / "step_00000002", files={path: change})
    assert "CorruptCheckpoint" in (reason := agree(url, 2)) or "IncompleteCheckpoint" in reason


@pytest.mark.parametrize("name", INDICES)
def test_a_forged_pack(name: str, original: Path, tmp_path: Path) -> None:
    url = copied(original, tmp_path, 1, 3)
    forge(
        url / "step_00000003",
        files={PACKED: lambda document: INDICES[name](document["attributes"]["outlast_packed"])},
    )
    assert "CorruptCheckpoint" in (reason := agree(url, 3)) or "IncompleteCheckpoint" in reason


VALUES = [None, True, -1, 0, 1 << 38, 2**70, 1e308, "", "x", "../../x", "\u202e\x1b[2J", [], {}, [[]], DEEP, REMOVED]


@pytest.mark.parametrize("part", ["vote", "commit", "zarr.json", f"{WEIGHT}/zarr.json", PACKED, "rank_00000/zarr.json"])
def test_any_one_value_forged(part: str, original: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    step = 3 if part == PACKED else 2
    folder = original / f"step_{step:08d}"
    file = {"vote": "votes/rank_00000.json", "commit": "commit.json"}.get(part, part)
    places = [path for path in places_in(json.loads((folder / file).read_bytes())) if path != ("crc32c",)]

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(place=st.sampled_from(places), value=st.sampled_from(VALUES))
    def forged(place: tuple[Any, ...], value: Any) -> None:
        url = copied(original, tmp_path_factory.mktemp("forged"), 1, step)

        def change(body: Record) -> None:
            put_at(body, place, value)

        if part in ("vote", "commit"):
            forge(url / f"step_{step:08d}", **{part: change})
        else:
            forge(url / f"step_{step:08d}", files={part: change})
        assert tools.list_steps(url)
        try:
            tools.describe(url, step)
            described = True
        except CheckpointError:
            described = False
        problems = tools.verify(url, step).problems
        ok = not problems
        assert described or not ok
        if {problem.kind for problem in problems} == {"UnknownFormatVersion"}:
            # Not damaged: as a later version wrote it, which is told, and no older step taken in its place.
            with pytest.raises(UnknownFormatVersion):
                outcome(url)
            return
        taken, reasons = outcome(url)
        assert taken == (step if ok else 1), reasons

    forged()


def test_any_bytes_flipped_with_right_checksums(original: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    documents = [
        path.relative_to(original / "step_00000002") for path in (original / "step_00000002").rglob("zarr.json")
    ]

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(document=st.sampled_from(sorted(map(str, documents))), place=st.integers(0, 10_000), bit=st.integers(0, 7))
    def flipped(document: str, place: int, bit: int) -> None:
        url = copied(original, tmp_path_factory.mktemp("flipped"), 1, 2)
        data = bytearray((url / "step_00000002" / document).read_bytes())
        data[place % len(data)] ^= 1 << bit
        forge(url / "step_00000002", files={document: bytes(data)})
        ok = tools.verify(url, 2).ok
        assert outcome(url)[0] == (2 if ok else 1)

    flipped()


KINDS: dict[str, Callable[[Path], None]] = {
    "a pipe": os.mkfifo,
    "a link": lambda path: path.symlink_to("/etc/hostname"),
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "a folder": Path.mkdir,
    "a socket": lambda path: _bind(path),
    "a terminal": lambda path: path.symlink_to("/dev/tty"),
}


def _bind(path: Path) -> None:
    here = os.open(path.parent, os.O_RDONLY)
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(f"/proc/self/fd/{here}/{path.name}")  # a socket's path may not be long
    finally:
        os.close(here)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("file", ["votes/rank_00000.json", f"{WEIGHT}/zarr.json", f"{WEIGHT}/c.0.0"])
def test_what_is_no_regular_file(kind: str, file: str, original: Path, tmp_path: Path) -> None:
    url = copied(original, tmp_path, 1, 2)
    (url / "step_00000002" / file).unlink()
    KINDS[kind](url / "step_00000002" / file)
    assert "CorruptCheckpoint" in agree(url, 2)


@pytest.mark.parametrize("kind", ["a pipe", "a link", "a socket"])
def test_a_commit_record_that_is_no_regular_file_is_damaged_and_removes_nothing(
    kind: str, original: Path, tmp_path: Path
) -> None:
    url = copied(original, tmp_path, 1, 2)
    (url / "step_00000002/commit.json").unlink()
    KINDS[kind](url / "step_00000002/commit.json")
    assert not tools.verify(url, 2).ok
    assert outcome(url)[0] == 1
    chunks = [path for path in url.rglob("c.0.0") if f"/{WEIGHT}/" in str(path)]
    assert len(chunks) == 2


def test_a_sparse_file_takes_no_memory(original: Path, tmp_path: Path) -> None:
    url = copied(original, tmp_path, 1, 2, 3)
    for step, file in ((2, f"{WEIGHT}/c.0.0"), (3, "commit.json")):
        os.truncate(url / f"step_{step:08d}" / file, 1 << 40)
    assert str(1 << 40) in tools.verify(url, 2).problems[0].reason
    assert str(1 << 40) in tools.verify(url, 3).problems[0].reason
    assert outcome(url)[0] == 1


def test_a_forged_chunk_on_other_storage_leads_nowhere(original: Path) -> None:
    import fsspec

    url = "memory://forged/checkpoints"
    save_steps(url, 1, 2)
    memory = fsspec.filesystem("memory")
    memory.pipe("/forged/secret", b"12345678")
    local = copied(original, Path(os.environ.get("TMPDIR", "/tmp")) / f"outlast-forged-{os.getpid()}", 2)
    try:
        forge(
            local / "step_00000002",
            vote=lambda body: body["files"].append(
                {"path": "../../secret", "size_bytes": 8, "crc32c": crc_hex(b"12345678"), "chunk": False}
            ),
        )
        for name in ("commit.json", "votes/rank_00000.json"):
            memory.pipe(f"/forged/checkpoints/step_00000002/{name}", (local / "step_00000002" / name).read_bytes())
    finally:
        shutil.rmtree(local.parent)
    assert "../../secret" in tools.verify(url, 2).problems[0].reason
    events: list[Event] = []
    with checkpointer(url, events, attempt_id="later") as saver:
        back = saver.restore("auto")
    assert back is not None
    assert back.step == 1
    assert same(back.replicated, state(1))
    memory.rm("/forged", recursive=True)


def test_ranks_agree_on_a_step_that_one_of_them_finds_forged(tmp_path: Path) -> None:
    url = tmp_path / "checkpoints"
    save_by_ranks(url, 1, 2, world_size=2)
    forge(
        url / "step_00000002",
        files={"rank_00001/zarr.json": setting("attributes", "x", to={"outlast_float": 1})},
        rank=1,
    )
    outcomes = run(*(Orders(urls=(str(url),), attempt_id="later", restore=True),) * 2)
    assert [(other.exitcode, other.restored) for other in outcomes] == [(0, [1])] * 2
