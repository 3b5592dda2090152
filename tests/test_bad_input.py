"""What bad input gets: what happened, the values, what to do; an exit status that is not 0; nothing lost."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import crc32c
import pytest

from outlast.cli.main import main
from outlast.free_port import free_port
from tests.helpers import arrays, clean_env, events, outlast, steps_saved, tiny_config


def one_rank(config: Path, *words: str, check: int, **env: str) -> str:
    return outlast("train", config, *words, check=check, env=clean_env(**env)).stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run of one rank, checkpoints at steps 5, 10, 15, 20."""
    folder = tmp_path_factory.mktemp("trained")
    config, run = tiny_config(folder)
    outlast("train", config)
    assert steps_saved(run) == [5, 10, 15, 20]
    return folder


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A copy of it to break: its config and its run directory."""
    shutil.copytree(trained / "run", tmp_path / "run", symlinks=True)
    return tiny_config(tmp_path)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--comm.densty", "0.1"], "--comm.density"),
        (["--comm.density", "0"], "comm.density"),
        (["--model.heads", "5"], "model.heads = 5"),
        (["--comm.compressor", "topq"], "topk"),
        (["--comm.feedback", "ef-14"], "did you mean 'ef14'?"),
        (["--run.resume", "sometimes"], "auto, never"),
    ],
)
@pytest.mark.parametrize("verb", [["launch"], ["train", "--dry-run"], ["config", "validate"]])
def test_wrong_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: list[str], words: list[str], says: str
) -> None:
    config, run = tiny_config(tmp_path)
    try:
        status = main([*verb, str(config), *words])
    except SystemExit as stopped:  # from tyro, which has printed
        status = stopped.code  # type: ignore[assignment]
    assert status == 2
    assert says in capsys.readouterr().err
    assert not run.exists()


def test_wrong_settings_of_a_rank(tmp_path: Path) -> None:
    config, run = tiny_config(tmp_path)
    said = one_rank(config, "--comm.compressor", "topq", check=2)
    assert "UnknownCompressor: command line: comm.compressor = 'topq' is not one of auto, topk, " in said
    assert "did you mean 'topk'?" in said
    assert "Traceback" not in said
    assert not run.exists()


def test_wrong_keys_in_the_file(tmp_path: Path) -> None:
    config, _ = tiny_config(tmp_path)
    config.write_text(config.read_text().replace("\nevery_steps", "\nevry_steps"))
    assert "did you mean 'every_steps'?" in one_rank(config, check=2)
    assert "no config file at" in one_rank(tmp_path / "none.toml", check=2)


def test_no_data(tmp_path: Path) -> None:
    config, _ = tiny_config(tmp_path)
    said = one_rank(config, "--data.files", str(tmp_path / "none/*.txt"), check=1)
    assert "no data: 0 files match" in said
    assert "set data.files" in said


def test_a_launcher_does_not_repeat_what_cannot_be_mended(tmp_path: Path) -> None:
    config, run = tiny_config(tmp_path)
    done = outlast("launch", config, "--nproc-per-node", "1", "--data.files", str(tmp_path / "none"), check=1)
    assert "no data" in done.stderr
    assert len(list(run.glob("attempts/[0-9]*"))) == 1


def test_a_used_run_directory(trained: Path) -> None:
    config = trained / "run.toml"
    before = sorted(trained.rglob("*"))
    for verb in ("train", "launch"):
        said = outlast(verb, config, check=1).stderr
        assert "already contains a run" in said
        assert "--resume auto" in said
    assert sorted(trained.rglob("*")) == before


def test_an_unwritable_run_directory(tmp_path: Path) -> None:
    config, _ = tiny_config(tmp_path)
    (tmp_path / "file").write_text("in the way")
    for verb in ("train", "launch"):
        said = outlast(verb, config, "--run.dir", str(tmp_path / "file" / "run"), check=1).stderr
        assert "cannot be written" in said
        assert "--run.dir" in said


def test_a_port_in_use(tmp_path: Path) -> None:
    config, _ = tiny_config(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        said = one_rank(config, check=1, **place, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        assert f"{port}" in said
        assert "in use" in said
        said = outlast(
            "launch", config, "--rdzv-endpoint", f"127.0.0.1:{port}", "--nproc-per-node", "1", check=1
        ).stderr
        assert f"port {port} of 127.0.0.1 is in use by" in said


def test_half_a_place(tmp_path: Path) -> None:
    config, _ = tiny_config(tmp_path)
    said = one_rank(config, check=1, RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    assert "WORLD_SIZE" in said


def resume(config: Path, *words: str) -> str:
    """Go on from 15 (or whatever is valid) to 20; what was said on both streams."""
    done = outlast("train", config, "--resume", "auto", *words)
    return done.stdout + done.stderr


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0x10
    path.write_bytes(raw)


def test_one_flipped_bit(copy: tuple[Path, Path]) -> None:
    config, run = copy
    good = arrays(run / "checkpoints" / "step_00000020")
    victim = run / "checkpoints" / "step_00000020" / "model" / "head.weight" / "c.0.0"
    flip(victim)
    done = outlast("ckpt", "verify", run / "checkpoints", "--step", "20", check=1)
    assert "model/head.weight/c.0.0" in done.stdout + done.stderr
    said = resume(config)
    assert "model/head.weight/c.0.0" in said
    assert "restored step 15" in said
    (rejected,) = events(run, "checkpoint_rejected")
    assert rejected["file"] == "model/head.weight/c.0.0"
    again = arrays(run / "checkpoints" / "step_00000020")
    assert all(again[name].tobytes() == good[name].tobytes() for name in good)


@pytest.mark.parametrize("gone", ["model/head.weight/c.0.0", "commit.json", "votes/rank_00000.json", "zarr.json"])
def test_a_missing_file(copy: tuple[Path, Path], gone: str) -> None:
    config, run = copy
    (run / "checkpoints" / "step_00000020" / gone).unlink()
    said = resume(config)
    assert gone in said
    assert "restored step 15" in said


def test_an_unknown_version(copy: tuple[Path, Path]) -> None:
    config, run = copy
    record = run / "checkpoints" / "step_00000020" / "commit.json"
    body = record.read_bytes().replace(b'"format_version": 3', b'"format_version": 99').rpartition(b',"crc32c":')[0]
    record.write_bytes(body + b',"crc32c":"%08x"}\n' % crc32c.crc32c(body))  # whole, and of a later outlast
    said = outlast("train", config, "--resume", "auto", check=1).stderr
    assert "99" in said
    assert record.exists()


def test_another_model_shape(copy: tuple[Path, Path]) -> None:
    config, run = copy
    said = outlast("train", config, "--resume", "auto", "--model.width", "32", check=1).stderr
    assert "step 20 was trained with other settings" in said
    assert "model.width: 48 -> 32" in said
    assert steps_saved(run) == [5, 10, 15, 20]


def test_other_data_than_before(copy: tuple[Path, Path]) -> None:
    config, _ = copy
    said = outlast("train", config, "--resume", "auto", "--data.files", "{stdlib}/[a-f]*.py", check=1).stderr
    assert "the checkpoint has data fingerprint" in said


def test_a_step_that_was_not_saved(copy: tuple[Path, Path]) -> None:
    config, run = copy
    said = outlast("train", config, "--resume", "7", check=1).stderr
    assert "7" in said
    assert "5, 10, 15, 20" in said
    assert steps_saved(run) == [5, 10, 15, 20]


def test_a_run_that_diverges(tmp_path: Path) -> None:
    config, run = tiny_config(tmp_path)
    said = one_rank(config, "--optim.lr", "1e30", "--optim.warmup-steps", "0", check=1)
    assert "step " in said or "gradient of " in said
    assert "lower" in said  # the learning rate
    (ended,) = events(run, "run_ended")
    assert ended["ok"] is False
    assert ended["reason"].split(":")[0] in ("TrainingDiverged", "NonFiniteGradient")
    assert outlast("report", run).stdout


def test_a_report_of_nothing(tmp_path: Path) -> None:
    said = outlast("report", tmp_path / "none", check=1).stderr
    assert str(tmp_path / "none") in said


def test_no_such_verb_or_flag(tmp_path: Path) -> None:
    config, _ = tiny_config(tmp_path)
    assert outlast("lunch", config, check=2)
    assert outlast("launch", config, "--nproc-per-nod", "2", check=2)
    assert "takes no settings" in outlast("report", tmp_path, "--comm.density", "1", check=2).stderr
