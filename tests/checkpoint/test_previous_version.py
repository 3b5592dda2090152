"""A checkpoint that the version before wrote: this one opens, verifies and resumes it, error feedback included."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from outlast.checkpoint.tools import describe, list_steps, verify
from tests.checkpoint.damage import files_of
from tests.checkpoint.helpers import checkpointer
from tests.checkpoint.small_run import CHECKPOINT, WORLD_SIZE, Run
from tests.checkpoint.states import same
from tests.comm.ranks import Ranks

KEPT = Path(__file__).parent.parent / "data" / "checkpoint_v2"
STEP = "step_00000002"
ATTEMPT = "version-2"
"""That saved it."""


@pytest.fixture
def url(tmp_path: Path) -> Path:
    shutil.copytree(KEPT / STEP, tmp_path / "checkpoints" / STEP)
    return tmp_path / "checkpoints"


def test_it_opens_and_verifies(url: Path) -> None:
    assert [(info.step, info.status, info.world_size) for info in list_steps(url)] == [(2, "committed", WORLD_SIZE)]
    found = describe(url)
    assert found.format_version == 2
    assert found.values["values/name"] == "größer/kleiner"
    shapes = {(tensor.name, tensor.rank): (tensor.shape, tensor.dtype) for tensor in found.tensors}
    assert shapes["model/weight", None] == ((24, 16), "float32")
    assert shapes["half/weight", None] == ((24, 16), "bfloat16")
    assert {rank for name, rank in shapes if name.startswith("comm/") and rank is not None} == {0, 1}
    verification = verify(url)
    assert verification.ok
    assert verification.files > 30


def as_version_2(path: Path) -> Any:
    """A file's bytes; of JSON what version 2 wrote too, but for the time, and for checksums and sizes of JSON."""
    if path.suffix != ".json":
        return path.read_bytes()
    document = json.loads(path.read_bytes())
    if path.name == "zarr.json":
        document["attributes"].pop("outlast_container", None)
        document["attributes"].get("outlast", {}).pop("format_version", None)
        document["attributes"].get("meta", {}).pop("unused", None)
        return document
    for changed in ("format_version", "saved_at", "size_bytes", "crc32c", "replicas"):
        document.pop(changed, None)
    for entry in document.get("files", document.get("votes", [])):
        if not entry["chunk"]:
            del entry["size_bytes"], entry["crc32c"]
    return document


def resume(rank: int, url: str, again: str) -> dict[str, Any]:
    """Restore step 2, save it once more elsewhere, and take two steps; the parameters then."""
    run = Run(rank)
    try:
        with checkpointer(url, rank=rank, world_size=WORLD_SIZE, attempt_id="resumed") as old:
            restored = old.restore("auto")
        assert restored is not None
        assert (restored.step, restored.world_size) == (2, WORLD_SIZE)
        run.load(restored.replicated, restored.local)
        now = run.replicated()
        assert now["comm"]["meta"].pop("unused") == []  # which version 2 lacked
        assert same(now, restored.replicated)
        assert same(run.local(), restored.local)
        with checkpointer(again, rank=rank, world_size=WORLD_SIZE, attempt_id=ATTEMPT, **CHECKPOINT) as new:
            new.save(2, replicated=run.replicated(), local=run.local())
        run.train(2)
        return {name: parameter.detach() for name, parameter in run.model.items()}
    finally:
        run.reducer.close()


def test_it_resumes_and_what_is_saved_anew_is_the_same_but_for_what_version_2_lacked(url: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    ranks = Ranks(WORLD_SIZE)
    try:
        outcomes = ranks.run(resume, str(url), str(again))
    finally:
        ranks.close()
    assert same(outcomes[0], outcomes[1])
    uninterrupted = json.loads((KEPT / "after_4_steps.json").read_text())
    for name, parameter in outcomes[0].items():
        # Another processor may round differently. Without the error feedback the weights differ by more than 0.01.
        torch.testing.assert_close(parameter, torch.tensor(uninterrupted[name]), rtol=1e-5, atol=1e-6)
    files = files_of(KEPT / STEP)
    assert files_of(again / STEP) == files
    for file in files:
        assert as_version_2(again / STEP / file) == as_version_2(KEPT / STEP / file), file
