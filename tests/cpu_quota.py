"""A share of a core for a process that runs already, by the quota of a real cgroup, as batch systems limit theirs."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

_V1, _V2 = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")
_PERIOD_US = 100_000


@contextmanager
def at_most(share: float, pid: int) -> Iterator[None]:
    """All threads of a process have ``share`` of one core together, within the block. Skips where none can be set."""
    is_v1 = (_V1 / "cpu.cfs_quota_us").exists() or (_V1 / "cgroup.procs").exists()
    group = (_V1 if is_v1 else _V2) / f"outlast-test-{secrets.token_hex(4)}"
    before = _group_of(pid, is_v1)
    try:
        group.mkdir()
        if is_v1:
            (group / "cpu.cfs_period_us").write_text(str(_PERIOD_US))
            (group / "cpu.cfs_quota_us").write_text(str(round(share * _PERIOD_US)))
        else:
            (_V2 / "cgroup.subtree_control").write_text("+cpu")
            (group / "cpu.max").write_text(f"{round(share * _PERIOD_US)} {_PERIOD_US}")
        (group / "cgroup.procs").write_text(str(pid))
    except OSError as error:
        if group.exists():
            group.rmdir()
        pytest.skip(f"no quota of processor time can be set here: {error}")
    try:
        yield
    finally:
        if psutil.pid_exists(pid):
            (before / "cgroup.procs").write_text(str(pid))
        group.rmdir()


def _group_of(pid: int, is_v1: bool) -> Path:
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if ("cpu" in controllers.split(",")) if is_v1 else not controllers:
            return (_V1 if is_v1 else _V2) / path.lstrip("/")
    raise AssertionError(f"process {pid} is in no cgroup")
