"""A process that its launcher calls one of several, and that has no process group."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

import outlast
from outlast.checkpoint import CheckpointConfig, Checkpointer, attach
from outlast.errors import CheckpointError, CommError, OutlastError

HOW = {
    "checkpoint.attach": (lambda url: attach(url), CheckpointError),
    "Checkpointer": (
        lambda url: Checkpointer(
            url, CheckpointConfig(), rank=0, world_size=1, attempt_id="x", on_event=lambda event: None
        ),
        CheckpointError,
    ),
    "comm.attach": (lambda url: outlast.comm.attach(nn.Linear(2, 2)), CommError),
}


@pytest.mark.parametrize("called", HOW)
def test_it_is_told_what_to_call_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, called: str) -> None:
    call, kind = HOW[called]
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(kind, match=r"RANK=1 and WORLD_SIZE=2 .*no process group") as error:
        call(str(tmp_path / "run"))
    assert isinstance(error.value, OutlastError)
    assert "init_process_group()" in error.value.fix
    assert "unset RANK" in error.value.fix
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "environ", [{"WORLD_SIZE": "2"}, {"RANK": "0", "WORLD_SIZE": "1"}, {"RANK": "", "WORLD_SIZE": "2"}]
)
def test_a_process_that_is_alone_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environ: dict[str, str]) -> None:
    """Batch scripts often set WORLD_SIZE alone, which starts no ranks."""
    monkeypatch.delenv("RANK", raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    attach(tmp_path).close()
