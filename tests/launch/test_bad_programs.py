"""Programs that cannot run, or end where they should not: said in words, and no rank is started again in vain."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from outlast.cli.main import main
from outlast.errors import ConfigError
from outlast.launch.program import Program, find_module
from tests.helpers import clean_env, events, outlast

COUNT = 'import os; open(os.environ["STARTS"] + os.environ["RANK"], "a").write("x")\n'
"""Each start of a rank leaves one letter."""


def launch(tmp_path: Path, *words: str | Path, check: int, ranks: int = 2, restarts: int = 3) -> str:
    env = clean_env(STARTS=str(tmp_path / "starts_"))
    flags = ["--nproc-per-node", str(ranks), "--max-restarts", str(restarts), "--run-dir", tmp_path / "run"]
    done = outlast("launch", *flags, *words, env=env, check=check)
    return done.stdout + done.stderr


def starts(tmp_path: Path) -> dict[int, int]:
    found = sorted(tmp_path.glob("starts_*"))
    return {int(path.name.removeprefix("starts_")): len(path.read_text()) for path in found}


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("import a_module_that_is_not_there\n", "ModuleNotFoundError: No module named 'a_module_that_is_not_there'"),
        ("from os import no_such_name\n", "ImportError: cannot import name 'no_such_name'"),
        ("import broken\n", "broken.py"),
        ("from outlast.errors import ConfigError; raise ConfigError('no such compressor')\n", "no such compressor"),
        ("import argparse; argparse.ArgumentParser(prog='t').parse_args(['--lrr'])\n", "unrecognized arguments: --lrr"),
    ],
    ids=["module", "name", "syntax", "setting", "arguments"],
)
def test_what_would_fail_again_is_not_started_again(tmp_path: Path, code: str, told: str) -> None:
    (tmp_path / "broken.py").write_text("def f(:\n")
    script = tmp_path / "train.py"
    script.write_text(COUNT + code)
    said = launch(tmp_path, script, check=1)
    assert told in said
    assert "a restart would not fix it" in said
    assert "runner.py" not in said
    assert set(starts(tmp_path).values()) == {1}, "each rank ran once"
    (started,) = events(tmp_path / "run", "workers_started")
    assert started["ranks"] == [0, 1]


@pytest.mark.parametrize(
    ("code", "told", "status"),
    [
        ("import sys; sys.exit('no data at /data')", "no data at /data", 1),
        ("import os; os._exit(3)", "exited with status 3", 3),
        ("import sys; sys.stdout.buffer.write(bytes(range(256)) * 9); sys.exit('\\x1b[2Jend')", "\\x1b[2Jend", 1),
    ],
    ids=["text", "exit", "binary"],
)
def test_how_it_ended_is_told(tmp_path: Path, code: str, told: str, status: int) -> None:
    """Rank 0's words too, which go to the console; and other people's bytes reach no terminal as they are."""
    script = tmp_path / "train.py"
    script.write_text(COUNT + code + "\n")
    said = launch(tmp_path, script, check=1, ranks=1, restarts=1)
    (error,) = [line for line in said.splitlines() if line.startswith("  rank 0 on")]
    assert f"exited with status {status}" in error
    assert told in said
    assert told in error or status == 3
    assert starts(tmp_path) == {0: 2}, "what may be mended by a restart gets one"
    reasons = [one["reasons"] for one in events(tmp_path / "run", "workers_failed")]
    assert len(reasons) == 2


def test_a_script_that_disappears(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(COUNT + "import os; os.path.exists(__file__) and os.unlink(__file__); os._exit(1)\n")
    said = launch(tmp_path, script, check=1, ranks=1, restarts=2)
    assert f"can't open file '{script}'" in said
    assert "No such file or directory" in said
    assert starts(tmp_path) == {0: 1}
    assert len(events(tmp_path / "run", "workers_started")) == 3, "it was there once, and may come back"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([""], "the script's name is empty"),
        (["pipe"], "pipe is no file"),
        (["/dev/null"], "/dev/null is no file"),
        (["missing.py"], "no script at missing.py"),
        (["folder"], "a directory without a __main__.py"),
        (["-m", "package.broken"], "broken.py, line 1 is not valid Python"),
        (["-m", "package"], "a package without a __main__ module"),
        (["-m", "space.inner.no"], "no module named 'space.inner.no'"),
        (["--no-python", "./folder"], "it is a directory"),
        (["-"], "standard input cannot be the script"),
    ],
    ids=["empty", "pipe", "device", "missing", "folder", "syntax", "package", "module", "program", "stdin"],
)
def test_nothing_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "space" / "inner").mkdir(parents=True)
    (tmp_path / "space" / "inner" / "job.py").touch()
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("raise RuntimeError('imported by the launcher')\n")
    (tmp_path / "package" / "broken.py").write_text("def f(:\n")
    (tmp_path / "package" / "job.py").touch()
    assert main(["launch", *words]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    assert find_module("space.inner.job") is not None
    assert find_module("package.job") is not None
    assert find_module("json.tool") is not None


def test_a_script_without_the_right_to_read_it(tmp_path: Path) -> None:
    """Root may read everything, so it is another user who tries."""
    script = tmp_path / "train.py"
    script.touch()
    script.chmod(0)
    become = "os.setgid(65534), os.setuid(65534)\n" if os.geteuid() == 0 else ""
    code = f"import os, sys\nfrom outlast.launch.program import Program\n{become}"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}Program(kind='script', target=sys.argv[1]).check()", str(script)],
        env=clean_env(),
        cwd=Path(__file__).parent.parent.parent,
        text=True,
        capture_output=True,
        check=False,
    )
    assert f"ConfigError: script {script} cannot be read: Permission denied" in done.stderr


def test_another_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "train.py"
    script.touch()
    for found, told in ((tmp_path / "none", "cannot be run: "), (Path("/bin/false"), "cannot start watched programs")):
        monkeypatch.setenv("PYTHON_EXEC", str(found))
        with pytest.raises(ConfigError, match=f"PYTHON_EXEC={found} {told}"):
            Program(kind="script", target=str(script)).check()
    monkeypatch.setenv("PYTHON_EXEC", sys.executable)
    program = Program(kind="script", target=str(script))
    program.check()
    assert program.command()[0] == sys.executable


def test_a_program_that_the_kernel_does_not_run(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text("#!/no/such/interpreter\n")
    program.chmod(0o700)
    said = launch(tmp_path, "--no-python", program, check=1, ranks=1)
    assert f"{program} cannot be run: No such file or directory" in said
    assert len(events(tmp_path / "run", "workers_started")) == 1


LEAVES = """
import os, sys
import torch, torch.distributed as dist
dist.init_process_group("gloo")
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(6):
    if step == 3 and dist.get_rank() == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        HOW
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
print("rank", dist.get_rank(), "is done", flush=True)
dist.destroy_process_group()
"""


@pytest.mark.parametrize(
    "how", ["break", *(pytest.param(end, marks=pytest.mark.soak) for end in ("sys.exit(0)", "os._exit(0)"))]
)
def test_a_rank_that_leaves_the_loop_early_is_named(tmp_path: Path, how: str) -> None:
    script = tmp_path / "train.py"
    script.write_text(LEAVES.replace("HOW", how))
    said = launch(tmp_path, script, check=0)
    assert "rank 0 is done" in said
    (failed,) = events(tmp_path / "run", "workers_failed")
    assert failed["ranks"][0] == 1, failed.fields
    assert "exited with status 0" in failed["reasons"][0]
    assert "step 3" in failed["reasons"][0]
