"""``outlast predict``: whether compression would pay, before there is a run."""

from __future__ import annotations

import json
from typing import Any

import pytest

from outlast.cli.main import main
from outlast.comm.auto.forecast import METHODS, forecast
from outlast.comm.auto.policy import Link, Timing

WORDS = ["predict", "--parameters", "2e6", "--step-ms", "100", "--device", "cpu"]


def predicted(capsys: pytest.CaptureFixture[str], *more: str) -> list[dict[str, Any]]:
    assert main([*WORDS, *more, "--json"]) == 0
    return list(json.loads(capsys.readouterr().out)["methods"])


def test_dense_sends_what_a_ring_sends_and_a_slow_link_shows_it(capsys: pytest.CaptureFixture[str]) -> None:
    dense, *others = predicted(capsys, "--nodes", "4", "--link-mbit", "8")
    assert dense["wire_bytes"] == pytest.approx(2 * 3 / 4 * 4 * 2e6, rel=1e-3)
    assert dense["codec_s"] == 0
    assert dense["wire_s"] == pytest.approx(12e6 / 1e6, rel=0.01)
    assert dense["step_s"] == pytest.approx(0.1 + 12 - 0.06, rel=0.01)
    for row in others:
        assert row["wire_bytes"] < 0.3 * dense["wire_bytes"]
        assert row["codec_s"] > 0
        assert row["step_s"] == pytest.approx(0.1 + row["codec_s"] + row["wire_s"] - 0.06, rel=0.5)


def test_the_verdict_follows_the_link(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*WORDS, "--nodes", "4", "--link-mbit", "1"]) == 0
    assert "Compression pays" in capsys.readouterr().out
    assert main([*WORDS, "--nodes", "4", "--link-mbit", "1e6"]) == 0
    assert "does not pay" in capsys.readouterr().out


def test_what_backward_hides_costs_nothing_but_the_last_bucket() -> None:
    (row,) = forecast(4 * 25 * 2**18, 2, Link(0.0, 1e9), Timing(10.0, 10.0), methods=METHODS[:1])
    assert row.step_s == pytest.approx(10 + row.wire_s / 4)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--link-mbit", "0"], "link-mbit"),
        (["--link-mbit", "10", "--nodes", "1"], "nodes = 1"),
        (["--link-mbit", "10", "--backward-share", "2"], "backward-share"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(capsys: pytest.CaptureFixture[str], words: list[str], told: str) -> None:
    assert main([*WORDS, *words]) == 2
    assert told in capsys.readouterr().err
