from __future__ import annotations

import dataclasses
import importlib.metadata
import io
import json
import math
import os
import re
import resource
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from outlast.diagnostics.doctor import checks as doctor
from outlast.diagnostics.doctor.allreduce import all_reduce
from outlast.diagnostics.doctor.checks import Check
from outlast.diagnostics.live.shm import shm_directory
from outlast.errors import DiagnosticsError


@pytest.fixture(scope="module")
def checks(tmp_path_factory: pytest.TempPathFactory) -> list[Check]:
    return doctor.run_checks(tmp_path_factory.mktemp("doctor") / "runs")


def named(checks: list[Check], name: str) -> Check:
    return next(check for check in checks if check.name == name)


def test_this_machine_can_run_outlast(checks: list[Check]) -> None:
    assert [check for check in checks if check.status == "FAIL"] == []
    names = {"python", "torch", "numpy", "zarr", "fsspec", "psutil", "backends", "network interface", "host name"}
    names |= {"/dev/shm", "disk space", "run directory", "open files", "core dumps", "all-reduce"}
    assert {check.name for check in checks} == names


def test_the_live_all_reduce_says_how_long_it_took(checks: list[Check]) -> None:
    check = named(checks, "all-reduce")
    assert check.status == "OK"
    assert re.search(
        r"summed 1\.05 MB in [\d.]+ m?s and recorded it \(connected in [\d.]+ m?s, [\d.]+ s in all\)", check.detail
    )


def test_whatever_is_not_ok_says_how_to_fix_it(checks: list[Check]) -> None:
    assert all(check.fix for check in checks if check.status != "OK")
    assert all(check.detail for check in checks)


def test_it_is_printed_and_can_be_json(checks: list[Check]) -> None:
    out = io.StringIO()
    doctor.render(
        [*checks, Check(name="x", status="FAIL", detail="[/] broken", fix="do [this]")], Console(file=out, width=80)
    )
    text = out.getvalue()
    assert "[/] broken" in text
    assert "fix: do [this]" in text
    assert "1 FAIL" in text
    assert json.loads(json.dumps([dataclasses.asdict(check) for check in checks]))[0]["name"] == "python"


def test_a_run_directory_that_cannot_be_written_fails(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    check = doctor._disk_write(file / "runs" if os.geteuid() else file)
    assert check.status == "FAIL"
    assert "--run.dir" in check.fix
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.root
def test_a_read_only_mount_fails(tmp_path: Path) -> None:
    folder = tmp_path / "mount"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)], check=True, timeout=30)
    try:
        check = doctor._disk_write(folder / "runs")
    finally:
        subprocess.run(["umount", str(folder)], check=True, timeout=30)
    assert check.status == "FAIL"
    assert "Read-only file system" in check.detail


def test_a_directory_that_does_not_exist_is_judged_by_the_one_above_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "SLOW_FSYNC_S", math.inf)  # a busy disk is no finding here
    assert doctor._disk_write(tmp_path / "a" / "b").status == "OK"
    assert list(tmp_path.iterdir()) == []


def test_an_interface_that_is_not_there_fails() -> None:
    check = doctor._interface({"GLOO_SOCKET_IFNAME": "nope7"})
    assert check.status == "FAIL"
    assert "nope7" in check.detail
    assert "GLOO_SOCKET_IFNAME" in check.fix
    assert doctor._interface({"GLOO_SOCKET_IFNAME": "lo"}).status == "OK"


@pytest.mark.parametrize(
    ("address", "interface", "host"),
    [(None, "WARN", "WARN"), ("203.0.113.7", "WARN", "FAIL"), ("127.0.0.1", "WARN", "OK"), ("127.0.1.1", "WARN", "OK")],
)
def test_a_host_name_that_leads_elsewhere(
    monkeypatch: pytest.MonkeyPatch, address: str | None, interface: str, host: str
) -> None:
    monkeypatch.setattr(doctor, "_resolve", lambda name: address)
    assert doctor._interface({}).status == interface
    check = doctor._host_name()
    assert check.status == host
    assert host == "OK" or "/etc/hosts" in check.fix


@pytest.mark.parametrize(
    ("version", "status"), [("1.13.1", "FAIL"), ("2.6.0+cu124", "OK"), ("2.13.0a0+git", "OK"), ("3.0", "WARN")]
)
def test_versions(monkeypatch: pytest.MonkeyPatch, version: str, status: str) -> None:
    known = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version if name == "torch" else known(name))
    check = named(doctor._versions(), "torch")
    assert check.status == status
    assert status == "OK" or "pip install 'torch>=2.6,<3'" in check.fix


def test_few_open_files_are_a_warning() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    try:
        check = doctor._open_files()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert check.status == "WARN"
    assert "ulimit -n" in check.fix


def test_an_all_reduce_that_hangs_is_ended_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[Path] = []

    def remembering(run_dir: Path | str) -> Path:
        used.append(shm_directory(run_dir))
        return used[-1]

    monkeypatch.setattr("outlast.diagnostics.doctor.allreduce.shm_directory", remembering)
    with pytest.raises(DiagnosticsError, match=r"within 0\.2 s"):
        all_reduce(timeout_s=0.2)
    check = doctor._all_reduce(timeout_s=0.2)
    assert (check.status, bool(check.fix)) == ("FAIL", True)
    assert len(used) == 2
    assert not any(folder.exists() for folder in used)
