"""What is wrong with a run, and which rank is at fault.

While a run goes on, each rank keeps a :class:`Recorder` of its collectives and a :class:`Heartbeat` in shared memory,
and the launcher asks :func:`outlast.diagnostics.live.judge` which rank blocks the others. Afterwards
:func:`build_report` computes a :class:`Report` from the events alone: loss, where the time went, what failed, and which
rank is a straggler.
"""

from outlast.diagnostics.config import DiagnosticsConfig
from outlast.diagnostics.live.heartbeat import Heartbeat
from outlast.diagnostics.live.recorder import Recorder
from outlast.diagnostics.report.build import build_report
from outlast.diagnostics.report.html import render_html
from outlast.diagnostics.report.model import Report
from outlast.diagnostics.report.terminal import render_terminal
from outlast.lazy import lazy_modules

__all__ = ["DiagnosticsConfig", "Heartbeat", "Recorder", "Report", "build_report", "render_html", "render_terminal"]

__getattr__ = lazy_modules(__name__, ["doctor"])
