"""How many requests it takes to read from an object store: each has a price and a round trip."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from outlast.checkpoint.storage.base import FileTooLarge, Store
from outlast.checkpoint.storage.open import open_store
from tests.checkpoint.helpers import checkpointer, save_steps
from tests.checkpoint.s3 import BUCKET, Server
from tests.checkpoint.states import same, state


@pytest.fixture
def store(s3_server: Server, tmp_path: Path) -> Iterator[Store]:
    with s3_server.used():
        yield open_store(f"s3://{BUCKET}/{tmp_path.name}")


@pytest.fixture
def asked(store: Store, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What S3 is asked for."""
    found: list[str] = []
    kind = type(store._fs)  # type: ignore[attr-defined]
    call = kind._call_s3

    async def counted(client: Any, method: str, *arguments: Any, **more: Any) -> Any:
        found.append(method)
        return await call(client, method, *arguments, **more)

    monkeypatch.setattr(kind, "_call_s3", counted)
    return found


@pytest.mark.parametrize("nbytes", [1, 1000, 300_000])
def test_one_request_reads_an_object(store: Store, asked: list[str], nbytes: int) -> None:
    data = bytes(range(256)) * (nbytes // 256) + bytes(nbytes % 256)
    store.put("some/file", [data])
    asked.clear()
    assert bytes(store.read("some/file")) == data
    assert bytes(store.read("some/file", at_most_bytes=nbytes)) == data
    target = bytearray(nbytes)
    assert store.read_into("some/file", memoryview(target), lambda piece: None, nbytes) == b""
    assert bytes(target) == data
    assert asked == ["get_object"] * 3


def test_the_guards_are_kept(store: Store, asked: list[str]) -> None:
    store.put("folder/file", [bytes(1000)])
    store.put("folder/empty", [b""])
    with pytest.raises(FileTooLarge, match="999"):
        store.read("folder/file", at_most_bytes=999)
    assert bytes(store.read("folder/empty")) == b""
    asked.clear()
    with pytest.raises(FileNotFoundError):
        store.read("folder/none")
    with pytest.raises(OSError, match="folder"):
        store.read("folder")
    assert "put_object" not in asked


def test_a_restore_gets_each_object_once(store: Store, asked: list[str]) -> None:
    save_steps(store.url, 1)
    names = store.sizes("step_00000001")
    asked.clear()
    with checkpointer(store.url, attempt_id="two") as reader:
        restored = reader.restore(1)
        assert restored is not None
        assert same(restored.replicated, state(1))
    assert asked.count("get_object") <= 2 * len(names)
    assert asked.count("head_object") < len(names) / 2, asked
