"""Replicated state that is not the same on all ranks: found before the commit, named, and no end of the training."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from outlast.checkpoint.tools import list_steps
from outlast.errors import NotDurable
from outlast.events import CheckpointFailed, CheckpointSaved, Event
from tests.checkpoint.sharded import checkpointer, run

TIERS = pytest.mark.parametrize("settings", [{}, {"memory_every_steps": 1}], ids=["storage", "memory"])
ROWS = 600


def state(rank: int, what: str, step: int) -> dict[str, Any]:
    """The same on all ranks, but for what is named; rank 1 is the one that differs."""
    generator = torch.Generator().manual_seed(7)
    model = {name: torch.randn(ROWS, 64, generator=generator) + step for name in ("a", "b")}
    model |= {"norm": torch.ones(4), "half": torch.ones(90, dtype=torch.bfloat16), "none": torch.empty(0)}
    model["t"] = torch.arange(240.0).reshape(12, 20).t()
    values: dict[str, Any] = {"lr": 0.1, "nested": {"z": 1, "a": [1, 2]}, "nan": float("nan")}
    if rank == 1:
        values = dict(reversed(values.items()))
        if what == "model":
            model["a"] += 1e-3
        elif what == "small":
            model["norm"][2] = 1.0000001
        elif what == "element":
            model["b"][ROWS - 5, 3] += 1
        elif what == "strided":
            model["t"] = model["t"] + 1
        elif what == "value":
            values["nested"] = {"z": 1, "a": [1, 3]}
        elif what == "many":
            values |= {f"v{number:04}": number + (number == 700) for number in range(1000)}
    if rank != 1 and what == "many":
        values |= {f"v{number:04}": number for number in range(1000)}
    return {"model": model, "values": values, "flag": "on" if rank != 1 or what != "top" else "off"}


def saves(rank: int, url: str, whats: list[str], settings: dict[str, Any]) -> list[tuple[int, str]]:
    """Failures of saves of these states and of a good one at the end; training goes on."""
    events: list[Event] = []
    with checkpointer(url, rank, events, **settings) as saver:
        for step, what in enumerate([*whats, ""], 1):
            saver.save(step, replicated=state(rank, what, step), local={"rank": rank}, eager=("flag",))
            saver.wait_copied()
    durable = {event.step for event in events if isinstance(event, CheckpointSaved)}
    failures = [(event.step, event.reason) for event in events if isinstance(event, CheckpointFailed)]
    assert durable.isdisjoint(step for step, _ in failures)
    return failures


WRONG = ["model", "", "small", "element", "strided", "value", "many", "top"]
SAID = {
    1: "the tensor 'model/a', chunk c.",
    3: "the tensor 'model/norm': CRC32C ",
    4: "the tensor 'model/b', chunk c.",
    5: "the tensor 'model/t'",
    6: "the value 'values/nested'",
    7: "the value 'values/v0700 to values/v070",
    8: "the value 'flag'",
}


@pytest.mark.parametrize("compared", ["sampled", "whole"])
@TIERS
def test_what_differs_is_named_on_all_ranks(tmp_path: Path, settings: dict[str, Any], compared: str) -> None:
    settings = {**settings, "compare_replicas": compared, "chunk_mb": 0.02}
    for failures in run(2, saves, str(tmp_path), WRONG, settings):
        assert {step for step, _ in failures} == SAID.keys()
        for step, reason in failures:
            assert "of the replicated state are not the same on all ranks" in reason
            assert "on rank 0" in reason
            assert "on rank 1" in reason
            assert SAID[step] in reason or (step == 7 and "values/v0" in reason), reason
    assert [info.step for info in list_steps(tmp_path) if info.status == "committed"] == [2, 9]


def test_of_three_ranks_one(tmp_path: Path) -> None:
    for failures in run(3, saves, str(tmp_path), ["model"], {"chunk_mb": 0.02}):
        ((step, reason),) = failures
        assert step == 1
        assert "on rank 1" in reason


def test_a_comparison_that_is_off(tmp_path: Path) -> None:
    assert run(2, saves, str(tmp_path), ["model", "value"], {"compare_replicas": "off"}) == [[], []]


def large(rank: int, url: str, compared: str, at: int) -> list[str]:
    """One element of 3 MiB differs."""
    tensor = torch.zeros(3 << 18)
    tensor[at] = rank
    events: list[Event] = []
    with suppress(NotDurable), checkpointer(url, rank, events, compare_replicas=compared, chunk_mb=32) as saver:
        saver.save(2, replicated={"model": {"w": tensor}}, local={})
        saver.wait_copied()
    return [event.reason for event in events if isinstance(event, CheckpointFailed)]


@pytest.mark.parametrize(
    ("compared", "at", "found"),
    [
        ("whole", 100_000, True),
        ("sampled", 100_000, False),  # which the docs say
        ("sampled", (2 * 4096) // 4 + 5, True),  # the block of step 2
        ("sampled", (3 << 18) - 1, True),
    ],
)
def test_one_element_of_many(tmp_path: Path, compared: str, at: int, found: bool) -> None:
    assert all(bool(failures) == found for failures in run(2, large, str(tmp_path), compared, at))


def copies(rank: int, url: str) -> list[str]:
    """DTensors: copies of shards on a mesh of two by two, and whole copies; one rank of four has another shard."""
    mesh = init_device_mesh("cpu", (2, 2))
    full = torch.arange(64.0).reshape(16, 4)
    placements = ([Replicate(), Shard(0)], [Shard(0), Shard(1)], [Replicate(), Replicate()])
    names = ("hsdp", "shards", "copied")
    events: list[Event] = []
    with suppress(NotDurable), checkpointer(url, rank, events) as saver:
        for step, wrong in enumerate(("", *names), 1):
            tensors = {
                name: distribute_tensor(full.clone(), mesh, of, src_data_rank=None)
                for name, of in zip(names, placements, strict=True)
            }
            if wrong and rank == 3:
                tensors[wrong] = DTensor.from_local(
                    tensors[wrong].to_local() + 1, mesh, tensors[wrong].placements, run_check=False
                )
            saver.save(step, replicated={"model": tensors}, local={})
            saver.wait_copied()
    dist.barrier()
    return [f"{event.step} {event.reason}" for event in events if isinstance(event, CheckpointFailed)]


def test_copies_of_shards(tmp_path: Path) -> None:
    for failures in run(4, copies, str(tmp_path)):
        hsdp, copied = failures  # nobody else has what is in a shard without copies
        assert hsdp.startswith("2 ")
        assert "'model/hsdp'" in hsdp
        assert "on rank 3" in hsdp
        assert copied.startswith("4 ")
        assert "'model/copied'" in copied
