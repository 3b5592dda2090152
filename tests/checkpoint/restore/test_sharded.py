"""FSDP2 in real processes: any number of ranks goes on where any other left off, each reading its own parts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from outlast.checkpoint.tools import verify
from tests.checkpoint.sharded import run
from tests.checkpoint.sharded_parts import SHAPES, damaged, memory, parts, refused, some_ranks
from tests.checkpoint.sharded_training import Leg, Sharding, arrays, documented, train


def equal(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Bit for bit, values that are no tensors included."""
    have, want = arrays(a), arrays(b)
    assert have.keys() == want.keys()
    for name in want:
        assert have[name].dtype == want[name].dtype, name
        assert have[name].tobytes() == want[name].tobytes(), name
    assert a["optimizer"]["param_groups"] == b["optimizer"]["param_groups"]
    assert isinstance(a["optimizer"]["param_groups"][0]["betas"], tuple)


def alike(a: dict[str, Any], b: dict[str, Any]) -> None:
    """But for rounding."""
    have, want = arrays(a), arrays(b)
    assert have.keys() == want.keys()
    for name in want:
        np.testing.assert_allclose(have[name], want[name], rtol=1e-3, atol=1e-6, err_msg=name)


def legs(url: Path, *plan: tuple[Sharding, int]) -> list[Leg]:
    """A training on one sharding after the other; each goes on from where the one before was saved.

    The first trains to the end, too, and the last ends alike.
    """
    found: list[Leg] = []
    end = plan[-1][1]
    for sharding, last in plan:
        ranks = int(np.prod(sharding.mesh))
        job = run(ranks, train, str(url), sharding, last if found else end, (last,), bool(found))
        for leg in job:
            assert leg.failures == []
            equal(leg.ended, job[0].ended)
        if found:
            (saved,) = found[-1].saved.values()
            equal(job[0].restored, saved)
        assert verify(url, last).ok
        found.append(job[0])
    alike(found[-1].ended, found[0].ended)
    return found


def test_four_ranks_then_two_then_three(tmp_path: Path) -> None:
    one, two, _ = legs(tmp_path, (Sharding((4,)), 2), (Sharding((2,)), 4), (Sharding((3,)), 6))
    assert two.kinds == {"DTensor (Shard(dim=0),) cpu"}
    # Stock Zarr sees whole tensors.
    model = zarr.open_group(str(tmp_path / "step_00000002"), mode="r")["model"]
    assert isinstance(model, zarr.Group)
    for name, expected in one.saved[2]["model"].items():
        assert np.asarray(model[name][...]).tobytes() == expected.tobytes(), name  # type: ignore[index]


def test_copies_of_shards_and_integer_keys(tmp_path: Path) -> None:
    hsdp = Sharding((2, 2), integer_keys=True)
    *_, last = legs(tmp_path, (hsdp, 2), (Sharding((3,), integer_keys=True), 3), (hsdp, 4))
    assert last.kinds == {"DTensor (Replicate(), Shard(dim=0)) cpu"}


@pytest.mark.slow
def test_tensor_parallel_ranks_and_others(tmp_path: Path) -> None:
    both = Sharding((2, 2), tensor_parallel=True, without_norm=True, hidden=24)
    fewer = Sharding((2,), without_norm=True, hidden=24)
    *_, last = legs(tmp_path, (both, 2), (fewer, 3), (both, 4))
    assert any("_StridedShard" in kind for kind in last.kinds)


def test_a_rank_reads_its_parts_and_no_more(tmp_path: Path) -> None:
    ranks = run(4, parts, str(tmp_path))
    whole_bytes = sum(4 * int(np.prod(shape)) for shape in SHAPES.values())
    for found in ranks:
        assert found["sharded right"]
        assert found["into right"]
        assert found["without like"]
        assert found["whole right"]
        # Each chunk of a shard once, with its checksum; the last one of a tensor may be padded.
        for name, own_bytes in found["own"].items():
            files = [size for path, size in found["sharded"].items() if path.startswith(f"model/{name}/")]
            assert own_bytes <= sum(files) - 4 * len(files) < own_bytes + max([*files, 1])
        # Of chunks that do not end where parts do, at most one more at either end of each run of rows.
        read_bytes = {name: 0 for name in SHAPES}
        for path, size in found["whole"].items():
            read_bytes[path.split("/")[1]] += size
        assert read_bytes["rows"] <= found["own"]["rows"] * 1.01 + 2 * 4000
        assert read_bytes["bias"] == 0  # it lies in a pack
    # What is sharded by rows is read once, and by nobody whole.
    rows = [{path for path in found["sharded"] if path.startswith("model/rows/")} for found in ranks]
    assert sum(map(len, rows)) == len(set.union(*rows))
    assert all(
        sum(size for path, size in found["sharded"].items() if "/copied/" not in path) < 0.4 * whole_bytes
        for found in ranks
    )


def test_damage_that_one_rank_alone_can_see(tmp_path: Path) -> None:
    assert run(4, damaged, str(tmp_path)) == [1] * 4


def test_a_group_of_some_ranks(tmp_path: Path) -> None:
    assert run(4, some_ranks, str(tmp_path)) == ["right"] * 4
    assert verify(tmp_path, 1).ok


def test_what_cannot_be_right_is_refused(tmp_path: Path) -> None:
    ranks = run(4, refused, str(tmp_path))
    for found in ranks:
        assert "'model/w' cannot be stored: its placement is P" in found["partial"]
        assert "'rank_0000" in found["local"]
        assert "put it into replicated" in found["local"]
        assert "spans ranks [0, 1]" in found["submesh"] or "spans ranks [2, 3]" in found["submesh"]
        assert "the job has 4" in found["submesh"]
        assert "the dimensions of its mesh split it in the order ((1, 0),), not in their own" in found["turned"]
        assert "chunk_mb of at least 0.004036" in found["grid"]
        assert found["mismatch"].startswith("StateMismatch: 3 tensors")
        assert "model/rows: (401, 64) torch.float32 in the checkpoint, (402, 64)" in found["mismatch"]
        assert "model/bias: in the checkpoint, not in the running state" in found["mismatch"]
        assert "ranks [2, 3] restore into other tensors" in found["ranks differ"]
        assert "rank 2: the shards of 'model/wide'" in found["one rank"]
        assert found["fine after all"] == ""
    # A rank that hears first that another gave up has nothing to raise.
    for what, name in (("changed", "columns"), ("part changed", "rows"), ("unheard of", "rows")):
        said = {found[what] for found in ranks} - {""}
        assert said
        assert all(text.startswith(f"SnapshotMutated: the tensor 'model/{name}'") for text in said)
        assert ("_version does not" in said.pop()) == (what == "unheard of")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read from Linux's /proc")
def test_memory_is_that_of_the_parts(tmp_path: Path) -> None:
    small, large = (run(4, memory, str(tmp_path / str(layers)), layers) for layers in (1, 9))
    for few, many in zip(small, large, strict=True):
        grown_mb = 8 * 8  # by so much the whole state is larger
        assert many["parts"] - few["parts"] < grown_mb / 4 + 8
        assert many["whole"] - few["whole"] > grown_mb / 2  # not all of it: some memory was there before


@pytest.mark.slow
def test_the_example_in_the_docs(tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "checkpointing.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", page, flags=re.S) if "like=" in block]
    assert run(2, documented, str(tmp_path), code.replace("1001", "21")) == [list(range(1, 21))] * 2
    assert run(3, documented, str(tmp_path), code.replace("1001", "31")) == [list(range(21, 31))] * 3
