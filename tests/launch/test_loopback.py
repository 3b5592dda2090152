"""Hosts whose loopback interface is not what others have, as network namespaces."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers import clean_env
from tests.launch.jobs import QUICK, RANK

pytestmark = pytest.mark.root


@pytest.fixture
def host() -> Iterator[Callable[..., list[str]]]:
    """Makes the command that runs words on a host of its own, after it has run ``ip`` commands there."""
    name = f"ol{uuid.uuid4().hex[:10]}"
    subprocess.run(["ip", "netns", "add", name], check=True)

    def command(*words: str, setting: tuple[str, ...]) -> list[str]:
        for line in setting:
            subprocess.run(["ip", "-n", name, *line.split()], check=True)
        return ["ip", "netns", "exec", name, *words]

    yield command
    subprocess.run(["ip", "netns", "del", name], check=True)


def test_a_host_whose_loopback_has_ipv6_alone(tmp_path: Path, root: Path, host: Callable[..., list[str]]) -> None:
    spec = {
        "command": [sys.executable, RANK, str(tmp_path / "run"), "3"],
        "run_dir": str(tmp_path / "run"),
        "flags": {"nproc_per_node": "2"},
        "config": {**QUICK, "max_restarts": 0},
    }
    code = "import sys; from tests.launch.launcher import main; sys.exit(main())"
    words = host(
        *(sys.executable, "-c", code, json.dumps(spec)),
        setting=("link set lo up", "addr del 127.0.0.1/8 dev lo"),
    )
    done = subprocess.run(
        words, env=clean_env(PYTHONPATH=str(root)), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "rank 0 of 2 done in generation 0" in done.stdout


def test_a_host_without_loopback_says_so(root: Path, host: Callable[..., list[str]]) -> None:
    code = "from outlast.launch.place import find_place; find_place()"
    done = subprocess.run(
        host(
            sys.executable,
            "-c",
            code,
            setting=("link set lo up", "addr del 127.0.0.1/8 dev lo", "addr del ::1/128 dev lo"),
        ),
        env=clean_env(PYTHONPATH=str(root)),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert "LaunchError: this host has no loopback address (" in done.stderr
    assert "ip link set lo up" in done.stderr
    assert "127.0.0.1: Cannot assign requested address; ::1: Cannot assign requested address" in done.stderr
