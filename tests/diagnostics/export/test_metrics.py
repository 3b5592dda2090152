"""Events added up to the metrics of a node."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from outlast.diagnostics.export.metrics import BOUNDS_S, METRICS, NodeMetrics
from tests.diagnostics.export.node import STEP, record


def values(metrics: NodeMetrics) -> dict[tuple[str, ...], float]:
    return {(one.metric.name, *one.labels): one.value for one in metrics.samples()}


def begun() -> NodeMetrics:
    metrics = NodeMetrics()
    metrics.take(0, record(10.0, "workers_started", host="h1", ranks=[2, 3]))
    for rank in (2, 3):
        metrics.take(1, record(11.0, "run_started", rank, host="h1", device="cpu", comm="dense"))
    return metrics


def test_steps_add_up_over_the_nodes_ranks_and_its_lowest_rank_tells_the_loss() -> None:
    metrics = begun()
    for rank, loss in ((3, 9.0), (2, 2.5)):
        metrics.take(1, record(12.0, "step", rank, step=4, **{**STEP, "loss": loss}))
    metrics.take(1, record(12.1, "step", 3, step=4, **{**STEP, "loss": 8.0}))
    found = values(metrics)
    assert found["outlast_tokens",] == 3 * 64
    assert found["outlast_wire_bytes",] == 300
    assert found["outlast_exposed_communication_seconds",] == pytest.approx(0.06)
    assert found["outlast_loss", "train"] == 2.5
    assert found["outlast_step",] == 4
    assert found["outlast_ranks",] == 2
    assert found["outlast_run_info", "h1", "cpu", "dense"] == 1
    assert sum(metrics.step_seconds.counts) == 3
    assert metrics.step_seconds.counts[BOUNDS_S.index(0.25)] == 3


def test_failures_verdicts_and_restarts_are_counted() -> None:
    metrics = begun()
    metrics.take(0, record(20.0, "hang_found", culprit=3, silent_s=5.0))
    metrics.take(0, record(21.0, "workers_failed", host="h1", ranks=[3], reasons=["hung, killed by the launcher: x"]))
    metrics.take(0, record(22.0, "workers_started", generation=1, host="h1", ranks=[2, 3]))
    metrics.take(0, record(23.0, "workers_failed", host="h1", ranks=[2], reasons=["killed by SIGKILL"]))
    found = values(metrics)
    assert (found["outlast_verdicts", "hang"], found["outlast_verdicts", "crash"]) == (1, 1)
    assert (found["outlast_rank_failures",], found["outlast_restarts",]) == (2, 1)


def test_checkpoints_are_counted_once_and_durable_means_committed_in_storage() -> None:
    metrics = begun()
    saved = {"size_bytes": 50, "blocked_s": 0.0, "durable_s": 0.1}
    metrics.take(1, record(20.0, "checkpoint_saved", 2, step=5, committed=False, tier="storage", **saved))
    metrics.take(1, record(20.1, "checkpoint_saved", 0, step=6, committed=True, tier="memory", **saved))
    assert ("outlast_checkpoint_durable_step",) not in values(metrics)
    metrics.take(1, record(20.2, "checkpoint_saved", 0, step=5, committed=True, tier="storage", **saved))
    metrics.take(1, record(20.3, "checkpoint_failed", 0, step=7, reason="disk full"))
    found = values(metrics)
    assert found["outlast_checkpoint_durable_step",] == 5
    assert (found["outlast_checkpoints_saved", "storage"], found["outlast_checkpoints_saved", "memory"]) == (1, 1)
    assert (found["outlast_checkpoint_bytes", "storage"], found["outlast_checkpoint_bytes", "memory"]) == (100, 50)
    assert found["outlast_checkpoints_failed", "storage"] == 1


def test_a_programs_steps_and_losses_that_are_not_finite() -> None:
    metrics = begun()
    metrics.take(1, record(12.0, "program_step", 2, step=1, step_s=0.1, collective_s=0.02))
    found = values(metrics)
    assert ("outlast_loss", "train") not in found
    assert found["outlast_collective_seconds",] == pytest.approx(0.02)
    metrics.take(1, record(13.0, "step", 2, step=2, **{**STEP, "loss": float("nan"), "grad_norm": None}))
    assert values(metrics)["outlast_loss", "train"] != values(metrics)["outlast_loss", "train"]


def test_collectives_of_steps_in_which_nobody_looked_are_estimated() -> None:
    metrics = begun()
    for step, inside_s in enumerate((0.02, None, None), 1):
        metrics.take(1, record(12.0 + step, "program_step", 2, step=step, step_s=0.1, collective_s=inside_s))
    assert values(metrics)["outlast_collective_seconds",] == pytest.approx(0.06)


def test_a_late_rank_is_counted_as_long_as_it_is_late() -> None:
    metrics = begun()
    for step in range(1, 41):
        for rank in (2, 3):
            told = {**STEP, "step_s": 0.3, "collective_s": 0.2 if rank == 2 else 0.01}
            metrics.take(1, record(12.0 + step, "step", rank, step=step, **told))
    assert values(metrics)["outlast_stragglers",] == 1
    for step in range(41, 300):
        for rank in (2, 3):
            metrics.take(1, record(12.0 + step, "step", rank, step=step, **STEP))
    assert values(metrics)["outlast_stragglers",] == 0


def test_names_follow_prometheus_conventions() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert metric.name.startswith("outlast_")
        assert not metric.name.endswith("_total"), "the client adds it to counters"
        assert metric.help.endswith(".")
        assert not set(metric.labels) & {"step", "rank", "pid", "attempt"}, "a label with ever new values"


def test_each_is_in_the_docs_as_it_is_served(root: Path) -> None:
    rows = re.findall(
        r"^\| `(outlast_\w+)` \| (\w+) \| (.*) \| (.*) \|$", (root / "docs" / "metrics.md").read_text(), re.M
    )
    served = [
        (
            metric.name + ("_total" if metric.kind == "counter" else ""),
            metric.kind,
            ", ".join(f"`{label}`" for label in metric.labels),
            metric.help,
        )
        for metric in METRICS
    ]
    assert rows == served
