"""The settings of a launch of somebody's program."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from outlast.diagnostics.config import DiagnosticsConfig
from outlast.diagnostics.export.config import ExportConfig
from outlast.diagnostics.page.config import PageConfig
from outlast.launch.config import LaunchConfig


@dataclass(frozen=True, kw_only=True)
class ProgramConfig:
    """The settings that apply to any program; sections of a TOML file."""

    launch: LaunchConfig = dataclasses.field(default_factory=LaunchConfig)
    export: ExportConfig = dataclasses.field(default_factory=ExportConfig)
    page: PageConfig = dataclasses.field(default_factory=PageConfig)
    diagnostics: DiagnosticsConfig = dataclasses.field(default_factory=DiagnosticsConfig)
