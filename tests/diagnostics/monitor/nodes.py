"""Recorded nodes: a root with the files of /proc and /sys that a test names."""

from __future__ import annotations

from collections.abc import Mapping
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
