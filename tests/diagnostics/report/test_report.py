from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from outlast.diagnostics import DiagnosticsConfig, build_report, render_html, render_terminal
from outlast.diagnostics.report.summary import headline
from outlast.errors import DiagnosticsError, OutOfRange
from outlast.events import CheckpointFailed, CheckpointSaved, EventLog, RunEnded, StepDone
from tests.diagnostics.report.synthetic import SyntheticRun, clean, eventful


def terminal(run_dir: Path, width: int = 80) -> str:
    out = io.StringIO()
    render_terminal(build_report(run_dir), Console(file=out, width=width))
    return out.getvalue()


class TestStragglers:
    def test_a_rank_late_by_50_ms_stands_first(self, tmp_path: Path) -> None:
        clean(tmp_path, late_s={2: 0.050})
        report = build_report(tmp_path)
        first, *rest = report.stragglers
        assert (first.rank, first.host, first.straggler) == (2, "node-b", True)
        assert first.median_lateness_ms == pytest.approx(50, rel=0.2)
        assert first.latest_share > 0.9
        assert first.slowdown_share == pytest.approx(0.050 / 0.280, rel=0.2)
        assert first.longer[0][0] == "compute"
        assert not any(row.straggler for row in rest)
        assert report.verdict.startswith("Straggler: rank 2 on node-b (5")

    @pytest.mark.parametrize("noise_s", [0.001, 0.010, 0.040])
    @pytest.mark.parametrize("ranks", [2, 3, 16])
    def test_noise_makes_no_straggler(self, tmp_path: Path, ranks: int, noise_s: float) -> None:
        clean(tmp_path, ranks=ranks, noise_s=noise_s, seed=ranks)
        report = build_report(tmp_path)
        assert not any(row.straggler for row in report.stragglers)
        assert report.verdict.startswith("No straggler: ")

    @pytest.mark.parametrize("ranks", [2, 4, 16])
    def test_a_straggler_is_found_through_noise(self, tmp_path: Path, ranks: int) -> None:
        clean(tmp_path, ranks=ranks, noise_s=0.015, late_s={1: 0.050}, seed=ranks)
        report = build_report(tmp_path)
        assert [row.rank for row in report.stragglers if row.straggler] == [1]
        assert report.stragglers[0].behind_typical_ms == pytest.approx(50, rel=0.2)

    @pytest.mark.parametrize("late_s", [{}, {1: 0.050}])
    def test_steps_in_which_nobody_looked_are_not_taken_for_others(
        self, tmp_path: Path, late_s: dict[int, float]
    ) -> None:
        reports = []
        for every in (1, 8):
            clean(tmp_path / f"every{every}", steps=480, late_s=late_s, noise_s=0.015, looked_every=every)
            reports.append(build_report(tmp_path / f"every{every}"))
        all_of_them, some = reports
        assert [row.rank for row in some.stragglers if row.straggler] == list(late_s)
        assert not some.slow_phases
        assert some.traffic.collective_share == pytest.approx(all_of_them.traffic.collective_share, rel=0.05)
        assert some.lateness.steps == tuple(range(8, 481, 8))
        if late_s:
            assert some.stragglers[0].behind_typical_ms == pytest.approx(50, rel=0.2)
            assert some.stragglers[0].steps <= 60
            assert some.stragglers[0].cost_s == pytest.approx(all_of_them.stragglers[0].cost_s, rel=0.1)

    def test_two_stragglers_are_both_found_though_one_hides_the_other(self, tmp_path: Path) -> None:
        clean(tmp_path, ranks=6, late_s={1: 0.060, 4: 0.030})
        report = build_report(tmp_path)
        assert [(row.rank, row.straggler) for row in report.stragglers[:3]][:2] == [(1, True), (4, True)]
        assert not report.stragglers[2].straggler
        assert report.verdict.startswith("2 stragglers: rank 1 on node-a")

    def test_all_ranks_of_a_node_are_told_as_the_node(self, tmp_path: Path) -> None:
        clean(tmp_path, ranks=6, late_s={2: 0.050, 3: 0.055})
        report = build_report(tmp_path)
        first, evidence = headline(report)
        assert first == "Node node-b is slow: its ranks 2, 3 are late, those of other nodes are not"
        assert evidence.startswith("The latest, rank 3: 5")
        assert report.verdict.startswith("Node node-b is slow: 2 stragglers: rank 3 on node-b")
        assert "Node node-b is slow" in terminal(tmp_path, 200)

    def test_one_rank_each_of_two_nodes_is_no_slow_node(self, tmp_path: Path) -> None:
        clean(tmp_path, ranks=6, late_s={2: 0.050, 5: 0.055})
        assert headline(build_report(tmp_path))[0].startswith("2 stragglers: rank 5 on node-c, rank 2 on node-b")

    def test_a_rank_late_in_every_other_step_is_none(self, tmp_path: Path) -> None:
        run = SyntheticRun(run_dir=tmp_path)
        run.start()
        for step in range(1, run.steps + 1):
            run.late_s = {1: 0.1} if step % 2 else {}
            run.train(step, step)
        run.end()
        assert not any(row.straggler for row in build_report(tmp_path).stragglers)

    def test_a_rank_late_by_less_than_its_noise_is_none(self, tmp_path: Path) -> None:
        # as measured on a machine with more processes than cores: rank 0 writes checkpoints while it trains
        run = SyntheticRun(run_dir=tmp_path, ranks=2, compute_s=0.040)
        run.start()
        for step in range(1, run.steps + 1):
            run.late_s = {0: max(0.0, float(run.rng.normal(0.030, 0.060)))}
            run.noise_s = 0.020
            run.train(step, step)
        run.end()
        assert not any(row.straggler for row in build_report(tmp_path).stragglers)
        indifferent = DiagnosticsConfig(straggler_noise=0.0, straggler_latest_share=0.5)
        assert build_report(tmp_path, indifferent).stragglers[0].straggler

    def test_late_in_the_first_steps_only_is_warm_up(self, tmp_path: Path) -> None:
        run = SyntheticRun(run_dir=tmp_path, late_s={0: 3.0})
        run.start()
        run.train(1, 3)
        run.late_s = {}
        run.train(4, run.steps)
        run.end()
        report = build_report(tmp_path)
        assert not any(row.straggler for row in report.stragglers)
        assert report.lateness.late_ms[0][0] > 2900

    def test_few_steps_give_no_verdict(self, tmp_path: Path) -> None:
        clean(tmp_path, steps=12, late_s={1: 0.050})
        report = build_report(tmp_path)
        assert not any(row.straggler for row in report.stragglers)
        assert report.verdict.startswith("No verdict on stragglers: it takes 10 steps, and there are 9")

    def test_a_single_rank_has_nobody_to_keep_waiting(self, tmp_path: Path) -> None:
        clean(tmp_path, ranks=1, steps=20)
        report = build_report(tmp_path)
        assert report.stragglers == ()
        assert "only one rank" in report.verdict

    def test_the_thresholds_are_those_of_the_runs_config(self, tmp_path: Path) -> None:
        clean(tmp_path, late_s={2: 0.050})
        (tmp_path / "config.toml").write_text("[diagnostics]\nstraggler_min_s = 0.2\n[run]\nx = 1\n")
        assert not any(row.straggler for row in build_report(tmp_path).stragglers)
        (tmp_path / "attempts" / "0001" / "config.toml").write_text("[diagnostics]\nstraggler_min_s = 0.02\n")
        assert build_report(tmp_path).stragglers[0].straggler
        assert not build_report(tmp_path, DiagnosticsConfig(straggler_min_s=0.1)).stragglers[0].straggler

    @settings(max_examples=10)
    @given(late=st.integers(0, 3), late_ms=st.integers(40, 200), seed=st.integers(0, 1000))
    def test_whoever_is_late_is_named(
        self, tmp_path_factory: pytest.TempPathFactory, late: int, late_ms: int, seed: int
    ) -> None:
        folder = tmp_path_factory.mktemp("run")
        clean(folder, steps=30, late_s={late: late_ms / 1e3}, seed=seed)
        report = build_report(folder)
        assert [row.rank for row in report.stragglers if row.straggler] == [late]
        assert report.stragglers[0].median_lateness_ms == pytest.approx(late_ms, rel=0.2)


class TestRestarts:
    def test_the_last_execution_of_a_step_counts(self, tmp_path: Path) -> None:
        run = eventful(tmp_path, steps=60)  # steps 31-34 and 31-48 are executed again
        report = build_report(tmp_path)
        assert report.loss.steps == tuple(range(1, 61))
        assert report.facts.steps_redone == 4 + 18
        assert report.facts.restarts == 2
        assert report.facts.finished
        assert [(s.attempt, s.generation, s.first_step, s.last_step) for s in report.facts.starts] == [
            (1, 0, 1, 34),
            (2, 1, 31, 48),
            (3, 2, 31, 60),
        ]
        assert [round(s.began_s - s.launched_s, 3) for s in report.facts.starts] == [4.0, 4.0, 4.0]
        assert report.facts.wall_s == pytest.approx(run.t - 1_790_000_000.0, abs=2)
        assert report.missing == ()

    def test_incidents_are_one_story(self, tmp_path: Path) -> None:
        eventful(tmp_path)
        report = build_report(tmp_path)
        assert [one.kind for one in report.incidents] == [
            "checkpoint_failed",
            "workers_failed",
            "workers_started",
            "checkpoint_restored",
            "recovered",
            "hang_found",
            "workers_failed",
            "workers_started",
            "checkpoint_rejected",
            "checkpoint_restored",
            "recovered",
        ]
        hang = next(one for one in report.incidents if one.kind == "hang_found")
        assert (hang.rank, hang.step) == (3, 49)
        assert "stopped (state T)" in hang.detail
        rejected = next(one for one in report.incidents if one.kind == "checkpoint_rejected")
        assert "model/wte/c/0/0" in rejected.detail
        recovered = [one for one in report.incidents if one.kind == "recovered"]
        assert recovered[0].title == "training resumed with step 31"
        assert "4 steps redone" in recovered[0].detail
        states = {(row.attempt, row.step): row.state for row in report.checkpoints.rows}
        assert states[1, 20] == "failed"
        assert states[3, 60] == "committed"

    def test_a_rank_that_moved_is_judged_host_by_host(self, tmp_path: Path) -> None:
        run = SyntheticRun(run_dir=tmp_path, late_s={1: 0.050})
        run.start(hosts=["a", "sick", "b", "c"])
        run.train(1, 30)
        run.fail(3, generation=0, step=31)
        run.late_s = {}
        run.start(generation=1, first_step=31, hosts=["a", "well", "b", "c"])
        run.train(31, 60)
        run.end()
        rows = {(row.rank, row.host): row for row in build_report(tmp_path).stragglers}
        assert rows[1, "sick"].straggler
        assert rows[1, "sick"].steps == 27
        assert not rows[1, "well"].straggler

    def test_a_pause_between_launches_by_hand_is_not_wall_time(self, tmp_path: Path) -> None:
        run = SyntheticRun(run_dir=tmp_path)
        run.start()
        run.train(1, 20)
        run.end()
        run.t += 86_400
        run.start(first_step=21)
        run.train(21, 60)
        run.end()
        report = build_report(tmp_path)
        assert report.facts.wall_s < 100
        assert report.facts.restarts == 0


class TestContents:
    def test_the_parts_of_a_step_make_up_the_step(self, tmp_path: Path) -> None:
        clean(tmp_path)
        report = build_report(tmp_path)
        split = report.split
        for parts in zip(split.compute_s, split.data_s, split.communication_s, split.checkpoint_s, strict=True):
            assert 0.24 < sum(parts) < 0.32
        assert math.fsum(split.shares().values()) == pytest.approx(1.0)
        assert report.checkpoints.time_share == pytest.approx(split.shares()["checkpoint"])
        assert report.traffic.wire_bytes == 60 * 4 * 5_700_000
        assert report.traffic.ratio == pytest.approx(64.8 / 5.7)
        assert report.facts.tokens == 60 * 4 * 4096
        assert report.loss.eval_steps == (20, 40, 60)
        assert report.loss.train[0] > report.loss.train[-1]

    def test_a_copy_in_memory_hides_no_failure_in_storage(self, tmp_path: Path) -> None:
        clean(tmp_path)
        (path,) = tmp_path.glob("attempts/0001/events/rank_00000.jsonl")
        before = build_report(tmp_path).checkpoints.rows
        with EventLog(path, rank=0) as log:
            log.write(
                CheckpointSaved(step=55, committed=True, tier="memory", size_bytes=7, blocked_s=0.1, durable_s=0.2)
            )
            log.write(CheckpointFailed(step=55, reason="disk full"))
        rows = [row for row in build_report(tmp_path).checkpoints.rows if row.step == 55]
        assert [(row.tier, row.state, row.size_bytes, row.reason) for row in rows] == [
            ("memory", "committed", 7, ""),
            ("storage", "failed", 0, "disk full"),
        ]
        assert {row.tier for row in before} == {"storage"}

    @pytest.mark.parametrize("tier", ["partner", "local"])
    def test_copies_of_memory_are_copied_once_all_ranks_say_so(self, tmp_path: Path, tier: str) -> None:
        clean(tmp_path)
        saved: dict[str, Any] = {
            "committed": False,
            "tier": tier,
            "size_bytes": 7,
            "blocked_s": 0.0,
            "durable_s": 0.2,
        }
        for path in tmp_path.glob("attempts/0001/events/rank_*.jsonl"):
            rank = int(path.stem.removeprefix("rank_"))
            with EventLog(path, rank=rank) as log:
                log.write(CheckpointSaved(step=51, **saved))
                if rank != 1:
                    log.write(CheckpointSaved(step=52, **saved))
                    log.write(CheckpointSaved(step=53, **saved))
                else:
                    log.write(CheckpointFailed(step=53, tier=tier, reason="it refused"))
        report = build_report(tmp_path)
        rows = [(row.step, row.state, row.ranks) for row in report.checkpoints.rows if row.tier == tier]
        assert rows == [(51, "copied", 4), (52, "written", 3), (53, "failed", 3)]
        assert "copied" in terminal(tmp_path)
        assert '<span class="badge good">copied</span>' in render_html(report)

    def test_json_is_strict_and_complete(self, tmp_path: Path) -> None:
        eventful(tmp_path, late_s={2: 0.05})
        plain: dict[str, Any] = json.loads(json.dumps(build_report(tmp_path).to_json(), allow_nan=False))
        assert plain["stragglers"][0]["rank"] == 2
        assert plain["stragglers"][0]["straggler"] is True
        assert plain["stragglers"][0]["median_lateness_ms"] == pytest.approx(50, rel=0.2)
        assert set(plain["split"]["shares"]) == {"compute", "data", "communication", "checkpoint"}
        assert len(plain["lateness"]["late_ms"]) == 4
        assert plain["incidents"]

    def test_norms_of_gradients_and_of_updates_are_told_apart(self, tmp_path: Path) -> None:
        """Also of events that have no ``update_norm``, as those before it."""
        clean(tmp_path)
        report = build_report(tmp_path)
        assert report.loss.grad_norm[0] == pytest.approx(5.0)
        assert all(math.isnan(norm) for norm in report.loss.update_norm)
        assert "gradient norm" in terminal(tmp_path)
        for path in tmp_path.glob("attempts/*/events/*.jsonl"):
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            for line in lines:
                if line["kind"] == "step":
                    line |= {"grad_norm": None, "update_norm": 930.0 + line["step"]}
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        report = build_report(tmp_path)
        assert report.loss.update_norm[0] == pytest.approx(931.0)
        assert all(math.isnan(norm) for norm in report.loss.grad_norm)
        assert report.to_json()["loss"]["grad_norm"][0] is None
        said = terminal(tmp_path)
        assert "update norm" in said
        assert "gradient norm" not in said
        assert "update norm" in render_html(report)

    def test_a_loss_that_is_not_finite_is_an_incident(self, tmp_path: Path) -> None:
        run = SyntheticRun(run_dir=tmp_path, ranks=2, steps=12)
        run.start()
        run.train(1, 11)
        for rank, log in enumerate(run.logs):
            run.write(
                log,
                StepDone(
                    step=12,
                    loss=math.nan if rank else 2.0,
                    grad_norm=1.0,
                    lr=0.1,
                    tokens=1,
                    step_s=0.3,
                    data_s=0.0,
                    comm_s=0.0,
                    checkpoint_s=0.0,
                    collective_s=0.0,
                    codec_s=0.0,
                    wire_bytes=1,
                    dense_bytes=1,
                ),
            )
        run.end()
        report = build_report(tmp_path)
        (incident,) = report.incidents
        assert (incident.kind, incident.step, incident.rank) == ("loss_not_finite", 12, 1)
        assert report.to_json()["loss"]["train"][-1] is None


class TestMissing:
    def test_no_directory(self, tmp_path: Path) -> None:
        with pytest.raises(DiagnosticsError, match=r"no run directory at .*nowhere"):
            build_report(tmp_path / "nowhere")

    def test_no_events(self, tmp_path: Path) -> None:
        with pytest.raises(DiagnosticsError, match="contains no events"):
            build_report(tmp_path)

    def test_only_empty_files(self, tmp_path: Path) -> None:
        folder = tmp_path / "attempts" / "0001" / "events"
        folder.mkdir(parents=True)
        (folder / "rank_00000.jsonl").write_bytes(b'{"v":1,"t":1')
        with pytest.raises(DiagnosticsError, match="no readable event"):
            build_report(tmp_path)

    def test_a_torn_line_a_broken_one_and_an_absent_rank_are_told(self, tmp_path: Path) -> None:
        clean(tmp_path, steps=20)
        events = tmp_path / "attempts" / "0001" / "events"
        (events / "rank_00003.jsonl").unlink()
        torn = events / "rank_00001.jsonl"
        lines = torn.read_bytes().split(b"\n")
        lines[5] = b"\0" * 40
        torn.write_bytes(b"\n".join(lines[:-2])[:-7])
        report = build_report(tmp_path)
        text = "\n".join(report.missing)
        assert "rank_00001.jsonl: the last line is incomplete" in text
        assert "rank_00001.jsonl: 1 unreadable line skipped" in text
        assert "no events of rank 3 (of 4)" in text
        assert "without an event of every rank" in text
        assert "rank 1 of attempt 1: no event of the end" in text
        assert "missing:" in terminal(tmp_path)

    def test_an_unknown_schema_is_refused(self, tmp_path: Path) -> None:
        clean(tmp_path, steps=3)
        path = tmp_path / "attempts" / "0001" / "events" / "rank_00000.jsonl"
        path.write_text(path.read_text().replace('"v":1', '"v":2', 1))
        with pytest.raises(DiagnosticsError, match="event schema 2"):
            build_report(tmp_path)

    def test_a_run_without_a_finished_step(self, tmp_path: Path) -> None:
        run = SyntheticRun(run_dir=tmp_path)
        run.start()
        for log in run.logs:
            run.write(log, RunEnded(step=0, ok=False, reason="no data"))
        run.end(ok=False)
        report = build_report(tmp_path)
        assert not report.facts.finished
        assert "no step was finished" in report.verdict
        assert report.incidents[0].title == "rank 0 failed at step 0"
        json.dumps(report.to_json(), allow_nan=False)
        assert "no data" in terminal(tmp_path)

    def test_launcher_events_alone(self, tmp_path: Path) -> None:
        run = SyntheticRun(run_dir=tmp_path)
        run.fail(0, generation=0, step=0)
        report = build_report(tmp_path)
        assert [one.kind for one in report.incidents] == ["workers_failed"]
        assert "failed on node-a" in terminal(tmp_path)


class TestTerminal:
    def test_it_tells_the_story_in_80_columns_without_a_terminal(self, tmp_path: Path) -> None:
        eventful(tmp_path, late_s={2: 0.05})
        text = terminal(tmp_path)
        assert max(map(len, text.splitlines())) <= 80
        assert "\x1b" not in text
        for words in (
            "Straggler: rank 2 on node-b",
            "held-out loss",
            "transfer",
            "waiting for late ranks",
            "rank 3 hung",
        ):
            assert words in text
        assert "11.4 × as much" in text
        assert "committed" in text

    def test_markup_in_events_is_text(self, tmp_path: Path) -> None:
        run = clean(tmp_path, steps=15)
        with EventLog(tmp_path / "attempts" / "0001" / "events" / "rank_00000.jsonl", rank=0) as log:
            run.write(log, RunEnded(step=3, ok=False, reason="[bold]x[/bold] [/nothing]"))
        assert "[bold]x[/bold] [/nothing]" in terminal(tmp_path, width=120)

    def test_no_straggler_is_said_so(self, tmp_path: Path) -> None:
        clean(tmp_path)
        assert "No straggler" in terminal(tmp_path)


@pytest.mark.parametrize(
    "setting",
    [
        {"ring_capacity": 1},
        {"straggler_min_s": 0.0},
        {"straggler_share": 1.0},
        {"straggler_latest_share": 0.4},
        {"straggler_noise": -1.0},
        {"straggler_sigmas": -1.0},
        {"straggler_min_steps": 2},
        {"straggler_warmup_steps": -1},
    ],
)
def test_settings_out_of_range_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(OutOfRange, match=f"diagnostics.{next(iter(setting))}"):
        DiagnosticsConfig(**setting)
