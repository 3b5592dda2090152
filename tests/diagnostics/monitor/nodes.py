"""Recorded nodes: a root with the files of /proc and /sys that a test names."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

PSI = "some avg10={avg} avg60=0.00 avg300=0.00 total={some}\nfull avg10={avg} avg60=0.00 avg300=0.00 total={full}\n"
V2 = "30 24 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = "30 24 0:26 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:9 - cgroup cgroup rw,cpu,cpuacct\n"


def write(root: Path, files: Mapping[str, str]) -> None:
    """Make these files of a root, or replace them."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@contextmanager
def quota_group(share: float) -> Iterator[Path]:
    """A CPU cgroup with a quota of ``share`` of one core; OSError where none can be made."""
    name = f"outlast-test-{uuid.uuid4().hex[:8]}"
    old, new = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")
    folder = (old if (old / "cpu.cfs_quota_us").exists() else new) / name
    folder.mkdir()
    try:
        if folder.parent == old:
            (folder / "cpu.cfs_period_us").write_text("100000")
            (folder / "cpu.cfs_quota_us").write_text(str(int(share * 100000)))
        else:
            (folder / "cpu.max").write_text(f"{int(share * 100000)} 100000")
        yield folder
    finally:
        folder.rmdir()
