"""Which rank a process is, under every starter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outlast.errors import MissingDependency, PlaceError
from outlast.launch import find_place, slurm
from tests.forked import run_main
from tests.helpers import clean_env, events, tiny_config

RANK = str(Path(__file__).parent / "place_rank.py")
TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29501",
    "TORCHELASTIC_RESTART_COUNT": "2",
}
SRUN = {
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "localhost,nowhere[1-3]",
}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}


def test_torchrun() -> None:
    place = find_place(TORCHRUN)
    assert (place.rank, place.world_size, place.local_rank, place.local_world_size) == (3, 4, 1, 2)
    assert (place.master_addr, place.master_port, place.generation) == ("127.0.0.1", 29501, 2)
    assert place.source == "torchrun"
    assert find_place(place.environ() | {"TORCHELASTIC_RESTART_COUNT": "2"}) == place


def test_torchrun_comes_before_the_srun_that_started_it() -> None:
    assert find_place(SRUN | TORCHRUN).source == "torchrun"
    assert find_place(OPEN_MPI | TORCHRUN).source == "torchrun"


@pytest.mark.parametrize("missing", ["WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_half_of_torchruns_variables(missing: str) -> None:
    with pytest.raises(PlaceError, match=f"incomplete: {missing} missing, while RANK=3"):
        find_place({key: value for key, value in TORCHRUN.items() if key != missing})


def test_several_are_missing_and_all_are_listed() -> None:
    with pytest.raises(PlaceError, match="WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT missing"):
        find_place({"RANK": "0"})


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"RANK": "x"}, "RANK='x' is not an integer"),
        ({"RANK": "4"}, "rank 4 is not below the world size of 4"),
        ({"LOCAL_RANK": "2"}, "local_rank 2 is not below the world size of 2"),
        ({"MASTER_PORT": "70000"}, "70000 is not a port"),
    ],
)
def test_variables_that_contradict_one_another(changed: dict[str, str], words: str) -> None:
    with pytest.raises(PlaceError, match=words):
        find_place(TORCHRUN | changed)


def test_srun() -> None:
    place = find_place(SRUN | {"SLURM_RESTART_COUNT": "1"})
    assert (place.rank, place.world_size, place.local_rank, place.local_world_size) == (3, 4, 1, 2)
    assert (place.master_addr, place.generation, place.source) == ("localhost", 1, "slurm")
    assert place.master_port == 61440 + 77 * 16


def test_srun_with_an_address_and_a_port_of_the_users() -> None:
    place = find_place(SRUN | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000"})
    assert (place.master_addr, place.master_port) == ("10.0.0.1", 4000)


def test_what_batch_scripts_export_for_all_tasks_selects_nothing() -> None:
    assert find_place(SRUN | {"WORLD_SIZE": "4", "MASTER_ADDR": "h", "MASTER_PORT": "4000"}).source == "slurm"


def test_requeues_and_restarts_add_up() -> None:
    assert find_place(TORCHRUN | {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "3"}).generation == 5


def test_the_launchers_own_count_comes_first() -> None:
    more = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "3", "OUTLAST_GENERATION": "7"}
    assert find_place(TORCHRUN | more).generation == 7


@pytest.mark.parametrize("environ", [{}, TORCHRUN])
def test_a_count_of_requeues_outside_a_job_is_left_over(environ: dict[str, str]) -> None:
    assert find_place(environ | {"SLURM_RESTART_COUNT": "3"}).generation == find_place(environ).generation


def test_a_batch_script_that_forgot_srun() -> None:
    shell = {key: value for key, value in SRUN.items() if "STEP" not in key}
    with pytest.raises(PlaceError, match=r"batch script of a Slurm job with 4 tasks.*\n.*srun"):
        find_place(shell)
    assert find_place(shell | {"SLURM_NTASKS": "1"}).source == "single"


@pytest.mark.parametrize("missing", ["SLURM_LOCALID", "SLURM_NODEID", "SLURM_JOB_ID", "SLURM_STEP_TASKS_PER_NODE"])
def test_half_of_sruns_variables(missing: str) -> None:
    with pytest.raises(PlaceError, match=f"{missing} missing"):
        find_place({key: value for key, value in SRUN.items() if key != missing})


def test_srun_with_pmi2_is_slurm() -> None:
    assert find_place(SRUN | {"PMI_RANK": "3", "PMI_SIZE": "4"}).source == "slurm"


@pytest.mark.parametrize("port", ["29500", "not a port"])
def test_alone_with_what_another_launcher_left(port: str) -> None:
    place = find_place({"MASTER_ADDR": "192.0.2.1", "MASTER_PORT": port, "WORLD_SIZE": "4"})
    assert (place.rank, place.world_size, place.master_addr, place.source) == (0, 1, "127.0.0.1", "single")


def test_alone() -> None:
    place = find_place({})
    assert (place.rank, place.world_size, place.local_rank, place.local_world_size) == (0, 1, 0, 1)
    assert (place.master_addr, place.generation, place.source) == ("127.0.0.1", 0, "single")


@pytest.mark.parametrize("started_by", [OPEN_MPI, SRUN | OPEN_MPI, SRUN | {"PMI_RANK": "7", "PMI_SIZE": "8"}])
def test_mpirun_without_mpi4py(started_by: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(MissingDependency, match=r"pip install 'outlast\[mpi\]'"):
        find_place(started_by)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("n1", ["n1"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("n[08-10,12],gpu-a,m[1]", ["n08", "n09", "n10", "n12", "gpu-a", "m1"]),
        ("r[1-2]c[0-1]x", ["r1c0x", "r1c1x", "r2c0x", "r2c1x"]),
    ],
)
def test_node_lists(text: str, names: list[str]) -> None:
    assert slurm.expand_nodelist(text) == names


@pytest.mark.parametrize("text", ["", ",", "n[1-", "n[a-b]", "n[]"])
def test_node_lists_that_are_none(text: str) -> None:
    with pytest.raises(PlaceError):
        slurm.expand_nodelist(text)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 5)), min_size=1, max_size=6))
def test_tasks_per_node(runs: list[tuple[int, int]]) -> None:
    text = ",".join(f"{count}(x{times})" if times > 1 else str(count) for count, times in runs)
    expected = [count for count, times in runs for _ in range(times)]
    assert [slurm.tasks_on_node(text, node) for node in range(len(expected))] == expected
    with pytest.raises(PlaceError):
        slurm.tasks_on_node(text, len(expected))


@given(st.integers(0, 2**31), st.integers(0, 2**31))
def test_ports_lie_in_their_range(job: int, step: int) -> None:
    assert 61440 <= slurm.master_port(job, step) < 65536
    assert slurm.master_port(job, step) != slurm.master_port(job + 1, step)


def test_a_node_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(PlaceError, match="scontrol is not installed"):
        slurm.node_address("no-such-node.invalid")


@pytest.mark.mpi
def test_mpirun_for_real(root: Path) -> None:
    done = mpirun(2, sys.executable, RANK, root=root)
    source, address, *ranks = done.split()
    assert (source, address) == ("mpi", "127.0.0.1")
    assert [one.split(",")[:4] for one in ranks] == [["0", "0", "2", "0"], ["1", "1", "2", "0"]]


@pytest.mark.mpi
def test_mpirun_trains(root: Path, tmp_path: Path) -> None:
    config, run = tiny_config(tmp_path)
    mpirun(2, sys.executable, "-m", "outlast.trainer", str(config), "--trainer.steps", "6", root=root)
    assert [record["world_size"] for record in events(run, "run_started")] == [2, 2]
    assert sorted(record.rank for record in events(run, "step") if record["step"] == 6) == [0, 1]


@pytest.mark.soak
def test_torchrun_trains(root: Path, tmp_path: Path) -> None:
    config, run = tiny_config(tmp_path)
    words = ["--nproc-per-node", "2", "-m", "outlast.trainer", str(config), "--trainer.steps", "6"]
    done = run_main("torch.distributed.run", words, env=clean_env(PYTHONPATH=str(root)), timeout_s=90)
    assert done.returncode == 0, done.stderr
    assert sorted(record.rank for record in events(run, "step") if record["step"] == 6) == [0, 1]


def mpirun(ranks: int, *command: str, root: Path) -> str:
    """Run under PyPI's mpirun, which lies beside the interpreter; as root and on few cores it must be told that this is
    meant. Returns what rank 0 printed."""
    beside = Path(sys.executable).with_name("mpirun")
    program = str(beside) if beside.exists() else "mpirun"
    flags = ["--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", str(ranks)]
    done = subprocess.run(
        [program, *flags, *command], env=clean_env(PYTHONPATH=str(root)), capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
