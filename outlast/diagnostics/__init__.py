"""What is wrong, and with whom.

While a run goes on, each rank keeps a :class:`Recorder` of its collectives and a :class:`Heartbeat` in shared memory,
and the launcher asks :func:`judge` which rank holds the others up. Afterwards :func:`build_report` makes a
:class:`Report` from the events alone: loss, where the time went, what broke, and which rank is a straggler.
"""

from __future__ import annotations

from outlast.diagnostics.config import DiagnosticsConfig
from outlast.diagnostics.live.heartbeat import PHASES, Beat, Heartbeat, Phase, read_heartbeat
from outlast.diagnostics.live.recorder import Collective, Recorder, Ring, read_ring
from outlast.diagnostics.live.shm import clear, heartbeat_path, ring_path, shm_directory
from outlast.diagnostics.live.stall import (
    Culprit,
    Observation,
    StallRules,
    StallVerdict,
    judge,
    observe,
    process_state,
)
from outlast.diagnostics.report.build import build_report
from outlast.diagnostics.report.html import render_html
from outlast.diagnostics.report.incidents import Incident
from outlast.diagnostics.report.model import (
    CheckpointRow,
    Checkpoints,
    Facts,
    Lateness,
    LossCurve,
    Report,
    Start,
    TimeSplit,
    Traffic,
)
from outlast.diagnostics.report.stragglers import StragglerRow
from outlast.diagnostics.report.terminal import render_terminal

__all__ = [
    "PHASES",
    "Beat",
    "CheckpointRow",
    "Checkpoints",
    "Collective",
    "Culprit",
    "DiagnosticsConfig",
    "Facts",
    "Heartbeat",
    "Incident",
    "Lateness",
    "LossCurve",
    "Observation",
    "Phase",
    "Recorder",
    "Report",
    "Ring",
    "StallRules",
    "StallVerdict",
    "Start",
    "StragglerRow",
    "TimeSplit",
    "Traffic",
    "build_report",
    "clear",
    "heartbeat_path",
    "judge",
    "observe",
    "process_state",
    "read_heartbeat",
    "read_ring",
    "render_html",
    "render_terminal",
    "ring_path",
    "shm_directory",
]
