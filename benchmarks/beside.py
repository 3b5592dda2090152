"""Five faults, told by outlast, TraceML, and torchrun with torch's flight recorder analyser: who names what, when.

    python -m benchmarks.beside [--traceml VENV/bin/traceml] [--only KIND,…] [--json FILE] [--table FILE]

Each fault is suffered by rank 1 of three, on this machine, at step 60 (``beside_program``). ``outlast launch`` has its
defaults and no restarts; its answer is the first event that names a rank. ``traceml run`` has its defaults; its answer
is the verdict of its summary, which it prints when the job has ended: a job that hangs is interrupted after 40 s.
torchrun's answer is what ``torchfrtrace`` makes, 15 s after the fault or when the job has failed, of dumps that the
ranks have written, and the first failure that torchrun itself tells. Install TraceML into an environment of its own,
with the same torch: ``pip install traceml-ai``. Without ``--traceml`` its rows are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import psutil

from benchmarks.beside_program import CULPRIT, KINDS
from outlast.diagnostics.trace.plain_pickle import plain_pickle
from outlast.events import Record, read_events

PROGRAM = Path(__file__).with_name("beside_program.py")
RANKS, STEPS = 3, 180
INTERRUPTED_S, ASKED_S, LIMIT_S = 40.0, 15.0, 150.0
TELLING = ("hang_suspected", "hang_found", "workers_failed", "verdict")
BIN = Path(sys.executable).parent


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a tool said of a fault."""

    fault: str
    tool: str
    ranks: tuple[int, ...]
    """Whom it names, the first one first."""
    seconds: float | None
    """From the fault to the answer; None if there was none."""
    text: str

    @property
    def named(self) -> str:
        """Whether that is right."""
        if self.ranks[:1] == (CULPRIT,):
            return f"rank {CULPRIT}"
        return f"wrong: rank {self.ranks[0]}" if self.ranks else "no single rank"


class Job:
    """A tool's command, from its start to its end.

    Args:
        folder: for the program's files, and ``log``.
        words: the command.
        variables: of its environment, beside this process's.
    """

    def __init__(self, folder: Path, words: list[str], **variables: str) -> None:
        self.folder = folder
        with (folder / "log").open("wb") as log:
            environ = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", **variables}
            self._process = subprocess.Popen(
                words, stdout=log, stderr=subprocess.STDOUT, env=environ, start_new_session=True
            )

    @property
    def began_t(self) -> float | None:
        """When the fault began."""
        path = self.folder / "began"
        return float(path.read_text() or "nan") if path.exists() else None

    def log(self) -> str:
        """What the command has printed."""
        return (self.folder / "log").read_text(errors="replace")

    def wait_for(self, done: Callable[[], bool], after_s: float) -> None:
        """Until ``done``, the end, or so long after the fault."""
        until_s = time.monotonic() + LIMIT_S
        while self._process.poll() is None and not done() and time.monotonic() < until_s:
            if self.began_t is not None and time.time() - self.began_t > after_s:
                return
            time.sleep(0.1)

    def end(self, signum: signal.Signals = signal.SIGKILL, within_s: float = 60.0) -> None:
        """Send a signal, wait, and kill what is left of the command and of what it started."""
        family = psutil.Process(self._process.pid).children(recursive=True) if self._process.poll() is None else []
        if self._process.poll() is None and signum != signal.SIGKILL:
            self._process.send_signal(signum)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(within_s)
        self._process.kill()
        for one in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        self._process.wait(within_s)


def by_outlast(kind: str, folder: Path) -> Answer:
    """``outlast launch``: the first event that names a rank."""
    run = folder / "run"
    words = [
        str(BIN / "outlast"),
        "launch",
        "--nproc-per-node",
        str(RANKS),
        "--max-restarts",
        "0",
        "--run-dir",
        str(run),
    ]
    job = Job(folder, [*words, str(PROGRAM), kind, str(folder), str(STEPS), "outlast"])

    def told() -> list[Record]:
        found = [one for path in run.glob("events/*.jsonl") for one in read_events(path) if one.kind in TELLING]
        return sorted(found, key=lambda one: one.t)

    job.wait_for(lambda: bool(told()), INTERRUPTED_S)
    found, began_t = told(), job.began_t
    job.end(signal.SIGQUIT)
    if not found or began_t is None:
        return Answer(fault=kind, tool="outlast", ranks=(), seconds=None, text="")
    get = found[0].fields.get
    named = get("ranks") or ([get("culprit")] if get("culprit") is not None else [])
    text = get("words") or get("evidence") or "; ".join(get("reasons") or ())
    return Answer(
        fault=kind,
        tool="outlast",
        ranks=tuple(map(int, named)),
        seconds=found[0].t - began_t,
        text=f"{found[0].kind}: {text}",
    )


def by_traceml(kind: str, folder: Path, traceml: str) -> Answer:
    """``traceml run``: the verdict of its summary, at the end or when it is interrupted."""
    words = [traceml, "run", "--logs-dir", str(folder / "logs"), "--run-name", "run", "--finalize-timeout-sec", "30"]
    words += ["--nproc-per-node", str(RANKS), str(PROGRAM), "--args", kind, str(folder), str(STEPS), "traceml"]
    job = Job(folder, words)
    job.wait_for(lambda: False, INTERRUPTED_S)
    began_t = job.began_t
    job.end(signal.SIGINT)
    seconds = time.time() - (began_t or 0.0)
    said = [line.strip("| ").strip() for line in job.log().splitlines() if re.match(r"\|\s+(Verdict|Why):", line)]
    if not said or began_t is None:
        return Answer(fault=kind, tool="traceml", ranks=(), seconds=None, text="no summary")
    text = " ".join(re.sub(r"\s+", " ", one) for one in said)
    ranks = tuple(int(one) for one in re.findall(r"\bR(\d+)/N", text))
    return Answer(fault=kind, tool="traceml", ranks=ranks, seconds=seconds, text=text)


def _for_the_analyser(path: Path) -> bytes:
    """A rank's dump as ``torchfrtrace`` reads it: as a pickle, while torch writes it as JSON too."""
    dump = json.loads(path.read_text())
    groups = dump["pg_config"]
    if "" in groups:  # gloo calls its group so here, and 0 in the entries, of which the analyser dies
        groups["0"] = {**groups.pop(""), "name": "0"}
    for entry in dump["entries"]:
        entry.setdefault("frames", [])  # as JSON it is without them
    return plain_pickle(dump)


def by_torch(kind: str, folder: Path) -> Answer:
    """torchrun: its first failure, or what ``torchfrtrace`` makes of the dumps 15 s after the fault."""
    words = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", str(RANKS), str(PROGRAM)]
    job = Job(folder, [*words, kind, str(folder), str(STEPS), "torchfrtrace"], TORCH_FR_BUFFER_SIZE="2000")
    job.wait_for(lambda: False, ASKED_S)
    began_t = job.began_t or float("nan")
    job.end()
    dumps = folder / "dumps"
    dumps.mkdir()
    for path in folder.glob("fr_[0-9]*"):
        (dumps / path.name).write_bytes(_for_the_analyser(path))
    if not any(dumps.iterdir()):
        raise RuntimeError(f"the ranks wrote no dumps for torchfrtrace:\n{job.log()[-2000:]}")
    done = subprocess.run(
        [str(BIN / "torchfrtrace"), "-p", "fr_", str(dumps)], capture_output=True, text=True, timeout=60, check=False
    )
    seconds = time.time() - began_t
    said = done.stdout + done.stderr
    block = re.search(
        r"(Not all ranks joining collective|.*[Mm]ismatch.*|.*[Cc]ulprit.*), sequence number: (\d+)", said
    )
    missing = re.search(r"(?:missing ranks|[Cc]ulprit ranks?): \{?([\d, ]+)", said)
    text = "torchfrtrace: nothing is wrong"
    if block is not None:
        who = f", missing ranks {missing[1]}" if missing is not None else ""
        text = f"torchfrtrace: {block[1]} #{block[2]}{who}"
    elif done.returncode:
        text = f"torchfrtrace: {said.strip().splitlines()[-1]}"
    ranks = [int(one) for one in missing[1].split(",")] if missing is not None else []
    first = re.search(
        r"Root Cause \(first observed failure\):.*?rank\s*:\s*(\d+).*?exitcode\s*:\s*(-?\d+)", job.log(), re.S
    )
    if first is not None:
        text += f"; torchrun: root cause (first observed failure) rank {first[1]}, exit code {first[2]}"
        ranks = ranks if len(ranks) == 1 else [int(first[1])]
    named = tuple(ranks) if len(ranks) == 1 else ()  # a set of several names nobody
    return Answer(fault=kind, tool="torchrun", ranks=named, seconds=seconds, text=text)


def table(answers: list[Answer]) -> str:
    """In Markdown: a row a fault and tool."""
    rows = ["| fault of rank 1 | told by | names | after | says |", "|---|---|---|---|---|"]
    for one in answers:
        after = f"{one.seconds:.1f} s" if one.seconds is not None else "never"
        text = one.text.replace("|", "\\|")
        rows.append(f"| {one.fault} | {one.tool} | {one.named} | {after} | {text[:300]} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    """Run all, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traceml", default="")
    parser.add_argument("--only", default=",".join(KINDS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--table", type=Path)
    given = parser.parse_args()
    answers: list[Answer] = []
    with tempfile.TemporaryDirectory() as place:
        for number, kind in enumerate(one for one in KINDS if one in given.only.split(",")):
            ways: list[tuple[str, Callable[[str, Path], Answer]]] = [("outlast", by_outlast), ("torch", by_torch)]
            if given.traceml:
                ways.insert(1, ("traceml", lambda kind, folder: by_traceml(kind, folder, given.traceml)))
            for name, way in ways:
                folder = Path(place) / f"{number}_{name}"
                folder.mkdir()
                answers.append(way(kind, folder))
                print(f"{answers[-1].fault}: {answers[-1].tool}: {answers[-1].named}: {answers[-1].text}", flush=True)
    versions = {name: version(name) for name in ("outlast", "torch")}
    if given.traceml:
        code = "from importlib.metadata import version; print(version('traceml-ai'))"
        python = Path(given.traceml).with_name("python")
        versions["traceml-ai"] = subprocess.check_output([str(python), "-c", code], text=True).strip()
    rows = [{**asdict(one), "named": one.named} for one in answers]
    found = {
        "date": f"{datetime.now(UTC):%F}",
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "versions": versions,
        "answers": rows,
    }
    print(table(answers))
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    if given.table is not None:
        given.table.write_text(table(answers))


if __name__ == "__main__":
    main()
