"""What the watch on numbers told, as the report has it: once for all ranks, with the worst in the first line."""

from __future__ import annotations

import io
import json
from pathlib import Path

from rich.console import Console

from outlast.diagnostics import build_report, render_html, render_terminal
from outlast.diagnostics.numerics.events import NumericsDrift, NumericsEvent, ReplicasDifferent
from outlast.diagnostics.numerics.spikes import Spike, spike_event
from tests.diagnostics.report.synthetic import SyntheticRun, clean

DIFFERENT = ReplicasDifferent(
    step=20,
    ranks=(1,),
    groups=((0, 2, 3), (1,)),
    parameter="a.weight",
    count=1,
    equal_at=10,
    told="replicas are not the same, since a step after 10: rank 1 differs from the other 3 of 4, in a.weight <b>",
)
BEGAN = spike_event(22, "loss", Spike(22, 22, 9.5, 2.5, 40.0, is_over=False))
OVER = spike_event(25, "loss", Spike(22, 22, 9.5, 2.5, 40.0, is_over=True))
DRIFT = NumericsDrift(
    step=24,
    what="log Z",
    where="the output",
    count=1,
    value=5.0,
    limit=9.0,
    at_step=99,
    told="|log Z| is 5 [and rises]",
)


def with_events(folder: Path, *told: tuple[int, NumericsEvent]) -> Path:
    """A run of 30 steps; after step 20 ranks tell these."""
    run = SyntheticRun(run_dir=folder, steps=30)
    run.start()
    run.train(1, 20)
    for rank, event in told:
        run.write(run.logs[rank], event)
    run.train(21, 30)
    run.end()
    return folder


def test_what_ranks_told_is_a_section_and_the_worst_is_the_headline(tmp_path: Path) -> None:
    run = with_events(tmp_path, *[(rank, DIFFERENT) for rank in (3, 0, 1, 2)], (2, BEGAN), (2, OVER), (0, DRIFT))
    report = build_report(run)
    found = [(row.step, row.kind, row.severity, row.ranks) for row in report.numerics]
    assert found == [
        (20, "replicas_different", "bad", (0, 1, 2, 3)),
        (22, "numerics_spike", "warn", (2,)),
        (24, "numerics_drift", "warn", (0,)),
        (25, "numerics_spike", "good", (2,)),
    ]
    out = io.StringIO()
    render_terminal(report, Console(file=out, width=200))
    text = out.getvalue()
    first = text.splitlines()[0]
    assert first.startswith(
        "Replicas are not the same after step 20: replicas are not the same, since a step after 10: rank 1"
    )
    assert "told by ranks 0–3" in text
    assert "|log Z| is 5 [and rises]" in text
    assert "the loss is 9.5, 40 standard deviations above 2.5" in text
    page = render_html(report)
    assert "<h2>Numerics</h2>" in page
    assert "in a.weight &lt;b&gt;" in page
    assert '<span class="badge good">spike</span>' in page
    rows = json.loads(json.dumps(report.to_json()))["numerics"]
    assert [row["step"] for row in rows] == [20, 22, 24, 25]


def test_a_clean_run_has_no_such_section(tmp_path: Path) -> None:
    report = build_report(clean(tmp_path).run_dir)
    assert report.numerics == ()
    out = io.StringIO()
    render_terminal(report, Console(file=out, width=120))
    assert "Numerics" not in out.getvalue()
    assert "Numerics" not in render_html(report)


def test_events_of_a_version_to_come_do_no_harm(tmp_path: Path) -> None:
    run = with_events(tmp_path, (0, BEGAN))
    path = run / "attempts" / "0001" / "events" / "rank_00000.jsonl"
    with path.open("a") as file:
        file.write(json.dumps({"v": 1, "t": 1_790_000_100.0, "rank": 0, "generation": 0, "kind": "not_finite"}) + "\n")
    report = build_report(run)
    assert [(row.step, row.told) for row in report.numerics if row.kind == "not_finite"] == [(0, "not_finite")]
    render_html(report)
