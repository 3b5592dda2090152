"""A share of a core, by the quota of a real cgroup, as batch systems limit theirs."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest

_V1, _V2 = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")
_PERIOD_US = 100_000


@contextmanager
def quota_group(share: float) -> Iterator[Path]:
    """A CPU cgroup with a quota of ``share`` of one core; OSError where none can be made."""
    is_v1 = (_V1 / "cgroup.procs").exists()
    folder = (_V1 if is_v1 else _V2) / f"outlast-test-{secrets.token_hex(4)}"
    folder.mkdir()
    try:
        if is_v1:
            (folder / "cpu.cfs_period_us").write_text(str(_PERIOD_US))
            (folder / "cpu.cfs_quota_us").write_text(str(round(share * _PERIOD_US)))
        else:
            (_V2 / "cgroup.subtree_control").write_text("+cpu")
            (folder / "cpu.max").write_text(f"{round(share * _PERIOD_US)} {_PERIOD_US}")
        yield folder
    finally:
        folder.rmdir()


@contextmanager
def at_most(share: float, pid: int) -> Iterator[None]:
    """All threads of a process have ``share`` of one core together, within the block. Skips where none can be set."""
    with ExitStack() as stack:
        try:
            group = stack.enter_context(quota_group(share))
            before = _group_of(pid, group)
            (group / "cgroup.procs").write_text(str(pid))
        except OSError as error:
            pytest.skip(f"no quota of processor time can be set here: {error}")
        try:
            yield
        finally:
            if psutil.pid_exists(pid):
                (before / "cgroup.procs").write_text(str(pid))


def _group_of(pid: int, group: Path) -> Path:
    """The cgroup that a process is in, of the hierarchy of ``group``."""
    is_v1 = group.parent == _V1
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if ("cpu" in controllers.split(",")) if is_v1 else not controllers:
            return group.parent / path.lstrip("/")
    raise AssertionError(f"process {pid} is in no cgroup")
