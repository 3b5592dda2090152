"""The README's first command, as a newcomer runs it, and the package as it is installed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import clean_env, events, steps_saved


@pytest.mark.slow
def test_make_train_learns(root: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    if not (Path(sys.prefix) / ".ready").exists():
        pytest.skip(f"{sys.prefix} was not made by make: run the suite with `make test`")
    command = ["make", "--no-print-directory", "train", f"VENV={sys.prefix}", f"ARGS=--run.dir {run}"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=240, env=clean_env())
    assert done.returncode == 0, done.stderr[-4000:]
    assert "outlast launch configs/stdlib_gpt.toml --nproc-per-node 2" in done.stdout
    losses = [record["loss"] for record in events(run, "eval") if record.rank == 0]
    assert 5.3 < losses[0] < 5.8
    assert losses[-1] < 2.6
    summary = done.stdout[-1500:]
    assert re.search(r"held-out loss  5\.\d+ at step 0, 2\.\d+ at step 200", summary), summary
    for word in ("wire", "dense", "checkpoint", str(run / "report.html")):
        assert word in summary.replace("\n", ""), (word, summary)
    assert (run / "report.html").exists()
    assert len(steps_saved(run)) == 3


@pytest.mark.slow
def test_the_wheel_runs_in_an_empty_environment(root: Path, tmp_path: Path) -> None:
    env = clean_env()
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # the first process compiles what it imports, for all that follow
    env.pop("PYTHONPATH", None)  # nothing but what is installed

    def run(*command: str | Path, cwd: Path = tmp_path) -> str:
        done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, timeout=280, env=env)
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path / "dist", root)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    install = ["install", "--quiet", "--no-compile", "-c", root / "constraints.txt", wheel]
    run(sys.executable, "-m", "pip", "--python", python, *install)
    config = tmp_path / "mine.toml"
    config.write_text((root / "configs" / "stdlib_gpt.toml").read_text())
    small = ["--model.layers", "1", "--model.width", "32", "--trainer.steps", "10", "--data.batch-size", "2"]
    out = run(python.parent / "outlast", "launch", config, "--nproc-per-node", "2", *small)
    assert "step 10/10" in out
    where = run(python, "-c", "import outlast; print(outlast.__file__)")
    assert where.startswith(str(tmp_path / "venv"))
    assert (tmp_path / "runs" / "stdlib_gpt" / "report.html").exists()
