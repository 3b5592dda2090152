"""Whether this machine can run outlast: every check returns OK, WARN or FAIL, what it found, and how to fix it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import psutil

from outlast.diagnostics import formatting as fmt
from outlast.diagnostics.doctor.allreduce import all_reduce
from outlast.diagnostics.live.shm import SHM_ROOT
from outlast.errors import DiagnosticsError

if TYPE_CHECKING:
    from rich.console import Console

Status = Literal["OK", "WARN", "FAIL"]

LEAST_PYTHON = (3, 11)
VERSIONS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "torch": ((2, 6), (3,)),
    "numpy": ((1, 26), (3,)),
    "zarr": ((3,), (4,)),
    "fsspec": ((2024, 6), (3000,)),
    "psutil": ((6,), (8,)),
}
"""For each package: the oldest version that works, and the first one that is untested."""
LEAST_SHM_BYTES = 64 * 2**20
LEAST_DISK_BYTES = 2 * 2**30
LEAST_FILES = 4096
FSYNC_BYTES = 4 * 2**20
SLOW_FSYNC_S = 2.0
PROBE_TIMEOUT_S = 60.0
COLOURS = {"OK": "green", "WARN": "yellow", "FAIL": "red"}


@dataclass(frozen=True, kw_only=True)
class Check:
    """The result of one check."""

    name: str
    status: Status
    detail: str
    fix: str = ""
    """How to fix it; never empty unless the status is OK."""


def run_checks(run_dir: Path | str = "runs", *, environ: Mapping[str, str] | None = None) -> list[Check]:
    """Run every check; returns them in the order in which to fix them. Leaves nothing behind.

    Args:
        run_dir: the directory that runs are written to; it need not exist.
        environ: where ``GLOO_SOCKET_IFNAME`` is looked up; None takes ``os.environ``.
    """
    environ = os.environ if environ is None else environ
    checks: list[Check] = [*_versions(), *_backends(), _interface(environ), _host_name(), _shared_memory()]
    checks += [_disk_free(Path(run_dir)), _disk_write(Path(run_dir)), _open_files(), _core_size(), _all_reduce()]
    return checks


def render(checks: Sequence[Check], console: Console) -> None:
    """Print the checks as a table, each with its fix, and a line with the counts."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("", "check", "result"):
        table.add_column(column, overflow="fold")
    for check in checks:
        detail = escape(check.detail) + (f"\n[bold]fix:[/] {escape(check.fix)}" if check.fix else "")
        table.add_row(f"[bold {COLOURS[check.status]}]{check.status}[/]", escape(check.name), detail)
    console.print(table)
    counts = {status: sum(check.status == status for check in checks) for status in COLOURS}
    console.print(f"{counts['OK']} OK, {counts['WARN']} WARN, {counts['FAIL']} FAIL")


def _versions() -> list[Check]:
    checks = []
    python = platform.python_version()
    least = ".".join(map(str, LEAST_PYTHON))
    if sys.version_info >= LEAST_PYTHON:
        checks.append(Check(name="python", status="OK", detail=f"{python} ({sys.executable})"))
    else:
        detail = f"{python}; at least {least} is required"
        checks.append(
            Check(
                name="python", status="FAIL", detail=detail, fix=f"create the environment with Python {least} or later"
            )
        )
    for package, (oldest, beyond) in VERSIONS.items():
        required = f">={'.'.join(map(str, oldest))},<{'.'.join(map(str, beyond))}"
        try:
            installed = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            fix = f"pip install '{package}{required}'"
            checks.append(Check(name=package, status="FAIL", detail="not installed", fix=fix))
            continue
        numbers = _numbers(installed)
        if numbers < oldest:
            fix = f"pip install '{package}{required}'"
            checks.append(Check(name=package, status="FAIL", detail=f"{installed} is too old: {required}", fix=fix))
        elif numbers >= beyond:
            fix = f"if something breaks: pip install '{package}{required}'"
            checks.append(
                Check(
                    name=package,
                    status="WARN",
                    detail=f"{installed} is newer than the tested versions: {required}",
                    fix=fix,
                )
            )
        else:
            checks.append(Check(name=package, status="OK", detail=installed))
    return checks


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: ``2.13.0+cpu`` is (2, 13, 0)."""
    found = []
    for part in version.partition("+")[0].split("."):
        digits = "".join(character for character in part if character.isdigit())
        if not part[:1].isdigit():
            break
        found.append(int(digits))
    return tuple(found)


def _backends() -> list[Check]:
    try:
        import torch
        import torch.distributed as dist
    except (ImportError, OSError) as error:
        fix = "reinstall torch: pip install --force-reinstall torch"
        return [Check(name="backends", status="FAIL", detail=f"torch cannot be imported: {error}", fix=fix)]
    if not dist.is_available():
        fix = "install a torch built with USE_DISTRIBUTED=1, as on PyPI"
        return [Check(name="backends", status="FAIL", detail="torch was built without torch.distributed", fix=fix)]
    available = {
        "gloo": dist.is_gloo_available(),
        "nccl": dist.is_nccl_available(),
        "mpi": dist.is_mpi_available(),
    }
    listed = ", ".join(f"{name} {'yes' if found else 'no'}" for name, found in available.items())
    devices = torch.cuda.device_count()
    if not available["gloo"]:
        fix = "install a torch built with gloo, as on PyPI"
        return [Check(name="backends", status="FAIL", detail=f"{listed}; training on CPUs needs gloo", fix=fix)]
    if devices and not available["nccl"]:
        fix = "install a torch built with NCCL, or train on CPUs"
        return [Check(name="backends", status="FAIL", detail=f"{devices} CUDA devices, but {listed}", fix=fix)]
    names = ", ".join(torch.cuda.get_device_name(index) for index in range(devices))
    gpus = (
        f"{devices} CUDA device{'s' if devices != 1 else ''} ({names})"
        if devices
        else "no CUDA device: training runs on CPUs"
    )
    return [Check(name="backends", status="OK", detail=f"{listed}; {gpus}")]


def _interface(environ: Mapping[str, str]) -> Check:
    """The interface that gloo is set to use, or finds by the host's name."""
    name = "network interface"
    up = sorted(one for one, state in psutil.net_if_stats().items() if state.isup)
    names = [one for one in environ.get("GLOO_SOCKET_IFNAME", "").split(",") if one]
    if names:
        down = [one for one in names if one not in up]
        if down:
            fix = f"export GLOO_SOCKET_IFNAME=NAME, with one of: {', '.join(up)}"
            detail = f"GLOO_SOCKET_IFNAME names {', '.join(down)}, which does not exist or is down"
            return Check(name=name, status="FAIL", detail=detail, fix=fix)
        return Check(name=name, status="OK", detail=f"{', '.join(names)} (GLOO_SOCKET_IFNAME)")
    fix = (
        f"to use several machines, export GLOO_SOCKET_IFNAME=NAME with the interface that reaches them: {', '.join(up)}"
    )
    address = _resolve(socket.gethostname())
    carrier = _interface_of(address) if address is not None else None
    if carrier is None:
        detail = "gloo finds none by the host's name and falls back to loopback; ranks on other machines cannot connect"
        return Check(name=name, status="WARN", detail=detail, fix=fix)
    if address is not None and address.startswith("127."):
        detail = f"gloo uses {carrier} ({address}), which is enough for one machine; others cannot connect"
        return Check(name=name, status="WARN", detail=detail, fix=fix)
    return Check(name=name, status="OK", detail=f"gloo uses {carrier} ({address}), by the host's name")


def _host_name() -> Check:
    """Whether the host's name resolves to an address of this machine."""
    host = socket.gethostname()
    address = _resolve(host)
    fix = f"add a line to /etc/hosts: ADDRESS {host}"
    if address is None:
        detail = f"{host} does not resolve; rendezvous by name fails"
        return Check(name="host name", status="WARN", detail=detail, fix=fix)
    if _interface_of(address) is None:
        detail = f"{host} resolves to {address}, which is not an address of this machine; rendezvous by name fails"
        return Check(name="host name", status="FAIL", detail=detail, fix=fix)
    return Check(name="host name", status="OK", detail=f"{host} is {address}")


def _resolve(host: str) -> str | None:
    try:
        return socket.gethostbyname(host)
    except OSError:
        return None


def _interface_of(address: str) -> str | None:
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address == address for one in addresses):
            return str(name)
    # all of 127.0.0.0/8 is the loopback interface, whatever address it shows (Debian uses 127.0.1.1)
    return "lo" if address.startswith("127.") else None


def _shared_memory() -> Check:
    fix = f"enlarge it: mount -o remount,size=1g {SHM_ROOT}; in a container: docker run --shm-size=1g"
    try:
        usage = shutil.disk_usage(SHM_ROOT)
    except OSError as error:
        return Check(name=str(SHM_ROOT), status="FAIL", detail=f"cannot be used: {error.strerror}", fix=fix)
    detail = f"{fmt.size(usage.free)} free of {fmt.size(usage.total)}"
    if not os.access(SHM_ROOT, os.W_OK):
        return Check(name=str(SHM_ROOT), status="FAIL", detail=f"{detail}, not writable", fix=f"chmod 1777 {SHM_ROOT}")
    if usage.free < LEAST_SHM_BYTES:
        return Check(
            name=str(SHM_ROOT), status="WARN", detail=f"{detail}: less than {fmt.size(LEAST_SHM_BYTES)}", fix=fix
        )
    return Check(name=str(SHM_ROOT), status="OK", detail=detail)


def _nearest_folder(path: Path) -> Path:
    """``path``, or the nearest folder above it that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _disk_free(run_dir: Path) -> Check:
    folder = _nearest_folder(run_dir)
    free = shutil.disk_usage(folder).free
    detail = f"{fmt.size(free)} free at {folder}"
    if free < LEAST_DISK_BYTES:
        fix = "free space, or use another disk: --run.dir OTHER"
        return Check(name="disk space", status="WARN", detail=f"{detail}, which is little for checkpoints", fix=fix)
    return Check(name="disk space", status="OK", detail=detail)


def _disk_write(run_dir: Path) -> Check:
    """Write and fsync 4 MiB in the run directory, or in the nearest folder above it that exists."""
    folder = _nearest_folder(run_dir)
    name = "run directory"
    fix = f"make {folder} a writable directory, or use another one: --run.dir OTHER"
    if not folder.is_dir():
        return Check(name=name, status="FAIL", detail=f"{folder} is not a directory", fix=fix)
    start_s = time.perf_counter()
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".outlast-doctor-") as file:
            file.write(bytes(FSYNC_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return Check(name=name, status="FAIL", detail=f"{folder} cannot be written: {error.strerror}", fix=fix)
    took_s = time.perf_counter() - start_s
    detail = f"{folder}: 4 MiB written and synced in {fmt.duration(took_s)}"
    if took_s > SLOW_FSYNC_S:
        return Check(name=name, status="WARN", detail=detail, fix="use a faster disk: --run.dir OTHER")
    return Check(name=name, status="OK", detail=detail)


def _open_files() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < LEAST_FILES:
        allowed = "unlimited" if hard == resource.RLIM_INFINITY else str(hard)
        detail = f"at most {soft} (hard limit {allowed}); many ranks and checkpoint files need more"
        return Check(
            name="open files", status="WARN", detail=detail, fix=f"run ulimit -n {LEAST_FILES} before the launch"
        )
    return Check(name="open files", status="OK", detail=f"at most {'unlimited' if soft < 0 else soft}")


def _core_size() -> Check:
    soft, _ = resource.getrlimit(resource.RLIMIT_CORE)
    detail = "disabled" if soft == 0 else "enabled: a rank that crashes writes one, and they can fill the disk"
    return Check(name="core dumps", status="OK", detail=detail)


def _all_reduce(timeout_s: float = PROBE_TIMEOUT_S) -> Check:
    """One all-reduce of 1 MiB between two processes, with gloo on the loopback interface."""
    name = "all-reduce"
    try:
        done = all_reduce(timeout_s)
    except DiagnosticsError as error:
        return Check(name=name, status="FAIL", detail=error.what, fix=error.fix)
    detail = (
        f"two ranks over gloo summed {fmt.size(done.nbytes)} in {fmt.duration(done.all_reduce_s)} and recorded it "
        f"(connected in {fmt.duration(done.connect_s)}, {fmt.duration(done.whole_s)} in all)"
    )
    return Check(name=name, status="OK", detail=detail)
