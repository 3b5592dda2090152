"""The log line of rank 0."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from outlast.events import StepDone
from outlast.trainer.progress import Progress


def line(caplog: pytest.LogCaptureFixture, **norm: Any) -> str:
    done = StepDone(
        step=1,
        loss=2.5,
        lr=1e-3,
        tokens=100,
        step_s=0.5,
        data_s=0.0,
        comm_s=0.1,
        checkpoint_s=0.05,
        collective_s=0.1,
        codec_s=0.1,
        wire_bytes=1,
        dense_bytes=2,
        **norm,
    )
    progress = Progress(every_steps=10, last_step=100, world_size=2, flops_per_token=1e6, peak_tflops=None)
    with caplog.at_level(logging.INFO, logger="outlast.progress"):
        progress.step(done)
    return caplog.messages[-1]


@pytest.mark.parametrize(
    ("norm", "shown"), [({"grad_norm": 1.25}, "|g|   1.250  "), ({"update_norm": 933.04}, "|u|   933.0  ")]
)
def test_the_line_names_the_norm_of_what_was_averaged(
    caplog: pytest.LogCaptureFixture, norm: dict[str, float], shown: str
) -> None:
    said = line(caplog, **norm)
    assert shown in said
    assert "400 tok/s" in said
    assert "comm  20%  ckpt  10%" in said
    assert said.count("|") == 2
