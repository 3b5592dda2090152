"""``compressor = "auto"``: dense where dense wins, compressed on slow links, the same on every rank, resumable."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.cluster import Cluster
from outlast.comm import CommConfig
from outlast.comm.auto.policy import (
    DENSE_STEPS,
    WORTH,
    Candidate,
    Link,
    Timing,
    candidates,
    choose,
    predict,
    wire_bytes,
)
from outlast.free_port import free_port
from tests.comm.ranks import Ranks
from tests.comm.toy import backward, estimates, frozen, gradients, wrap

AUTO = CommConfig(compressor="auto", target="update", feedback="ef14")


def options(dense_mb: float, small_mb: float, codec_s: float) -> list[Candidate]:
    dense, small, _ = candidates(AUTO)
    return [Candidate(dense, int(dense_mb * 1e6), 2, 0.0), Candidate(small, int(small_mb * 1e6), 1, codec_s)]


def test_slow_links_are_compressed_and_fast_ones_are_not() -> None:
    timing = Timing(step_s=0.5, hidden_s=0.3)
    slow = choose(options(65, 1.4, 0.04), Link(1e-3, 25e6), timing, 11)
    assert slow.config.compressor == "topk"
    assert slow.why.startswith("compressing: predicted ef14 topk 2% int8 of updates 0.54")
    assert "links 25 MB/s" in slow.why
    fast = choose(options(65, 1.4, 0.04), Link(1e-4, 12.5e9), timing, 11)
    assert fast.config.compressor == "dense"
    assert fast.why.startswith("staying dense")


@given(
    st.floats(0.1, 1e4), st.floats(0.01, 1e3), st.floats(0, 1), st.floats(1e5, 1e11), st.floats(1e-6, 0.1),
    st.floats(0.001, 10), st.floats(0, 1), st.integers(1, 100),
)  # fmt: skip
def test_what_is_chosen_is_never_predicted_slower_than_dense(
    dense_mb: float, small_mb: float, codec_s: float, rate: float, latency_s: float, step_s: float, share: float, n: int
) -> None:
    both = options(dense_mb, small_mb, codec_s)
    link, timing = Link(latency_s, rate), Timing(step_s, share * step_s)
    chosen = choose(both, link, timing, n)
    seconds = {option.config: predict(option, link, timing, n) for option in both}
    if chosen.config.compressor == "dense":
        assert seconds[both[1].config] >= WORTH * seconds[both[0].config]
    else:
        assert seconds[chosen.config] < WORTH * seconds[both[0].config]


def test_bytes_are_those_that_are_sent() -> None:
    shapes = {(384, 1536): 2, (384, 384): 1}
    dense = CommConfig(compressor="dense")
    entries = 2 * 384 * 1536 + 384 * 384
    assert wire_bytes(dense, shapes, 1000, 4) == pytest.approx(6 * (entries + 1000), abs=8)
    topk = CommConfig(density=0.01, values="int8")
    assert wire_bytes(topk, shapes, 0, 4) < 3 * 0.03 * entries
    assert wire_bytes(replace(topk, transport="two-phase"), shapes, 0, 4) == wire_bytes(topk, shapes, 0, 4) // 2


def run_auto(rank: int) -> Any:
    steps = DENSE_STEPS + 4
    ddp, reducer = wrap({"compressor": "auto", "target": "update"}, cap_mb=0.01)
    seen = []
    for step in range(1, steps + 1):
        backward(ddp, gradients(step, rank))
        seen.append(estimates(ddp.module))
        if step == DENSE_STEPS:
            assert reducer.choice is None
    choice = reducer.choice
    assert choice is not None
    meta = reducer.state_dict()["meta"]
    reducer.close()
    return seen, choice.why, choice.config, meta["method"]["compressor"]


def test_all_ranks_choose_alike(three_ranks: Ranks) -> None:
    """Which, is for the machine to say: a busy one looks like one with slow links."""
    found = three_ranks.run(run_auto)
    assert all(one == found[0] for one in found)
    _, why, config, saved = found[0]
    assert why.startswith("staying dense" if config.compressor == "dense" else "compressing")
    assert config.compressor == saved


def run_resumed(rank: int) -> bool:
    """A run that goes on has the choice of the run it goes on from, here one that was made elsewhere."""
    chosen = {"compressor": "topk", "target": "update", "values": "int8", "density": 0.02}
    ddp, reducer = wrap(chosen, cap_mb=0.01)
    for step in range(1, 7):
        backward(ddp, gradients(step, rank))
    saved = reducer.state_dict()
    _, auto = wrap({"compressor": "auto", "target": "update"})
    auto.load_state_dict(saved)
    same = frozen(auto.state_dict()) == frozen(saved)
    reducer.close()
    auto.close()
    return same


def test_a_choice_is_part_of_the_state(three_ranks: Ranks) -> None:
    assert all(three_ranks.run(run_resumed))


def worker() -> None:
    """Run as a process of its own on an emulated host: print what was chosen."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    model = torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(4)))
    ddp = torch.nn.parallel.DistributedDataParallel(model, bucket_cap_mb=1)
    from outlast.comm import attach

    reducer = attach(ddp, compressor="auto", target="update")
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    for _ in range(DENSE_STEPS + 2):
        ddp(torch.randn(4, 512, generator=generator)).square().mean().backward()
    assert reducer.choice is not None
    print(reducer.choice.why, flush=True)
    reducer.close()
    torch.distributed.destroy_process_group()


@pytest.mark.root
@pytest.mark.slow
def test_on_slow_links_it_compresses(root: Path) -> None:
    with Cluster(2, rate="40mbit", prefix="olp", subnet="10.96.0") as cluster:
        env = dict(os.environ, MASTER_ADDR=cluster.hosts[0].address, MASTER_PORT=str(free_port()), WORLD_SIZE="2")
        code = "from tests.comm.auto.test_policy import worker; worker()"
        ranks = [
            host.popen(
                [sys.executable, "-c", code],
                env=env | {"RANK": str(host.index)},
                cwd=root,
                stdout=subprocess.PIPE,
                text=True,
            )
            for host in cluster.hosts
        ]
        said = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert said[0] == said[1]
    assert said[0].startswith("compressing: predicted ef14 topk"), said[0]
    rate = float(said[0].split("links ")[1].split(" MB/s")[0])
    assert 2 < rate < 10, "40 Mbit/s are 5 MB/s"
