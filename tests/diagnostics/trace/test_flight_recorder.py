from __future__ import annotations

import pickle
import pickletools
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outlast.cli.main import main
from outlast.diagnostics.live.kept import CollectivesKept, KeptRow
from outlast.diagnostics.trace.flight_recorder import export_flight_recorder
from outlast.diagnostics.trace.plain_pickle import plain_pickle
from outlast.errors import DiagnosticsError
from tests.diagnostics.report.synthetic import SyntheticRun, eventful
from tests.diagnostics.trace.failing_run import CULPRIT, hanging


def analysed(folder: Path, *words: str) -> str:
    """What torch's own analyser says."""
    command = [sys.executable, "-m", "torch.distributed.flight_recorder.fr_trace", str(folder), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def failing(run_dir: Path, rows: dict[int, list[KeptRow]], *, culprit: int) -> None:
    """A run whose ranks had entered these collectives when rank ``culprit`` failed."""
    run = SyntheticRun(run_dir=run_dir, ranks=max(rows) + 1, ranks_per_host=8, steps=10)
    run.start()
    run.train(1, 5)
    for rank, newest in rows.items():
        run.launcher(CollectivesKept(of_rank=rank, pid=rank, entered=len(newest), newest=tuple(newest)), generation=0)
    run.fail(culprit, generation=0, step=6)


def row(
    seq: int,
    op: str = "all_reduce",
    *,
    nbytes: int = 4096,
    done: bool = True,
    group: str = "0 default_pg",
    number: int | None = None,
) -> KeptRow:
    t = 1.79e9 + 0.01 * seq
    return (seq, op, "", nbytes, 5, t, t + 0.005 if done else None, group, seq + 1 if number is None else number)


def test_the_analyser_names_the_rank_that_skipped_a_collective(tmp_path: Path) -> None:
    hanging(tmp_path / "run")
    assert main(["report", str(tmp_path / "run"), "--flight-recorder", str(tmp_path / "dumps")]) == 0
    said = analysed(tmp_path / "dumps")
    assert "Not all ranks joining collective, sequence number: 41" in said
    assert f"missing ranks: {{{CULPRIT}}}" in said
    assert said.count("missing ranks") == 1, said
    assert export_flight_recorder(tmp_path / "run", tmp_path / "again").culprit == CULPRIT


@pytest.mark.slow
def test_the_analyser_names_a_size_that_differs_and_goes_by_groups(tmp_path: Path) -> None:
    """Two groups, collectives that it does not know, a rank that left nothing, and rings that begin apart."""
    known = {
        0: [row(0), row(1, "forward_backward", group="")],
        1: [row(1)],
        2: [row(0)],
        3: [row(0)],
    }
    for rank in range(4):
        group = "tp_0" if rank < 2 else "tp_1"
        known[rank] += [
            row(2, "all_gather", group=f"{group} tp", number=1),
            row(3, "_reduce_scatter_base", group=f"{group} tp", number=2),
            row(4, nbytes=512 if rank == 3 else 4096, number=2, done=False),
        ]
    known[4] = []
    failing(tmp_path / "run", known, culprit=3)
    exported = export_flight_recorder(tmp_path / "run", tmp_path / "dumps")
    assert exported.ranks == (0, 1, 2, 3)
    assert "forward_backward" in exported.notes[0]
    assert "rank 4 left no collectives" in exported.notes[1]
    said = analysed(tmp_path / "dumps", "--allow-incomplete-ranks")
    # it takes the first file's rank for right, so which ranks it names is a matter of their order on disk
    assert said.count("has errors") == 1
    assert "Collective sequence number: 2 has errors" in said
    assert "[[512]]" in said
    assert "group info: 0:default_pg" in said
    assert "tp_" not in said, "both groups of two met"


def test_what_cannot_be_exported_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    eventful(tmp_path / "old")
    with pytest.raises(DiagnosticsError, match="holds no collectives"):
        export_flight_recorder(tmp_path / "old", tmp_path / "dumps")
    assert not (tmp_path / "dumps").exists()
    hanging(tmp_path / "run")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    with pytest.raises(DiagnosticsError, match="not empty"):
        export_flight_recorder(tmp_path / "run", tmp_path / "full")
    with pytest.raises(DiagnosticsError, match="cannot be written"):
        export_flight_recorder(tmp_path / "run", tmp_path / "full" / "notes.txt")
    assert main(["report", str(tmp_path / "run"), "--flight-recorder", str(tmp_path / "full")]) != 0
    assert "not empty" in capsys.readouterr().err


def test_a_dump_holds_plain_values_only(tmp_path: Path) -> None:
    """No opcode that imports, calls or refers to anything: opening one runs no code."""
    hanging(tmp_path / "run")
    export_flight_recorder(tmp_path / "run", tmp_path / "dumps")
    for path in (tmp_path / "dumps").iterdir():
        used = {opcode.name for opcode, _, _ in pickletools.genops(path.read_bytes())}
        assert used <= {
            "PROTO",
            "EMPTY_DICT",
            "EMPTY_LIST",
            "MARK",
            "SETITEMS",
            "APPENDS",
            "BINUNICODE",
            "LONG1",
            "BINFLOAT",
            "NEWTRUE",
            "NEWFALSE",
            "NONE",
            "STOP",
        }
    with pytest.raises(TypeError, match="Path"):
        plain_pickle({"path": [tmp_path]})


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(PLAIN)
def test_pickle_reads_what_was_written(value: object) -> None:
    assert pickle.loads(plain_pickle(value)) == value
