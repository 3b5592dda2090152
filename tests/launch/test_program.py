"""What is wrong with a program is found before any process is started, and said with the way out."""

from __future__ import annotations

from pathlib import Path

import pytest

from outlast.cli.launch_program import split_program
from outlast.errors import ConfigError
from outlast.launch.program import Kind, Program


@pytest.mark.parametrize(
    ("kind", "target", "told"),
    [
        ("script", "nothing.py", "no script at nothing.py"),
        ("script", "folder", "a directory without a __main__.py"),
        ("script", "broken.py", "broken.py, line 2 is not valid Python"),
        ("script", "binary", "is not valid Python"),
        ("script", "package.job", "as a module: -m package.job"),
        ("module", "no.such.module", "no module named 'no.such.module'"),
        ("module", "package", "a package without a __main__ module"),
        ("module", "package/job.py", "no module named"),
        ("program", "no-such-program", "there is no such program in PATH"),
        ("program", "./plain", "it is not executable"),
    ],
)
def test_what_cannot_be_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind, target: str, told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    (tmp_path / "package" / "job.py").touch()
    (tmp_path / "broken.py").write_text("x = 1\ndef f(:\n")
    (tmp_path / "binary").write_bytes(b"\x7fELF\0\0\xff")
    (tmp_path / "plain").write_text("text")
    with pytest.raises(ConfigError) as error:
        Program(kind=kind, target=target).check()
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("line", "own", "program"),
    [
        ("train.py --lr 1", "", ("script", "train.py", "--lr 1")),
        (
            "--nproc_per_node 2 --standalone train.py --nnodes 3",
            "--nproc-per-node 2 --standalone",
            ("script", "train.py", "--nnodes 3"),
        ),
        ("--nnodes=2 -m a.b -m c", "--nnodes=2", ("module", "a.b", "-m c")),
        ("--no_python sh -c x", "", ("program", "sh", "-c x")),
        ("--launch.watch false -- -odd.py x", "--launch.watch false", ("script", "-odd.py", "x")),
        ("train.py x.toml", "", ("script", "train.py", "x.toml")),
        ("--nproc-per-node 2 run.toml --optim.lr 1", "--nproc-per-node 2 run.toml --optim.lr 1", None),
        ("--help", "--help", None),
        ("", "", None),
    ],
)
def test_what_belongs_to_whom(line: str, own: str, program: tuple[Kind, str, str] | None) -> None:
    found = split_program(line.split())
    expected = None
    if program is not None:
        kind, target, words = program
        expected = Program(kind=kind, target=target, arguments=tuple(words.split()))
    assert found == (own.split(), expected)


def test_flags_that_contradict() -> None:
    with pytest.raises(ConfigError, match="contradict"):
        split_program(["-m", "--no-python", "x"])
    with pytest.raises(ConfigError, match="-m needs a module's name"):
        split_program(["-m"])
