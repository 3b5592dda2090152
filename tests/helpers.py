"""Running outlast as a user does, and looking at what it left."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from outlast.events import Record, read_events
from outlast.free_port import free_port
from tests.forked import Job, run_main

TINY = """
[run]
name = "tiny"
dir = "{dir}"

[model]
layers = 2
heads = 2
width = 48
context = 48

[data]
files = ["{{stdlib}}/*.py"]
batch_size = 4

[optim]
warmup_steps = 5

[trainer]
steps = 20
eval_every_steps = 0
eval_batches = 1
bucket_mb = 0.1

[comm]
target = "gradient"
feedback = "ef21"
density = 0.05
warmup_steps = 3
dense_below = 64

[checkpoint]
every_steps = 5
keep_last = 0
"""


def tiny_config(folder: Path, name: str = "run") -> tuple[Path, Path]:
    """A config of seconds, and the run directory it names."""
    run = folder / name
    path = folder / f"{name}.toml"
    path.write_text(TINY.format(dir=run))
    return path, run


def clean_env(**more: str) -> dict[str, str]:
    """This process's environment without what a launcher or scheduler put there."""
    prefixes = ("SLURM_", "OMPI_", "PMI", "TORCHELASTIC_", "OUTLAST_", "MASTER_")
    drop = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK"}
    kept = {k: v for k, v in os.environ.items() if not k.startswith(prefixes) and k not in drop}
    return kept | {"OMP_NUM_THREADS": "1", "COLUMNS": "120"} | more


def outlast(
    *words: str | Path, check: int | None = 0, env: Mapping[str, str] | None = None, timeout_s: float = 180
) -> subprocess.CompletedProcess[str]:
    """``outlast WORDS``, forked; raises unless it exits with ``check`` (None: whatever). Ranks it launches are not."""
    env = clean_env() if env is None else env
    done = run_main("outlast.cli", [*map(str, words)], env=env, timeout_s=timeout_s)
    if check is not None:
        assert done.returncode == check, f"{words} -> {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-6000:]}"
    return done


def torchrun(script: Path, *words: str | Path, timeout_s: float = 180) -> str:
    """``torchrun --nproc-per-node 2 SCRIPT WORDS``, forked; what it printed. Raises unless it exits with 0."""
    command = ["--nproc-per-node", "2", "--master-port", str(free_port()), str(script), *map(str, words)]
    done = run_main("torch.distributed.run", command, env=clean_env(), timeout_s=timeout_s)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def start_outlast(*words: str | Path, log: Path, env: Mapping[str, str] | None = None) -> Job:
    """``outlast WORDS`` in the background, forked, output to ``log``."""
    return Job("outlast.cli", [*map(str, words)], env=clean_env() if env is None else env, stdout=log, stderr=log)


def wait_for(what: Callable[[], Any], timeout_s: float = 90, every_s: float = 0.002) -> Any:
    """The first true answer of ``what``; fails after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while True:
        if answer := what():
            return answer
        assert time.monotonic() < deadline, f"{what} never became true"
        time.sleep(every_s)


def events(run: Path, kind: str | None = None) -> list[Record]:
    """All events of a run, ranks' and launcher's, oldest first."""
    files = [*run.glob("attempts/[0-9]*/events/*.jsonl"), *run.glob("events/*.jsonl")]
    found = [record for file in files for record in read_events(file)]
    return sorted((r for r in found if kind is None or r.kind == kind), key=lambda r: r.t)


def steps_saved(run: Path) -> list[int]:
    """The committed steps of a run's checkpoints."""
    return sorted(
        int(p.parent.name.removeprefix("step_"))
        for p in run.glob("checkpoints/step_*/commit.json")
        if "." not in p.parent.name
    )


def arrays(checkpoint: Path) -> dict[str, npt.NDArray[Any]]:
    """Every array of a checkpoint by path, read by stock zarr."""
    group = zarr.open_group(str(checkpoint), mode="r")
    found = {}
    for part in sorted(path.parent.name for path in checkpoint.glob("*/zarr.json")):
        below = group[part]
        assert isinstance(below, zarr.Group)
        members = below.members(max_depth=None)
        found |= {f"{part}/{name}": np.asarray(a[...]) for name, a in members if isinstance(a, zarr.Array)}
    return found


def values(checkpoint: Path) -> dict[str, Any]:
    """The JSON state of a checkpoint: the attributes of its groups, as written."""
    found = {}
    for path in sorted(checkpoint.rglob("zarr.json")):
        node = json.loads(path.read_text())
        if node["node_type"] == "group":
            found[str(path.parent.relative_to(checkpoint))] = node.get("attributes", {})
    return found
