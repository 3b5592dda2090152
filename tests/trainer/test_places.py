"""A rank that stands alone, or waits for others."""

from __future__ import annotations

import logging
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from outlast.errors import LaunchError
from outlast.free_port import free_port
from outlast.launch import Place
from outlast.session import process_group
from tests.helpers import clean_env, outlast, steps_saved, tiny_config


def test_what_another_job_left_in_the_environment_holds_nobody_up(tmp_path: Path) -> None:
    """The address is one that never answers (RFC 5737); the count is of another job's requeues."""
    config, run = tiny_config(tmp_path)
    left = {"MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "29500", "WORLD_SIZE": "4", "SLURM_RESTART_COUNT": "2"}
    done = outlast("train", config, "--trainer.steps", "2", env=clean_env(**left))
    said = done.stdout + done.stderr
    assert "MASTER_ADDR=192.0.2.1 MASTER_PORT=29500 WORLD_SIZE=4: ignored, because no RANK is set" in said
    assert "this process trains alone" in said
    assert steps_saved(run) == [2]


def test_a_rank_says_early_whom_it_waits_for(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(process_group, "TOLD_AFTER_S", 0.2)
    port = free_port()
    place = Place(
        rank=1,
        world_size=2,
        local_rank=1,
        local_world_size=2,
        master_addr="127.0.0.1",
        master_port=port,
        generation=0,
        source="slurm",
    )
    with (
        caplog.at_level(logging.WARNING, "outlast"),
        pytest.raises(LaunchError, match=rf"rank 1 of 2 \(slurm\) could not join .* at 127.0.0.1:{port}"),
    ):
        process_group.start(place, torch.device("cpu"), timedelta(seconds=1))
    (told,) = [record.getMessage() for record in caplog.records if "still waits" in record.getMessage()]
    assert told == (f"rank 1 of 2 (slurm) still waits for rank 0 at 127.0.0.1:{port}, up to 1 s (trainer.timeout_s)")
