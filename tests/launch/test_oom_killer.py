"""A rank that the kernel killed for memory is told to have been."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from outlast.diagnostics.monitor import find_memory_cgroup
from outlast.launch.failures import RankFailure
from outlast.launch.oom_killer import OomKills
from tests.helpers import clean_env, events
from tests.launch.jobs import QUICK

LIMIT_BYTES = 900 << 20
EATER = (
    "open('/proc/self/oom_score_adj', 'w').write('1000')\n"  # the launcher, which is in the group too, is spared
    "held = []\n"
    "while True: held.append(b'x' * (16 << 20))\n"
)


@pytest.fixture
def group() -> Iterator[Path]:
    """A memory cgroup of its own with a limit."""
    mine = find_memory_cgroup()
    if mine is None:
        pytest.skip("no memory cgroup: this machine mounts none")
    folder = mine.counter.parent / f"outlast-test-{uuid.uuid4().hex[:8]}"
    try:
        folder.mkdir()
        (folder / mine.limit.name).write_text(str(LIMIT_BYTES))
    except OSError as error:
        if folder.exists():
            folder.rmdir()
        pytest.skip(f"no memory cgroup can be made here: {error}")
    yield folder
    folder.rmdir()


@pytest.mark.root
def test_a_rank_that_is_killed_for_memory(tmp_path: Path, root: Path, group: Path) -> None:
    run = tmp_path / "run"
    spec = {
        "command": [sys.executable, "-S", "-c", EATER],
        "run_dir": str(run),
        "config": {**QUICK, "max_restarts": 0},
    }
    code = "import sys; from tests.launch.launcher import main; sys.exit(main())"
    words = [
        "sh",
        "-c",
        f'echo $$ > {group}/cgroup.procs; exec "$@"',
        "sh",
        sys.executable,
        "-c",
        code,
        json.dumps(spec),
    ]
    done = subprocess.run(
        words, env=clean_env(PYTHONPATH=str(root)), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 1, done.stderr
    (failed,) = events(run, "workers_failed")
    (reason,) = failed["reasons"]
    assert reason.startswith("killed by SIGKILL: out of memory: the kernel killed a process of memory cgroup ")
    assert reason.endswith(f"/{group.name}, limit {LIMIT_BYTES / 1e9:.2f} GB")
    assert reason in done.stderr


VERSION_2 = {
    "proc/self/mountinfo": "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n",
    "proc/self/cgroup": "0::/job_7/step_0\n",
    "sys/fs/cgroup/job_7/step_0/memory.events": "low 0\nhigh 0\nmax 412\noom 3\noom_kill 2\noom_group_kill 0\n",
    "sys/fs/cgroup/job_7/step_0/memory.max": "2000000000\n",
    "proc/vmstat": "nr_free_pages 1\noom_kill 5\n",
}
CONTAINER = VERSION_2 | {
    "proc/self/mountinfo": "30 23 0:26 /docker/ab /sys/fs/cgroup ro - cgroup2 cgroup rw\n",
    "proc/self/cgroup": "0::/docker/ab\n",
    "sys/fs/cgroup/memory.events": "oom 0\noom_kill 2\n",
    "sys/fs/cgroup/memory.max": "max\n",
}
VERSION_1 = {
    "proc/self/mountinfo": "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n",
    "proc/self/cgroup": "9:name=systemd:/\n4:memory:/slurm/job_7\n0::/\n",
    "sys/fs/cgroup/memory/slurm/job_7/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
    "sys/fs/cgroup/memory/slurm/job_7/memory.limit_in_bytes": "9223372036854771712\n",
    "proc/vmstat": "oom_kill 5\n",
}
NONE = {"proc/vmstat": "oom_kill 5\n"}


@pytest.mark.parametrize(
    ("files", "name"),
    [(VERSION_2, "/job_7/step_0, limit 2.00 GB"), (CONTAINER, "/docker/ab"), (VERSION_1, "/slurm/job_7"), (NONE, "")],
)
def test_the_kernels_counters(tmp_path: Path, files: dict[str, str], name: str) -> None:
    """As the kernel writes them, for both versions of cgroups, in a container, and without any."""
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    kills = OomKills(tmp_path)
    assert kills.describe(True) == kills.describe(False) == ""
    vmstat = tmp_path / "proc/vmstat"
    vmstat.write_text(vmstat.read_text().replace("oom_kill 5", "oom_kill 6"))
    machine = "probably out of memory: since the start, the kernel killed a process of this machine"
    assert (kills.describe(True), kills.describe(False)) == (machine, "")
    if not name:
        return
    counter = next(tmp_path / path for path in files if path.endswith(("oom_control", "events")))
    if name == "/docker/ab":
        counter = tmp_path / "sys/fs/cgroup/memory.events"
    counter.write_text(counter.read_text().replace("oom_kill 2", "oom_kill 4"))
    group = f"out of memory: the kernel killed 2 processes of memory cgroup {name}"
    assert (kills.describe(True), kills.describe(False)) == (group, group), "a child's death may be what made it fail"


def test_the_reason_says_both() -> None:
    failure = RankFailure(rank=1, pid=2, status=1, message="RuntimeError: a worker died", memory="out of memory: x")
    assert failure.reason == "exited with status 1: out of memory: x: RuntimeError: a worker died"
