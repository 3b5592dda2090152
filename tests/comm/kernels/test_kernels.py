"""The GPU kernels: in Triton's interpreter against the CPU, as compiled code, on a GPU where there is one, and without
Triton. Each in a process of its own, as whether kernels are interpreted is settled when Triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from outlast.comm import kernels
from outlast.comm.kernels import launch
from outlast.errors import MissingDependency

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed: pip install triton")


def run(name: str, cache: Path, *, interpret: bool) -> None:
    """The tests of a file beside this one."""
    env = {**os.environ, "TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    env.pop("TRITON_INTERPRET", None)
    if interpret:
        env["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).with_name(name))]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@needs_triton
def test_interpreted_kernels_give_the_bits_of_the_cpu(tmp_path: Path) -> None:
    run("kernel_checks.py", tmp_path, interpret=True)


@pytest.mark.slow
@needs_triton
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="triton brings CUDA's assembler on Linux alone")
def test_compiled_kernels_round_as_the_cpu(tmp_path: Path) -> None:
    run("kernel_code.py", tmp_path, interpret=False)


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_on_a_gpu_give_the_bits_of_the_cpu(tmp_path: Path) -> None:
    run("kernel_checks.py", tmp_path, interpret=False)


def test_without_triton_they_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    launch.available.cache_clear()
    try:
        assert not kernels.available()
        with pytest.raises(MissingDependency, match="need triton"):
            kernels.add_sparse(torch.zeros(3), torch.tensor([1]), torch.ones(1))
    finally:
        launch.available.cache_clear()


def test_tensors_of_the_host_are_not_theirs() -> None:
    assert not kernels.handles(torch.zeros(3))
