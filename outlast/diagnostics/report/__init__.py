"""A run's report, computed from its events: on the terminal, as HTML, as JSON."""

from outlast.diagnostics.report.build import build_report
from outlast.diagnostics.report.html import render_html
from outlast.diagnostics.report.incidents import Incident
from outlast.diagnostics.report.model import (
    CheckpointRow,
    Checkpoints,
    Facts,
    GoodputSplit,
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
    "CheckpointRow",
    "Checkpoints",
    "Facts",
    "GoodputSplit",
    "Incident",
    "Lateness",
    "LossCurve",
    "Report",
    "Start",
    "StragglerRow",
    "TimeSplit",
    "Traffic",
    "build_report",
    "render_html",
    "render_terminal",
]
