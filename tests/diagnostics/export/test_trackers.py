"""The real clients of OpenTelemetry, TensorBoard, W&B and MLflow, offline, fed by the process that exports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from outlast.diagnostics.export.config import ExportConfig
from outlast.diagnostics.export.job import ExportJob, check_variables
from outlast.errors import ConfigError
from tests.diagnostics.export.node import Node
from tests.helpers import clean_env

pytestmark = pytest.mark.trackers


def exported(job: ExportJob, **environ: str) -> str:
    """What the process says that exports all events there are, and ends with its input."""
    env = clean_env(CUDA_VISIBLE_DEVICES="", **environ)
    words = [sys.executable, "-P", "-m", "outlast.diagnostics.export", job.to_json()]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, env=env, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr
    return done.stderr


def told(run: Path) -> Node:
    """A run that is killed in step 3, and does step 2 again."""
    node = Node(run)
    node.started(100.0)
    node.told(101.0, "eval", 0, step=0, loss=5.0, seconds=0.5)
    for step in (1, 2):
        node.step(101.0 + step, step, loss=4.0 - step)
    node.told(104.0, "workers_failed", host="h1", ranks=[1], reasons=["killed by SIGKILL"], restarting=True)
    node.generation, node.attempt = 1, 2
    node.started(105.0)
    for step in (2, 3):
        node.step(105.0 + step, step, loss=3.5 - step)
    node.told(108.5, "logged", 0, step=3, values={"accuracy (top-1)": 0.75})
    return node


def test_each_tracker_has_what_rank_0_told(tmp_path: Path) -> None:
    run = tmp_path / "run"
    node = told(run)
    settings = ExportConfig(tensorboard=True, wandb=True, mlflow=True, run_name="mine")
    job = ExportJob(run_dir=str(run), settings=settings, since_t=1.0, agent=str(node.agent))
    said = exported(job, WANDB_MODE="offline", WANDB_PROJECT="p")
    assert "Traceback" not in said
    losses = [(1, 3.0), (2, 2.0), (2, 1.5), (3, 0.5)]
    assert tensorboard(run, "train/loss") == losses
    assert tensorboard(run, "eval/loss") == [(0, 5.0)]
    assert tensorboard(run, "goodput/redone_s")[-1][1] > 0
    assert mlflow(run, "train/loss") == losses
    assert mlflow(run, "accuracy _top-1_") == [(3, 0.75)]
    rows = wandb_rows(run)
    assert [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row] == losses
    assert [row["launch/restarts"] for row in rows if "launch/restarts" in row][-1] == 1

    # A later launch goes on with the same run, and tells nothing again.
    node.generation, node.attempt = 0, 3
    node.started(200.0)
    node.step(206.0, 4, loss=0.25)
    os.utime(node.agent)
    later = ExportJob(run_dir=str(run), settings=settings, since_t=150.0, agent=str(node.agent), steps_done=3)
    exported(later, WANDB_MODE="offline", WANDB_PROJECT="p")
    ids = {path.name.rpartition("-")[2] for path in run.glob("wandb/offline-run-*")}
    assert len(ids) == 1
    assert tensorboard(run, "train/loss") == [*losses, (4, 0.25)]
    assert mlflow(run, "train/loss") == [*losses, (4, 0.25)]


def tensorboard(run: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    found = []
    for path in sorted((run / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.tag == tag:
                    found.append((event.step, round(float(value.tensor.float_val[0]), 6)))
    return found


def mlflow(run: Path, key: str) -> list[tuple[int, float]]:
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=(run / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("outlast")
    assert experiment is not None
    (kept,) = client.search_runs([experiment.experiment_id])
    assert kept.info.run_name == "mine"
    assert kept.info.status == "FINISHED"
    return [
        (one.step, one.value)
        for one in sorted(client.get_metric_history(kept.info.run_id, key), key=lambda m: m.timestamp)
    ]


def wandb_rows(run: Path) -> list[dict[str, Any]]:
    from wandb.proto import wandb_internal_pb2

    (path,) = run.glob("wandb/offline-run-*/*.wandb")
    rows = []
    for data in leveldb_records(path.read_bytes()[7:]):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def leveldb_records(data: bytes) -> Iterator[bytes]:
    """The records of a log in LevelDB's format, whose first block lacks the seven bytes of W&B's own header."""
    at, whole = 0, b""
    while at + 7 <= len(data):
        left = 32768 - (at + 7) % 32768
        if left < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        if kind == 0:
            return
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield whole
            whole = b""


@contextmanager
def collector() -> Iterator[tuple[int, list[Any]]]:
    """What takes OTLP over HTTP, and the requests that it got."""
    from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

    got: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            import gzip

            body = self.rfile.read(int(self.headers["Content-Length"]))
            body = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
            request = ExportMetricsServiceRequest()
            request.ParseFromString(body)
            got.append((self.path, request))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port, got
    finally:
        server.shutdown()
        server.server_close()


def test_opentelemetry_gets_the_same_metrics(tmp_path: Path) -> None:
    node = told(tmp_path)
    job = ExportJob(
        run_dir=str(tmp_path),
        settings=ExportConfig(opentelemetry=True, run_name="mine"),
        since_t=1.0,
        agent=str(node.agent),
    )
    with collector() as (port, got):
        exported(job, OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{port}", OTEL_RESOURCE_ATTRIBUTES="team=x")
    path, request = got[-1]
    assert path == "/v1/metrics"
    (resource,) = request.resource_metrics
    attributes = {one.key: one.value.string_value for one in resource.resource.attributes}
    assert (attributes["service.name"], attributes["team"]) == ("outlast", "x")
    metrics = {metric.name: metric for metric in resource.scope_metrics[0].metrics}
    (tokens,) = metrics["outlast_tokens"].sum.data_points
    assert metrics["outlast_tokens"].sum.is_monotonic
    assert tokens.as_double == 8 * 64
    assert [(one.key, one.value.string_value) for one in tokens.attributes] == [("run", "mine")]
    (steps,) = metrics["outlast_step_seconds"].histogram.data_points
    assert steps.count == 8
    goodput = {
        next(a.value.string_value for a in point.attributes if a.key == "cause"): point.as_double
        for point in metrics["outlast_goodput_seconds"].sum.data_points
    }
    assert goodput["restart"] > 0
    assert metrics["outlast_wire_bytes"].unit == "By"


def test_a_collector_that_is_not_there_is_told_once_and_ends_nothing(tmp_path: Path) -> None:
    node = told(tmp_path)
    job = ExportJob(
        run_dir=str(tmp_path), settings=ExportConfig(opentelemetry=True), since_t=1.0, agent=str(node.agent)
    )
    said = exported(job, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9", OTEL_EXPORTER_OTLP_TIMEOUT="2000")
    assert 1 <= said.count("127.0.0.1") <= 4, said


def test_a_protocol_that_is_not_there_is_refused() -> None:
    settings = ExportConfig(opentelemetry=True)
    with pytest.raises(ConfigError, match="OTEL_EXPORTER_OTLP_PROTOCOL=grpc"):
        check_variables(settings, {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"})
    both = {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc", "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL": "http/protobuf"}
    check_variables(settings, both)
    check_variables(ExportConfig(), {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"})
