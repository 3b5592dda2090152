"""A trace of many ranks and steps goes to the disk as it is made."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

MEMORY = """
import resource, sys
from pathlib import Path
{what}
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
REPORT = "from outlast.diagnostics import build_report; build_report(Path(sys.argv[1]))"
TRACE = (
    "from outlast.diagnostics.trace.run_trace import write_trace; "
    "print(write_trace(Path(sys.argv[1]), Path(sys.argv[2])).events, file=sys.stderr)"
)


def write_run(run_dir: Path, ranks: int, steps: int) -> None:
    """Events of ranks that take one second a step."""
    folder = run_dir / "attempts/0001/events"
    folder.mkdir(parents=True)
    common = '"rank":%d,"generation":0,"kind":"%s"'
    for rank in range(ranks):
        begun = common % (rank, "run_started")
        lines = [
            f'{{"v":1,"t":1790000000.0,{begun},"attempt":1,"world_size":{ranks},"host":"node-{rank // 8}","pid":{rank},'
            f'"device":"cpu","first_step":1,"last_step":{steps},"parameters":1,"comm":"dense"}}'
        ]
        lines += [
            f'{{"v":1,"t":{1790000000 + step}.{rank % 10},{common % (rank, "step")},"step":{step},"loss":2.5,"lr":0.1,'
            '"tokens":1,"step_s":1.0,"data_s":0.01,"comm_s":0.2,"checkpoint_s":0.001,"collective_s":0.3,"codec_s":0.0,'
            '"wire_bytes":1,"dense_bytes":1}'
            for step in range(1, steps + 1)
        ]
        (folder / f"rank_{rank:05d}.jsonl").write_text("\n".join(lines) + "\n")


def peak_kb(what: str, *words: Path) -> int:
    done = subprocess.run(
        [sys.executable, "-c", MEMORY.format(what=what), *map(str, words)], capture_output=True, text=True, check=True
    )
    return int(done.stdout.split()[-1])


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_a_trace_takes_no_more_memory_than_the_report(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 1024, 1000)
    trace = tmp_path / "trace.json.gz"
    of_report = peak_kb(REPORT, tmp_path / "run")
    of_trace = peak_kb(TRACE, tmp_path / "run", trace)
    assert of_trace < of_report + 64 * 1024
    steps = 0
    with gzip.open(trace, "rt") as lines:
        assert next(lines) == '{"displayTimeUnit":"ms","traceEvents":[\n'
        for line in lines:
            if line.startswith("{"):
                steps += json.loads(line.rstrip().rstrip(","))["name"].startswith("step ")
    assert steps == 1024 * 1000 + 1000  # and the counter of one rank
    print(f"report {of_report / 1024:.0f} MiB, trace {of_trace / 1024:.0f} MiB, {trace.stat().st_size / 2**20:.0f} MiB")
