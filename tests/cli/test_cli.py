"""The command line beyond what the docs show: dry runs, help, versions, and what it prints where."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from outlast import __version__
from outlast.cli.main import main
from outlast.config import load
from outlast.trainer.config import Config
from tests.helpers import events, outlast, tiny_config

VERBS = ("train", "launch", "report", "ckpt", "doctor", "config")


def test_dry_runs_run_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, run = tiny_config(tmp_path)
    words = ["--trainer.steps", "7", "--data.files", "a.txt,b.txt"]
    assert main(["launch", "--nproc-per-node", "2", str(config), *words, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert f"-m outlast.trainer {config} --trainer.steps=7 --data.files=a.txt,b.txt" in said.replace("'", "")
    assert main(["train", str(config), *words, "--dry-run", "--resume", "auto"]) == 0
    said = capsys.readouterr().out
    assert "world_size=1" in said
    (tmp_path / "shown.toml").write_text(said)  # the place stands in a comment
    shown = load(Config, tmp_path / "shown.toml", {})
    assert (shown.trainer.steps, shown.data.files, shown.run.resume) == (7, ("a.txt", "b.txt"), "auto")
    assert not run.exists()


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"outlast {__version__}\n"
    for verb in VERBS:
        with pytest.raises(SystemExit) as stopped:
            main([verb, "--help"])
        assert stopped.value.code == 0
        assert f"usage: outlast {verb}" in capsys.readouterr().out


def test_help_of_every_verb_and_action_is_plain_text(capsys: pytest.CaptureFixture[str]) -> None:
    """No markup of docstrings, and no line broken in the middle of a sentence."""
    actions = ("ls", "show", "verify", "diff", "prune", "memory", "export", "import")
    for words in ([], *[[verb] for verb in VERBS], *[["ckpt", action] for action in actions]):
        with pytest.raises(SystemExit):
            main([*words, "--help"])
        text = capsys.readouterr().out
        assert "``" not in text, words
        assert "::" not in text, words


@pytest.mark.parametrize("name", ["chaos", "checkpoint", "cluster", "codec", "comm", "gpu.__main__"])
def test_what_benchmarks_print_as_help_is_plain_text(name: str) -> None:
    """Their help is the docstring of their module."""
    path = Path(__file__).parents[2] / "benchmarks" / f"{name.replace('.', '/')}.py"
    text = ast.get_docstring(ast.parse(path.read_text()))
    assert text
    assert "::" not in text


def test_reading_a_command_line_imports_no_torch() -> None:
    code = (
        "import sys; from outlast.cli import main\n"
        "assert main(['ckpt', 'ls', '--run.name', 'x', 'URL']) == 2\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_python_m_outlast_is_the_command_line() -> None:
    done = subprocess.run([sys.executable, "-m", "outlast", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"outlast {__version__}\n"


@pytest.mark.slow
def test_accumulation_sees_the_same_text_and_bf16_trains(tmp_path: Path) -> None:
    """Four sequences at once, and twice two: the same windows, so nearly the same numbers."""
    losses = {}
    for name, words in {
        "one": ["--data.batch-size", "4"],
        "two": ["--data.batch-size", "2", "--trainer.accumulate", "2"],
        "bf16": ["--data.batch-size", "4", "--trainer.precision", "bf16"],
        "dense": ["--data.batch-size", "4", "--comm.compressor", "dense"],
    }.items():
        config, run = tiny_config(tmp_path, name)
        outlast("train", config, *words, "--trainer.steps", "12", "--optim.warmup-steps", "1", "--optim.lr", "3e-3")
        losses[name] = [record["loss"] for record in events(run, "step")]
        assert losses[name][-1] < losses[name][0] - 0.3
    assert losses["two"] == pytest.approx(losses["one"], rel=2e-3)
    assert losses["bf16"] == pytest.approx(losses["one"], rel=2e-2)
    assert losses["bf16"] != losses["one"]


def test_json_is_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, run = tiny_config(tmp_path)
    outlast("train", config, "--trainer.steps", "5")
    for words in (["ls"], ["show"], ["verify"]):
        assert main(["ckpt", *words, str(run / "checkpoints"), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found if isinstance(found, dict) else found[0])["step"] == 5
    assert main(["report", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["facts"]["finished"] is True
