"""Checkpoints of each format that there was are kept, and open: listed, verified, loaded, exported, gone on from."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import outlast
from outlast.checkpoint.convert import export_step
from outlast.checkpoint.format.records import FORMAT_VERSION
from outlast.checkpoint.tools import describe, list_steps, verify
from tests.checkpoint.helpers import checkpointer
from tests.checkpoint.states import same

DATA = Path(__file__).parent.parent / "data"
VERSIONS = (2, 3)


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def url(tmp_path: Path, version: int) -> Path:
    """Step 2 of ``small_run.py``, as two ranks saved it."""
    shutil.copytree(DATA / f"checkpoint_v{version}" / "step_00000002", tmp_path / "run" / "step_00000002")
    return tmp_path / "run"


def test_one_of_each_format_is_kept() -> None:
    """Version 1 was never in a release. Whoever raises the version keeps one of the format before."""
    assert tuple(range(2, FORMAT_VERSION + 1)) == VERSIONS


def test_it_opens(url: Path, version: int, tmp_path: Path) -> None:
    assert [(info.step, info.status, info.world_size) for info in list_steps(url)] == [(2, "committed", 2)]
    assert describe(url).format_version == version
    assert verify(url).ok
    restored = outlast.checkpoint.load(url, parts=("model", "values"))
    assert restored.replicated["model"]["weight"].shape == (24, 16)
    assert restored.replicated["values"]["name"] == "größer/kleiner"
    assert set(restored.read_local(1)) == {"comm", "rng"}
    export_step(url, tmp_path / "model.safetensors", format="safetensors", part="model")
    assert (tmp_path / "model.safetensors").exists()


def test_they_hold_the_same(tmp_path: Path) -> None:
    first, *others = [outlast.checkpoint.load(DATA / f"checkpoint_v{version}") for version in VERSIONS]
    for other in others:
        for part in ("model", "half", "optimizer"):
            assert same(first.replicated[part], other.replicated[part]), part
        assert same(first.read_local(1), other.read_local(1))


def test_a_run_goes_on_from_it_and_saves_in_today_s_format(url: Path) -> None:
    with checkpointer(url, attempt_id="new") as saver:
        restored = saver.restore("auto", any_world_size=True)
        assert restored is not None
        assert restored.step == 2
        model = {name: tensor + 1 for name, tensor in restored.replicated["model"].items()}
        saver.save(3, replicated={"model": model})
    assert [(info.step, info.status) for info in list_steps(url)] == [(2, "committed"), (3, "committed")]
    assert describe(url, 3).format_version == FORMAT_VERSION
    assert torch.equal(outlast.checkpoint.load(url).replicated["model"]["weight"], model["weight"])
