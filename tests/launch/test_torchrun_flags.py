"""torchrun's flags, as the installed torch has them: each works, or is refused by name."""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path

import psutil
import pytest
import tyro
from torch.distributed.run import get_args_parser

from outlast.cli.launch_program import KINDS, SHORT, LaunchProgram, split_program
from outlast.cli.main import main
from outlast.errors import ConfigError, OutOfRange, UnknownKey
from outlast.launch.flag_sources import arguments_from_environment, flag_of
from outlast.launch.flags import NO_FLAGS, NUMA_BINDINGS, LaunchFlags
from outlast.launch.rendezvous import resolve
from outlast.launch.torch_options import split_words, torch_options
from tests.forked import Job
from tests.helpers import clean_env, events, outlast, start_outlast, wait_for
from tests.launch.jobs import STARTED

SAMPLES = {
    "--nnodes": "2",
    "--nproc-per-node": "4",
    "--rdzv-backend": "static",
    "--rdzv-endpoint": "h:1",
    "--rdzv-id": "job",
    "--rdzv-conf": "timeout=5",
    "--max-restarts": "7",
    "--monitor-interval": "0.3",
    "--event-log-handler": "console",
    "--role": "worker",
    "--log-dir": "logs",
    "--redirects": "0:1,1:2",
    "--tee": "3",
    "--local-ranks-filter": "0,1",
    "--duplicate-stdout-filters": "a,b",
    "--duplicate-stderr-filters": "a,b",
    "--node-rank": "1",
    "--master-addr": "h",
    "--master-port": "7",
    "--local-addr": "127.0.0.1",
    "--numa-binding": "node",
    "--signals-to-handle": "SIGTERM,SIGALRM",
    "--shutdown-timeout": "4",
}
NEEDS = {
    "--duplicate-stdout-filters": ["--tee", "3"],
    "--duplicate-stderr-filters": ["--tee", "2"],
    "--node-rank": ["--nnodes", "2"],
}
ACTIONS = [
    action for action in get_args_parser()._actions if action.option_strings and action.dest not in ("help", "run_path")
]


def flags_of(words: list[str], environ: dict[str, str] | None = None) -> LaunchFlags:
    own, program = split_program([*words, "train.py", "--nnodes", "9"], environ)
    assert program is not None
    assert program.arguments == ("--nnodes", "9")
    own = [*arguments_from_environment(own, environ or {}), *own]
    return tyro.cli(LaunchProgram, args=own, config=(tyro.conf.OmitArgPrefixes,)).flags


@pytest.mark.parametrize("action", ACTIONS, ids=[action.dest for action in ACTIONS])
def test_every_flag_of_torchs_parser(action: argparse.Action) -> None:
    """In each spelling, and as a variable: it changes something, or is refused by name. A new flag fails here."""
    flag = flag_of(action.dest)
    if flag in KINDS:
        for spelling in action.option_strings:
            own, program = split_program([spelling, "x", "y"])
            assert (own, program.kind if program else "") == ([], KINDS[flag])
        _, program = split_program(["x", "y"], {f"PET_{action.dest.upper()}": "1"})
        assert program is not None
        assert program.kind == KINDS[flag]
        return
    if flag in NO_FLAGS or flag == "--start-method":
        for words, environ in (
            *(([spelling, "fork"], {}) for spelling in action.option_strings),
            ([], {f"PET_{action.dest.upper()}": "fork"}),
        ):
            with pytest.raises(ConfigError) as refused:
                flags_of(words, environ)
            assert flag in str(refused.value) or f"PET_{action.dest.upper()}" in str(refused.value)
            assert refused.value.fix
        return
    needs = NEEDS.get(flag, [])
    value = [] if action.nargs == 0 else [SAMPLES[flag]]
    before = getattr(LaunchFlags(), action.dest)
    found = [getattr(flags_of([*needs, spelling, *value]), action.dest) for spelling in action.option_strings]
    found += [getattr(flags_of([*needs, f"{one}={value[0]}"]), action.dest) for one in action.option_strings if value]
    found.append(getattr(flags_of(needs, {f"PET_{action.dest.upper()}": value[0] if value else "1"}), action.dest))
    assert all(one == found[0] for one in found)
    assert found[0] != before


def test_the_short_names_and_what_is_torchs_own() -> None:
    assert set(SHORT) == {one for action in ACTIONS for one in action.option_strings if len(one) == 2} - {"-m"}
    assert flags_of(["-t3", "-r", "1"]) == LaunchFlags(tee="3", redirects="1")
    binding = next(action for action in ACTIONS if action.dest == "numa_binding")
    assert tuple(binding.choices or ()) == NUMA_BINDINGS
    assert split_program(["--run_path", "/x.py"])[1] == split_program(["/x.py"])[1]
    assert split_words("a,b,,c") == ["a", "b,c"]


@pytest.mark.parametrize(
    ("words", "environ", "names"),
    [
        ("--standalone", {"PET_NNODES": "2"}, ("--standalone", "PET_NNODES=2")),
        ("--nnodes 2 --standalone", {}, ("--standalone", "--nnodes 2")),
        ("--standalone", {"PET_NODE_RANK": "1"}, ("--standalone", "PET_NODE_RANK=1")),
        ("--standalone --rdzv_backend static", {}, ("--standalone", "--rdzv-backend static")),
        ("--standalone --rdzv-endpoint=a:1", {}, ("--standalone", "--rdzv-endpoint a:1")),
        ("--rdzv-endpoint a:1", {"PET_MASTER_ADDR": "b"}, ("--rdzv-endpoint a:1", "PET_MASTER_ADDR=b")),
        ("--rdzv-endpoint a:1 --master-port 2", {}, ("--rdzv-endpoint a:1", "--master-port 2")),
        ("", {"PET_RDZV_ENDPOINT": "a:1", "PET_MASTER_PORT": "2"}, ("PET_RDZV_ENDPOINT=a:1", "PET_MASTER_PORT=2")),
        ("--node-rank 1 --rdzv-conf rank=0", {"PET_RDZV_BACKEND": "static"}, ("--node-rank 1", "--rdzv-conf rank=0")),
        (
            "--node-rank 1 --nnodes 2",
            {"PET_RDZV_CONF": "is_host=true"},
            ("--node-rank 1", "PET_RDZV_CONF=is_host=true"),
        ),
        ("-m", {"PET_NO_PYTHON": "1"}, ("-m", "PET_NO_PYTHON=1")),
        ("", {"PET_MODULE": "1", "PET_RUN_PATH": "1"}, ("PET_MODULE=1", "PET_RUN_PATH=1")),
        ("", {"PET_RDZV_BACKEND": "etcd-v2"}, ("PET_RDZV_BACKEND=etcd-v2", "use c10d")),
        ("-m run.toml", {}, ("-m", "run.toml")),
        ("", {"PET_STANDALONE": "maybe"}, ("PET_STANDALONE=maybe", "1 or 0")),
        ("--logs-specs mine", {}, ("--logs-specs mine", "--log-dir")),
        ("", {"PET_LOGS_SPECS": "mine"}, ("PET_LOGS_SPECS=mine", "--log-dir")),
        ("--duplicate-stdout-filters a --tee 2", {}, ("--duplicate-stdout-filters a", "--tee 1")),
        ("--tee 4", {}, ("--tee", "'4'")),
        ("--redirects 0:1,1", {}, ("--redirects", "0:3,1:2")),
        ("--local-ranks-filter 0;1", {}, ("--local-ranks-filter", "0,2")),
        ("--signals-to-handle SIGTERM,SIGKILL", {}, ("--signals-to-handle", "SIGKILL")),
        ("--signals-to-handle TERM", {}, ("--signals-to-handle", "TERM")),
        ("--shutdown-timeout -1", {}, ("--shutdown-timeout", "-1")),
    ],
)
def test_what_cannot_be_meant_is_an_error_that_names_both(
    words: str, environ: dict[str, str], names: tuple[str, str]
) -> None:
    with pytest.raises(ConfigError) as error:
        flags_of(words.split(), environ)
    assert all(name in str(error.value) for name in names), error.value


@pytest.mark.parametrize(
    ("words", "environ"),
    [
        ("--rdzv-endpoint a:1", {"PET_MASTER_ADDR": "a", "PET_MASTER_PORT": "1"}),
        ("--standalone", {"PET_NNODES": "1", "PET_NODE_RANK": "0", "PET_MASTER_ADDR": "pod-0"}),
        ("--rdzv-endpoint [::1]:1", {"PET_MASTER_ADDR": "::1"}),
        ("--node-rank 0 --nnodes 2 --rdzv-conf is_host=1", {}),
        ("--tee 3", {"PET_TEE": "1"}),
        ("", {"PET_NNODES": "", "PET_STANDALONE": "false"}),
    ],
)
def test_what_agrees_is_no_error(words: str, environ: dict[str, str]) -> None:
    flags_of(words.split(), environ)


def test_what_is_not_taken_is_told(caplog: pytest.LogCaptureFixture) -> None:
    assert flags_of(["--nnodes", "3"], {"PET_NNODES": "2"}).nnodes == "3"
    assert "--nnodes 3, on the command line, is taken; PET_NNODES=2 is not" in caplog.text
    flags_of([], {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "pod-0"})
    assert "without --nnodes this node trains by itself" in caplog.text
    caplog.clear()
    flags_of([], {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "h"})
    flags_of(["--nnodes", "2"], {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "pod-0", "PET_NNODES": "2"})
    assert not caplog.text


def test_options_of_the_rendezvous() -> None:
    found = resolve(LaunchFlags(nnodes="2", rdzv_endpoint="h:1", rdzv_conf="timeout=5"), {})
    assert found.conf == {"join_timeout": "5"}, "torchrun takes it for c10d, and ignores it"
    with pytest.raises(UnknownKey, match="did you mean 'join_timeout'"):
        resolve(LaunchFlags(rdzv_conf="join_timeot=5"), {})


def test_what_this_machine_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"--numa-binding node .* no GPU"):
        torch_options(LaunchFlags(numa_binding="node"))
    with pytest.raises(OutOfRange, match="--numa-binding"):
        LaunchFlags(numa_binding="near")
    with pytest.raises(ConfigError, match="--event-log-handler mine"):
        torch_options(LaunchFlags(event_log_handler="mine"))
    assert torch_options(LaunchFlags(tee="3", duplicate_stdout_filters="a,b", virtual_local_rank=True)) == {
        "duplicate_stdout_filters": ["a", "b"],
        "virtual_local_rank": True,
    }


SAY = 'printf "\\377out of $RANK\\n"; echo "err of $RANK, local $LOCAL_RANK" >&2'


def launch(run: Path, *flags: str, check: int = 0, say: str = SAY) -> tuple[str, str]:
    words = ["launch", "--run-dir", str(run), "--nproc-per-node", "2", *flags, "--no-python", "sh", "-c", say]
    done = outlast(*words, env=clean_env(), check=check)
    return done.stdout, done.stderr


def files(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text(errors="replace") for path in folder.rglob("*.*") if path.suffix != ".json"}


def test_tee_shows_and_keeps(tmp_path: Path) -> None:
    flags = ["--tee", "0:3,1:1", "--log-dir", str(tmp_path / "logs"), "--role", "worker", "--shutdown_timeout", "3"]
    flags += ["--duplicate-stdout-filters", "of 1,nothing", "--event-log-handler", "console"]
    out, err = launch(tmp_path / "run", *flags)
    assert "[rank 0] \\ufffdout of 0" in out or "[rank 0] �out of 0" in out
    assert "out of 1" in out
    assert "[rank 0] err of 0, local 0" in err
    assert "\nerr of 1, local 1" in f"\n{err}", "of this rank stderr is not teed, so it goes to the console as it is"
    assert '"source": "WORKER"' in err, "torchelastic's own events"
    kept = files(tmp_path / "logs")
    assert "out of 0" in kept["rank_00000.out"]
    assert "rank_00001.err" not in kept
    assert kept["filtered_stdout.log"].strip().endswith("out of 1")


def test_redirects_and_the_filter(tmp_path: Path) -> None:
    out, err = launch(tmp_path / "one", "--redirects", "3")
    assert "out of" not in out
    assert "err of" not in err
    assert set(files(tmp_path / "one" / "launcher")) == {
        f"rank_0000{n}.{end}" for n in (0, 1) for end in ("out", "err")
    }
    out, err = launch(tmp_path / "two", "--local_ranks_filter=1", "--virtual-local-rank")
    assert "out of 1" in out
    assert "out of 0" not in out
    assert "[rank 1] err of 1, local 0" in err
    assert "out of 0" in files(tmp_path / "two" / "launcher")["rank_00000.out"], "not shown, and not lost"
    _, err = launch(tmp_path / "three", "--tee", "5:3", "--local-ranks-filter", "0,1,2")
    assert "--tee 5:3 names local rank 5; this node has local ranks 0 to 1" in err
    assert "--local-ranks-filter 0,1,2 names local rank 2" in err


def test_a_signal_that_only_the_flag_names(tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["launch", "--run-dir", run, "--signals-to-handle", "SIGTERM,SIGALRM", "--no-python", "sleep", "60"]
    job: Job = start_outlast(*words, log=tmp_path / "log")
    STARTED.append(job)
    wait_for(lambda: (run / "events").is_dir() and events(run, "workers_started"))
    (started,) = events(run, "workers_started")
    os.kill(job.pid, signal.SIGALRM)
    assert job.wait(timeout=30) == 128 + signal.SIGALRM
    assert not any(psutil.pid_exists(pid) for pid in started["pids"])


def test_no_folder_for_the_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["launch", "--run-dir", str(tmp_path / "run"), "--log-dir", "/dev/null", "--no-python", "true"]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "--log-dir /dev/null" in said
    assert "File exists" in said
    assert not (tmp_path / "run").exists()


def test_a_variable_is_named_where_its_value_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PET_TEE", "7")
    assert main(["launch", "--run-dir", str(tmp_path / "run"), "--no-python", "true"]) == 2
    assert "--tee is set by PET_TEE=7" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
