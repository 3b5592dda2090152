"""What the first line of a report says of each fault; the table in docs/reports.md is made of the same lines.

``python -m tests.diagnostics.report.test_first_lines`` prints the table.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from outlast.diagnostics import build_report, render_html
from outlast.diagnostics.monitor import NodeCondition
from outlast.diagnostics.report.summary import headline
from outlast.diagnostics.syndromes.told import VerdictGiven
from outlast.events import HangFound, RunEnded, WorkersFailed
from tests.diagnostics.report.synthetic import SyntheticRun, clean
from tests.diagnostics.report.test_stalls import first_line

DOCS = Path(__file__).parents[3] / "docs" / "reports.md"
LOST = "exited with status 1: CommError: all_gather of bucket 0 failed: Connection closed by peer [10.0.0.2]:20401"


def recovered(run: SyntheticRun, step: int) -> SyntheticRun:
    """The ranks were restarted, and took the rest of the steps."""
    for log in run.logs:
        log.close()
    run.t += 0.5
    run.start(generation=1, first_step=step)
    run.train(step, run.steps)
    run.end()
    return run


def failed(run: SyntheticRun, rank: int, reason: str) -> None:
    run.launcher(
        WorkersFailed(host=run.hosts()[rank], ranks=(rank,), reasons=(reason,), restarting=True),
        generation=0,
        host=run.hosts()[rank],
    )


def killed(folder: Path) -> None:
    """Its peer on the other node is the first to tell, and is no cause."""
    run = SyntheticRun(run_dir=folder)
    run.start()
    run.train(1, 25)
    run.write(run.logs[0], RunEnded(step=26, ok=False, reason=LOST.partition(": ")[2]))
    failed(run, 0, LOST)
    run.t += 0.2
    failed(run, 3, "killed by SIGKILL")
    recovered(run, 21)


def left_early(folder: Path) -> None:
    """Ranks of the other node were killed because of it, which is told first."""
    run = SyntheticRun(run_dir=folder)
    run.start()
    run.train(1, 25)
    failed(run, 3, "killed by SIGABRT")
    failed(run, 0, LOST)
    run.t += 0.4
    early = "in phase step of step 26, before training was done (sys.exit or os._exit in its program?)"
    failed(run, 1, f"exited with status 0 {early}")
    recovered(run, 21)


def hung(folder: Path) -> None:
    run = SyntheticRun(run_dir=folder)
    run.start()
    run.train(1, 25)
    run.fail(2, generation=0, step=26, hang=True)
    recovered(run, 21)


def desynchronised(folder: Path) -> None:
    run = SyntheticRun(run_dir=folder)
    run.start()
    run.train(1, 25)
    run.t += 9
    evidence = (
        "desynchronised: rank 1 left the order of collectives of group default_pg: its collective #181 is all_gather "
        "of 4096 bytes, that of its peers all_reduce of 65536 bytes"
    )
    hang = HangFound(culprit=1, pid=17, step=26, silent_s=9.0, limit_s=8.0, evidence=evidence)
    run.launcher(hang, generation=0)
    failed(run, 0, LOST)
    failed(run, 1, f"hung, killed by the launcher: {evidence}")
    recovered(run, 21)


def straggler_rank(folder: Path) -> None:
    clean(folder, late_s={3: 0.060})


def straggler_node(folder: Path) -> None:
    clean(folder, ranks=6, late_s={2: 0.050, 3: 0.055})


def throttled(folder: Path) -> None:
    """Its node's monitor has seen why."""
    run = clean(folder, late_s={1: 0.120})
    lasted_s = 24.0
    condition = NodeCondition(
        host="node-a",
        what="cpu_throttled",
        state="ended",
        words="its cgroup /job was throttled (CPU quota of 0.5 cores)",
        since_t=run.t - lasted_s,
        seconds=lasted_s,
        measured_s=lasted_s * 0.8,
        ranks=(1,),
    )
    run.launcher(condition, generation=0)


def slow_phase(folder: Path) -> None:
    run = SyntheticRun(run_dir=folder, steps=120)
    run.start()
    run.train(1, 40)
    run.late_s = {2: 0.200}
    run.train(41, 70)
    run.late_s = {}
    run.train(71, 120)
    run.end()


def verdict(state: str, last_step: int, **changed: object) -> VerdictGiven:
    told = {
        "state": state,
        "syndrome": "communication_slow",
        "place": "link",
        "ranks": (),
        "nodes": ("node-a", "node-c"),
        "role": "",
        "words": "",
        "evidence": (
            "collectives of group default_pg take 90 ms a step longer once all have entered, 33% of a step, since step "
            "31; a byte from node-a to node-c takes 9.7 x as long as over the median link"
        ),
        "ruled_out": ("late ranks: the time counts from when the last one has entered",),
        "confidence": "likely",
        "step": 31,
        "last_step": last_step,
        "cause": "",
        "is_software": False,
        "cost_s": 0.09,
    }
    return VerdictGiven(**(told | changed))  # type: ignore[arg-type]


def slow_link(folder: Path) -> None:
    run = SyntheticRun(run_dir=folder)
    run.start()
    run.train(1, 40)
    run.launcher(verdict("began", 40), generation=0)
    run.train(41, 60)
    run.launcher(verdict("ended", 60), generation=0)
    run.end()


def slow_role(folder: Path) -> None:
    """The job ended before it was over."""
    run = SyntheticRun(run_dir=folder)
    run.start()
    run.train(1, 60)
    words = "all 2 ranks of role stage 1 work 50 ms a step longer since step 12, 18% of a step, and other roles do not"
    role = {"place": "role", "ranks": (2, 3), "nodes": (), "role": "stage 1", "cause": "uneven work between roles"}
    told = verdict("began", 60, syndrome="non_communication_slow", evidence=words, step=12, cost_s=0.05, **role)
    run.launcher(told, generation=0)
    run.end()


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a rank is killed; one on another node, which lost it, tells first": (killed, "Rank 3 on node-b killed (SIGKILL)"),
    "a rank ends with status 0 in the middle of training": (left_early, "Rank 1 on node-a exited with status 0"),
    "a rank is stopped (SIGSTOP)": (hung, "Rank 2 on node-b hung in step 26: stopped (state T)"),
    "a rank issues another collective than its peers": (
        desynchronised,
        "Rank 1 on node-a hung in step 26: desynchronised",
    ),
    "a rank is slow in all steps": (straggler_rank, "Rank 3 on node-b is a straggler"),
    "all ranks of a node are slow": (straggler_node, "Node node-b is slow"),
    "a rank's cgroup has a CPU quota": (throttled, "Rank 1 on node-a is a straggler"),
    "a rank is slow in some of the steps": (slow_phase, "Rank 2 on node-b was slow in steps 41 to 70"),
    "a link is slow": (slow_link, "The link from node-a to node-c: slow communication in steps 31 to 60"),
    "a pipeline stage has become slow": (
        slow_role,
        "Role stage 1 (ranks 2 and 3): slow outside communication in steps 12 to 60",
    ),
}


def table(folder: Path) -> list[str]:
    """The rows of the table in docs."""
    rows = ["| fault | first line |", "|---|---|"]
    for number, (fault, (make, _)) in enumerate(FAULTS.items()):
        make(folder / str(number))
        rows.append(f"| {fault} | {first_line(folder / str(number))} |")
    return rows


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("runs")
    return folder, table(folder)


def test_the_table_in_docs_is_what_reports_say(lines: tuple[Path, list[str]]) -> None:
    assert "\n".join(lines[1]) in DOCS.read_text(encoding="utf-8"), "\n".join(("put this table there:", *lines[1]))


@pytest.mark.parametrize("fault", FAULTS)
def test_culprit_and_evidence_stand_in_the_first_line(lines: tuple[Path, list[str]], fault: str) -> None:
    folder, rows = lines
    number = list(FAULTS).index(fault)
    first = rows[2 + number].split(" | ")[1].removesuffix(" |")
    begin = FAULTS[fault][1]
    assert first.startswith(begin)
    evidence = ("died", "lost", "waiting", "late", "sys.exit", "its collective", "longer")
    assert any(word in first for word in evidence), first
    page = render_html(build_report(folder / str(number)))
    told = headline(build_report(folder / str(number)))[0]
    assert told.startswith(begin)
    assert "<h2>" + told[:30].replace("&", "&amp;") in page


def test_the_cause_that_the_nodes_monitor_saw_is_named(lines: tuple[Path, list[str]]) -> None:
    row = next(one for one in lines[1] if "CPU quota" in one)
    assert "node node-a: its cgroup /job was throttled (CPU quota of 0.5 cores)" in row


def test_what_a_launcher_told_of_a_straggler_is_not_told_twice(tmp_path: Path) -> None:
    """The report has its own evidence, of the whole run."""
    run = SyntheticRun(run_dir=tmp_path, late_s={3: 0.060})
    run.start()
    run.train(1, 60)
    late = verdict("began", 60, place="rank", ranks=(3,), nodes=("node-b",), syndrome="non_communication_slow", step=3)
    run.launcher(late, generation=0)
    run.end()
    assert first_line(tmp_path).startswith("Rank 3 on node-b is a straggler")
    told = [one for one in build_report(tmp_path).incidents if one.kind == "verdict"]
    assert [one.title for one in told] == ["slow outside communication: rank 3 on node-b since step 3"]


def test_a_verdict_of_a_version_to_come_is_left_out(tmp_path: Path) -> None:
    run = SyntheticRun(run_dir=tmp_path)
    run.start()
    run.train(1, 60)
    run.launcher(verdict("began", 60, syndrome="haunted"), generation=0)
    run.launcher(verdict("began", 60, ranks=None), generation=0)
    run.end()
    assert not [one for one in build_report(tmp_path).incidents if one.kind == "verdict"]
    assert headline(build_report(tmp_path))[0] == "No straggler"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        sys.stdout.write("\n".join(table(Path(made))) + "\n")
