"""``outlast report RUN --trace FILE``: the run as a trace, from its events."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from outlast.diagnostics.monitor import NodeClock
from outlast.diagnostics.report.build import report_of
from outlast.diagnostics.report.endings import Ending, find_endings
from outlast.diagnostics.report.html_file import check_html_target
from outlast.diagnostics.report.load import Loaded, load
from outlast.diagnostics.report.model import Report
from outlast.diagnostics.trace.arrows import Arrows
from outlast.diagnostics.trace.places import RUN, Places
from outlast.diagnostics.trace.rank_story import Clock, RankStory
from outlast.diagnostics.trace.trace_file import TraceFile
from outlast.errors import DiagnosticsError
from outlast.events import ProgramStep, Record, StepDone, parse_event

STEPS = (StepDone.kind, ProgramStep.kind)


@dataclass(frozen=True, kw_only=True)
class Written:
    """What a trace holds."""

    events: int
    arrows: int
    missing: tuple[str, ...]
    """What could not be read, or not be drawn where it was, as text for people."""


def write_trace(run_dir: Path | str, path: Path) -> Written:
    """Write the run at ``run_dir`` in Chrome's Trace Event Format, which Perfetto opens.

    Slices go to the file as the ranks' events are read, one rank after another. What stays in memory are the tables of
    the report (about 500 bytes a rank and step while they are made), and nothing that grows with the trace.

    Args:
        run_dir: the run's directory.
        path: the file; one that ends in ``.gz`` is compressed.

    Raises:
        DiagnosticsError: there is no run, its events are of a version that is not known, or the file cannot be written;
            an earlier file stays as it was.
    """
    run_dir = Path(run_dir)
    check_html_target(path)
    loaded = load(run_dir)
    clock = _clock(loaded)
    endings = find_endings(loaded, clock.ahead_s)
    report = report_of(loaded, run_dir)
    del loaded
    arrows = Arrows(report)
    missing = list(report.missing)
    with TraceFile(path) as trace:
        places = Places(trace, report.name)
        moved = 0
        counted = min(report.lateness.ranks, default=0)
        for rank, files in sorted(_files(run_dir).items()):
            story = RankStory(trace, places, clock, rank, endings, arrows, counted=rank == counted)
            _tell(story, files)
            moved += story.moved
        _silent_ranks(trace, places, clock, endings, arrows, set(_files(run_dir)))
        _incidents(trace, report, clock)
        arrows.draw(trace)
        if moved:
            missing.append(f"{moved} slices stand later than their events say: a clock was set back in between")
        if arrows.left_out:
            missing.append(
                f"{arrows.left_out} waits have no arrow: by the nodes' clocks they began after what they waited for"
            )
        return Written(events=trace.events, arrows=trace.arrows, missing=tuple(missing))


def _clock(loaded: Loaded) -> Clock:
    """By what each host's monitor told last; the first event of the run is at zero, or soon after it."""
    ahead_s = {
        str(one.fields.get("host")): float(one.fields.get("ahead_s") or 0.0)
        for one in loaded.nodes
        if one.kind == NodeClock.kind
    }
    times = [record.t for _, record in loaded.others] + [span[0] for span in loaded.spans.values()]
    return Clock(zero_t=min(times, default=0.0) - max(0.0, *ahead_s.values(), 0.0), ahead_s=ahead_s)


def _files(run_dir: Path) -> dict[int, list[Path]]:
    """By rank, its files of events, oldest attempt first."""
    found: dict[int, list[Path]] = {}
    for folder in sorted(run_dir.glob("attempts/[0-9]*"), key=lambda one: (len(one.name), one.name)):
        for path in folder.glob("events/rank_*.jsonl") if folder.name.isdecimal() else ():
            if match := re.fullmatch(r"rank_(\d+)\.jsonl", path.name):
                found.setdefault(int(match[1]), []).append(path)
    return found


def _tell(story: RankStory, files: list[Path]) -> None:
    for path in files:
        waiting: list[Record] | None = []  # until the first step, which has a host before it
        for number, record in _records(path):
            try:
                if waiting is not None and record.kind not in STEPS:
                    waiting.append(record)
                    continue
                if waiting is not None:
                    story.begin(waiting)
                    waiting = None
                story.add(record)
            except (KeyError, TypeError, ValueError) as error:
                raise DiagnosticsError(f"{path}:{number}: a {record.kind} event without a valid {error}") from error
        if waiting:
            story.begin(waiting)
    story.close()


def _records(path: Path) -> Iterator[tuple[int, Record]]:
    """The events of one file with their lines, as they are read; lines that are none were told by the report."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.endswith(b"\n"):
                    try:
                        record = parse_event(line, f"{path}:{number}")
                    except DiagnosticsError:  # torn; of another version, the report has refused it
                        continue
                    yield number, record
    except OSError:  # as the report has told
        return


def _silent_ranks(
    trace: TraceFile, places: Places, clock: Clock, endings: list[Ending], arrows: Arrows, told: set[int]
) -> None:
    """Ranks of which there are no events: how they ended, as their launchers saw it."""
    for rank in sorted({rank for one in endings for rank in (*one.failed, *one.collectives)} - told):
        RankStory(trace, places, clock, rank, endings, arrows, counted=False).close()


def _incidents(trace: TraceFile, report: Report, clock: Clock) -> None:
    for one in report.incidents:
        args = {"detail": one.detail, "step": one.step, "rank": one.rank}
        trace.instant(RUN, one.title, clock.us(report.facts.began_t + one.at_s, ""), one.kind, args)
