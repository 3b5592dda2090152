"""Metrics as Prometheus reads them."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from outlast.config import load
from outlast.diagnostics.export import installed
from outlast.diagnostics.export.config import ExportConfig
from outlast.diagnostics.export.job import ExportJob, read_token
from outlast.diagnostics.export.metrics import METRICS, NodeMetrics
from outlast.diagnostics.export.prometheus import PrometheusExporter
from outlast.diagnostics.export.start import Running, started
from outlast.errors import ConfigError, MissingDependency, OutOfRange, PortInUse
from outlast.launch.exporting import start_exporting
from tests.diagnostics.export.node import STEP, Node, record
from tests.helpers import outlast, tiny_config

pytestmark = pytest.mark.prometheus
TOKEN = "0123456789abcdef0123456789abcdef"


@contextmanager
def serving(token: str | None = None) -> Iterator[tuple[PrometheusExporter, int]]:
    listening = socket.create_server(("127.0.0.1", 0))
    exporter = PrometheusExporter(NodeMetrics(), 'a "name"\n', listening, token)
    try:
        yield exporter, listening.getsockname()[1]
    finally:
        exporter.close()


def get(port: int, **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", "/metrics", headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def test_what_is_served_can_be_parsed_and_is_all_documented(root: Path) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    with serving() as (exporter, port):
        exporter.take(0, record(10.0, "workers_started", host="h1", ranks=[0]))
        exporter.take(1, record(12.0, "step", 0, step=1, **STEP))
        exporter.lost("dropped_records", "wandb")
        status, text = get(port)
    assert status == 200
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert families["outlast_step_seconds"].type == "histogram"
    assert families["outlast_goodput_seconds"].type == "counter"
    by_name = {metric.name: metric for metric in METRICS}
    for name, family in families.items():
        assert family.documentation == by_name[name].help
        for sample in family.samples:
            assert sample.labels["run"] == 'a "name"\n'
            assert set(sample.labels) - {"le"} == {"run", *by_name[name].labels}
    (dropped,) = families["outlast_export_dropped_records"].samples
    assert (dropped.labels["exporter"], dropped.value) == ("wandb", 1)


def test_a_token_is_demanded() -> None:
    with serving(TOKEN) as (_, port):
        assert get(port)[0] == 401
        assert get(port, Authorization=f"Bearer {TOKEN}x")[0] == 401
        assert get(port, Authorization=f"Basic {TOKEN}")[0] == 401
        assert get(port, Authorization="Bearer \xff\xfe")[0] == 401
        status, text = get(port, Authorization=f"Bearer {TOKEN}")
        assert status == 200
        assert "outlast_goodput_seconds_total" in text
        assert TOKEN not in text


def test_a_client_that_says_nothing_keeps_no_other_waiting() -> None:
    with serving() as (_, port), socket.create_connection(("127.0.0.1", port)):
        assert get(port)[0] == 200


def test_the_token_is_read_from_its_file_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "token"
    settings = ExportConfig(prometheus_port=0, prometheus_token_file=str(path))
    for content, why in ((None, "cannot be read"), ("short", "no token"), ("two words of it 0123456789", "no token")):
        if content is not None:
            path.write_text(content)
        with pytest.raises(ConfigError, match=why):
            read_token(settings)
    path.write_text(TOKEN + "\n")
    assert read_token(settings) == TOKEN
    job = ExportJob(run_dir="/r/name", settings=settings, since_t=1.0)
    assert TOKEN not in job.to_json()
    assert ExportJob.from_json(job.to_json()) == job


@pytest.mark.parametrize(
    "setting", ["prometheus-port=70000", "prometheus-token-file=x", "run-name=", "queue-records=0"]
)
def test_settings_out_of_range(setting: str) -> None:
    from outlast.cli.program_config import ProgramConfig

    key, _, value = setting.partition("=")
    with pytest.raises(OutOfRange, match=r"export\."):
        load(ProgramConfig, environ={}, overrides={f"export.{key.replace('-', '_')}": value})


def test_a_port_in_use_is_told_before_anything_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        settings = ExportConfig(prometheus_port=other.getsockname()[1])
        with pytest.raises(PortInUse, match=r"export\.prometheus_port"):
            start_exporting(settings, tmp_path, tmp_path / "agent.jsonl", steps_done=0)


def test_what_is_not_installed_is_told_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(installed.MODULES, "prometheus", ("prometheus_client_that_is_not_there.x",))
    with pytest.raises(MissingDependency, match=r"outlast\[prometheus\]"):
        installed.check_installed(ExportConfig(prometheus_port=0))
    installed.check_installed(ExportConfig())


def test_an_event_that_makes_no_sense_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    node = Node(tmp_path)
    node.started(100.0)
    node.step(101.0, 1, tokens="many")
    node.step(102.0, 2)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        job = ExportJob(
            run_dir=str(tmp_path),
            settings=ExportConfig(prometheus_port=0),
            since_t=1.0,
            agent=str(node.agent),
            socket_fd=listening.detach(),
        )
        running: Running = started(job)
        running.poll()
        text = get(port)[1]
        running.close()
    assert f'outlast_tokens_total{{run="{tmp_path.name}"}} 128.0' in text
    assert sum("was left out" in one.getMessage() for one in caplog.records) == 1


def test_ranks_without_a_launcher_refuse_what_nobody_would_export(tmp_path: Path) -> None:
    config, run = tiny_config(tmp_path)
    done = outlast("train", config, "--export.prometheus-port", "0", check=2)
    assert "[export] asks for prometheus, but no outlast launch runs here" in done.stderr
    assert not run.exists()
