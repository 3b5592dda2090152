"""The Grafana dashboard, checked with a real Prometheus that scrapes a real run: each panel's query has data."""

from __future__ import annotations

import json
import math
import re
import signal
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from outlast.diagnostics.export.metrics import METRICS
from outlast.free_port import free_port
from tests.helpers import clean_env, start_outlast, tiny_config, wait_for

DASHBOARD = json.loads((Path(__file__).parent.parent / "grafana" / "outlast.json").read_text())
QUERIES = [(panel["title"], target["expr"]) for panel in DASHBOARD["panels"] for target in panel["targets"]]
TOKEN = "0123456789abcdef0123456789abcdef"


def test_it_shows_what_there_is() -> None:
    """Metrics by their names as served; panels with numbers of their own that do not lie on one another."""
    served = {metric.name + ("_total" if metric.kind == "counter" else "") for metric in METRICS}
    served = {f"{name}_bucket" if name == "outlast_step_seconds" else name for name in served}
    shown = {name for _, query in QUERIES for name in re.findall(r"\boutlast_\w+", query)}
    assert shown == served
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24
    for panel in panels:
        assert panel["description"].endswith(".")
        assert {panel["datasource"]["uid"], *(one["datasource"]["uid"] for one in panel["targets"])} == {
            "${datasource}"
        }
    assert all('run=~"$run"' in query for _, query in QUERIES)


@contextmanager
def prometheus(folder: Path, target: str, token: Path) -> Iterator[str]:
    """A Prometheus that scrapes twice a second; its address."""
    config = {
        "global": {"scrape_interval": "500ms", "scrape_timeout": "500ms"},
        "scrape_configs": [
            {
                "job_name": "outlast",
                "authorization": {"credentials_file": str(token)},
                "static_configs": [{"targets": [target]}],
            }
        ],
    }
    (folder / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
    address = f"127.0.0.1:{free_port()}"
    words = [f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'tsdb'}"]
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen(
            ["prometheus", *words, f"--web.listen-address={address}"], stdout=log, stderr=log, env=clean_env()
        )
        try:
            yield address
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def ask(address: str, query: str) -> list[dict[str, Any]]:
    """What an instant query returns, without what is no number."""
    url = f"http://{address}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
    with urllib.request.urlopen(url, timeout=10) as answer:
        found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
    return [one for one in found if not math.isnan(float(one["value"][1]))]


@pytest.mark.slow
@pytest.mark.prometheus
@pytest.mark.trackers
def test_each_panel_has_data(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(TOKEN)
    config, _ = tiny_config(tmp_path)
    settings = {
        "trainer.steps": "1000000",
        "trainer.eval-every-steps": "20",
        "checkpoint.every-steps": "10",
        "checkpoint.keep-last": "2",
        "export.prometheus-port": "0",
        "export.prometheus-token-file": str(token),
        "export.tensorboard": "true",
        "export.run-name": "a run",
    }
    words = [word for key, value in settings.items() for word in (f"--{key}", value)]
    log = tmp_path / "log"
    job = start_outlast("launch", config, "--nproc-per-node", "2", *words, log=log)
    try:
        wait_for(log.exists)
        port = wait_for(lambda: re.search(r"metrics at http://[\d.]+:(\d+)/metrics, with the token", log.read_text()))[
            1
        ]
        with prometheus(tmp_path, f"127.0.0.1:{port}", token) as address:
            wait_for(lambda: "Server is ready" in (tmp_path / "prometheus.log").read_text())
            wait_for(lambda: ask(address, "outlast_stragglers"), every_s=0.5)
            for title, query in QUERIES:
                query = query.replace("$__rate_interval", "15s").replace("$run", ".+")
                found = wait_for(lambda query=query: ask(address, query), timeout_s=60, every_s=0.5)
                assert all(one["metric"].get("run", "a run") == "a run" for one in found), title
            (ranks,) = ask(address, "outlast_ranks")
            assert ranks["value"][1] == "2"
            causes = {
                one["metric"]["cause"]: float(one["value"][1]) for one in ask(address, "outlast_goodput_seconds_total")
            }
            assert causes["useful"] > 0
            assert causes["evaluation"] > 0
            assert causes["checkpoint"] > 0
    finally:
        job.send_signal(signal.SIGTERM)
        try:
            status = job.wait(timeout=60)
        finally:
            job.kill()
    assert status == 75, log.read_text()
