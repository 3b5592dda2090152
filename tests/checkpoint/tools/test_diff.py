"""Comparing two steps: what is equal, what differs, and by how much; as a library and as ``outlast ckpt diff``."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from outlast.checkpoint.tools import Comparison, TensorDifference, ValueDifference, diff
from outlast.cli.main import main
from outlast.errors import CheckpointNotFound, CorruptCheckpoint
from tests.checkpoint.damage import files_of, flip
from tests.checkpoint.helpers import checkpointer, save_by_ranks, save_steps


def save(url: Path, replicated: dict[str, Any], local: dict[str, Any] | None = None, step: int = 1) -> None:
    with checkpointer(url) as saver:
        saver.save(step, replicated=replicated, local=local or {})


def compare(tmp_path: Path, a: dict[str, Any], b: dict[str, Any]) -> Comparison:
    save(tmp_path / "a", a)
    save(tmp_path / "b", b)
    return diff(tmp_path / "a", tmp_path / "b")


def test_a_step_is_equal_to_itself_and_to_the_same_saved_elsewhere(tmp_path: Path) -> None:
    save_by_ranks(tmp_path / "a", 3, 4, world_size=2)
    save_by_ranks(tmp_path / "b", 4, world_size=2, attempt_id="two")
    before = files_of(tmp_path)
    for found in (diff(tmp_path / "a", tmp_path / "a"), diff(tmp_path / "a", tmp_path / "b")):
        assert found.equal
        assert (found.step_a, found.step_b, found.world_size_a, found.world_size_b) == (4, 4, 2, 2)
        assert {(0, "rng/cpu"), (1, "rng/cpu"), (None, "model/blocks.0.norm.bias")} <= set(found.equal_tensors)
        assert (None, "scheduler/worst") in found.equal_values
    assert files_of(tmp_path) == before


def test_how_two_steps_differ(tmp_path: Path) -> None:
    save_by_ranks(tmp_path, 3, 4, world_size=2)
    found = diff(tmp_path, tmp_path, 3, 4)
    assert not found.equal
    by_name = {(item.rank, item.name): item for item in found.tensors}
    assert by_name.keys() == {
        (None, "model/blocks.0.attn.qkv.weight"),
        (None, "model/blocks.0.norm.bias"),
        (None, "optimizer/blocks.0.norm.bias/exp_avg"),
        (None, "optimizer/blocks.0.norm.bias/step"),
        (0, "rng/cpu"),
        (1, "rng/cpu"),
    }
    norm = math.sqrt(sum((i + 3) ** 2 for i in range(24)))
    assert by_name[None, "model/blocks.0.attn.qkv.weight"] == TensorDifference(
        "model/blocks.0.attn.qkv.weight",
        None,
        "content",
        (4, 6),
        "float32",
        (4, 6),
        "float32",
        24,
        1.0,
        pytest.approx(math.sqrt(24) / norm),
    )
    assert set(found.equal_tensors) == {(0, "comm/w/e"), (1, "comm/w/e")}
    assert ValueDifference("data/position", None, "content", [3, 9], [4, 12]) in found.values
    assert (None, "data/seed") in found.equal_values


def test_only_in_one_other_shape_other_dtype(tmp_path: Path) -> None:
    a = {"x": torch.ones(2, 3), "gone": torch.ones(1), "t": torch.ones(2), "both": torch.ones(2), "v": 1, "w": {}}
    b = {"x": torch.ones(3, 2), "new": torch.ones(4), "t": torch.tensor([1.0, 1.5]).bfloat16(), "both": 2, "v": 1.0}
    found = compare(tmp_path, a, b)
    assert {(item.name, item.kind) for item in found.tensors} == {
        ("both", "only in a"),
        ("gone", "only in a"),
        ("new", "only in b"),
        ("t", "dtype"),
        ("x", "shape"),
    }
    by_name = {item.name: item for item in found.tensors}
    assert (by_name["new"].shape_a, by_name["new"].shape_b, by_name["new"].differing) == (None, (4,), None)
    t = by_name["t"]
    assert (t.dtype_a, t.dtype_b, t.differing, t.max_abs) == ("float32", "bfloat16", 1, 0.5)
    assert t.relative_l2 == pytest.approx(0.5 / math.sqrt(2))
    assert {(item.name, item.kind) for item in found.values} == {
        ("both", "only in b"),
        ("v", "content"),
        ("w", "only in a"),
    }


@pytest.mark.parametrize(
    ("a", "b", "differing", "largest", "relative"),
    [
        (torch.tensor([1.0, math.nan, math.inf]), torch.tensor([2.0, math.nan, math.inf]), 1, 1.0, 1.0),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, math.nan]), 1, math.inf, math.inf),
        (torch.tensor([1.0, math.inf]), torch.tensor([1.0, -math.inf]), 1, math.inf, math.inf),
        (torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0]), 1, 0.0, 0.0),
        (torch.zeros(2), torch.tensor([0.0, 3.0]), 1, 3.0, math.inf),
        (torch.tensor([2**62]), torch.tensor([2**62 + 1]), 1, 1.0, 2.0**-62),
        (torch.tensor([-(2**63)]), torch.tensor([2**63 - 1]), 1, 2.0**64, 2.0),
        (torch.tensor([1 + 1j, 2 + 0j]), torch.tensor([1 + 1j, 2 + 3j]), 1, 3.0, 3 / math.sqrt(6)),
        (torch.tensor([True, False]), torch.tensor([True, True]), 1, 1.0, 1.0),
        (
            torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn),
            torch.tensor([1.0, 4.0]).to(torch.float8_e4m3fn),
            1,
            2,
            None,
        ),
        (torch.tensor(5, dtype=torch.uint64), torch.tensor(7, dtype=torch.uint64), 1, 2.0, 0.4),
    ],
    ids=str,
)
def test_odd_numbers(
    tmp_path: Path, a: torch.Tensor, b: torch.Tensor, differing: int, largest: float, relative: float | None
) -> None:
    (item,) = compare(tmp_path, {"x": a}, {"x": b}).tensors
    assert (item.kind, item.differing, item.max_abs) == ("content", differing, largest)
    assert relative is None or item.relative_l2 == pytest.approx(relative)


def test_more_than_a_block_is_compared(tmp_path: Path) -> None:
    a = torch.ones(3 << 20)
    b = a.clone()
    b[[5, (1 << 20) + 1, -1]] = torch.tensor([2.0, 3.0, 1.5])
    (item,) = compare(tmp_path, {"x": a}, {"x": b}).tensors
    assert (item.differing, item.max_abs) == (3, 2.0)
    assert item.relative_l2 == pytest.approx(math.sqrt((1 + 4 + 0.25) / (3 << 20)))


def test_other_number_of_ranks(tmp_path: Path) -> None:
    save_by_ranks(tmp_path / "a", 4, world_size=1)
    save_by_ranks(tmp_path / "b", 4, world_size=2)
    found = diff(tmp_path / "a", tmp_path / "b")
    assert not found.equal
    assert {(item.rank, item.name, item.kind) for item in found.tensors} == {
        (1, "rng/cpu", "only in b"),
        (1, "comm/w/e", "only in b"),
    }


def test_damage_is_told_with_the_file_of_the_right_side(tmp_path: Path) -> None:
    save_steps(tmp_path / "a", 4)
    save_steps(tmp_path / "b", 4)
    flip(tmp_path / "a" / "step_00000004" / "commit.json")
    for sides in (("a", "b"), ("b", "a")):
        with pytest.raises(CorruptCheckpoint, match=r"/a/step_00000004/commit\.json"):
            diff(*(tmp_path / side for side in sides))
    with pytest.raises(CheckpointNotFound, match="step 5"):
        diff(tmp_path / "b", tmp_path / "b", 4, 5)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_by_ranks(tmp_path / "a", 3, 4, world_size=2)
    save(tmp_path / "c", {"x": torch.ones(1), "odd": math.nan}, step=4)
    assert main(["ckpt", "diff", str(tmp_path / "a"), str(tmp_path / "a")]) == 0
    assert "equal: all 8 tensors and 5 values" in capsys.readouterr().out
    assert main(["ckpt", "diff", str(tmp_path / "a"), "--other-step", "3"]) == 1
    said = capsys.readouterr().out
    assert "step_00000004, 2 ranks" in said
    assert "6 tensors and 3 values differ, 2 tensors and 2 values are equal" in said
    assert main(["ckpt", "diff", str(tmp_path / "a"), "--step", "3", "--other-step", "4", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["equal"], told["step_a"], told["step_b"], len(told["tensors"])) == (False, 3, 4, 6)
    assert main(["ckpt", "diff", str(tmp_path / "c"), str(tmp_path / "a"), "--json"]) == 1
    told = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert {"name": "odd", "rank": None, "kind": "only in a", "a": "NaN", "b": None} in told["values"]
    assert main(["ckpt", "diff", str(tmp_path / "a")]) == 2
    assert "give a second URL" in capsys.readouterr().err
    assert main(["ckpt", "diff", str(tmp_path / "a"), str(tmp_path / "none")]) == 1
    assert "CheckpointNotFound" in capsys.readouterr().err


def test_the_folder_of_a_step_is_answered_with_the_options_that_name_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of each action, and of the second URL, which has an option of its own."""
    run = tmp_path / "run" / "checkpoints"
    save_by_ranks(run, 3, 4, world_size=1)
    step = str(run / "step_00000003")
    for words in (["show", step], ["ls", step], ["verify", step]):
        assert main(["ckpt", *words]) == 1
        assert f"this is step 3 itself: give {run} --step 3" in capsys.readouterr().err
    assert main(["ckpt", "prune", step, "--keep-last", "1"]) == 1
    assert f"this is step 3 itself: give {run}\n" in capsys.readouterr().err, "it takes no step"
    for words, option in (([step, step], "--step 3"), ([str(run), step], "--other-step 3")):
        assert main(["ckpt", "diff", *words]) == 1
        assert f"this is step 3 itself: give {run} {option}" in capsys.readouterr().err
    assert main(["ckpt", "show", str(tmp_path / "run")]) == 1
    assert f"this looks like a run's directory: give {run}" in capsys.readouterr().err


def test_names_are_never_broken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of tensors and values, by diff and show, where the table is too wide."""
    monkeypatch.setenv("COLUMNS", "80")
    name = "optimizer.blocks.10.feed_forward.projection.with_a_name_that_fills_a_line.weight"
    value = "a_setting_of_the_learning_rate_scheduler.that_has_a_long_name.betas"
    save(tmp_path, {name: torch.ones(48, 144), value: [0.9, 0.999]}, step=1)
    save(tmp_path, {name: torch.zeros(48, 144), value: [0.8, 0.999]}, step=2)
    assert main(["ckpt", "diff", str(tmp_path), "--step", "1", "--other-step", "2"]) == 1
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert name in lines
    assert "elements 6912 of 6912; max |a-b| 1; relative L2 1" in " ".join(said.split())
    assert value in lines
    assert "a [0.9, 0.999]; b [0.8, 0.999]" in " ".join(said.split())
    assert main(["ckpt", "show", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert name in shown.splitlines()
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["ckpt", "diff", str(tmp_path), "--step", "1", "--other-step", "2"]) == 1
    assert any(line.split()[:3] == ["tensor", "rank", "differs"] for line in capsys.readouterr().out.splitlines())
