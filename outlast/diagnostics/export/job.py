"""What the process that exports a node's events is told."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from outlast.diagnostics import port_token
from outlast.diagnostics.config import DiagnosticsConfig
from outlast.diagnostics.export.config import ExportConfig
from outlast.errors import ConfigError

LONGEST_END_S = 120.0
"""After its launcher has ended, the process ends within this time, whatever its clients do."""


@dataclass(frozen=True, kw_only=True)
class ExportJob:
    """Which events to tell, and to whom."""

    run_dir: str
    settings: ExportConfig
    since_t: float
    """Events before this, in seconds since the epoch, are of earlier launches."""
    steps_done: int = 0
    """The last step of earlier launches."""
    agent: str = ""
    """The events of the node's launcher."""
    trackers_since_t: float = 0.0
    """TensorBoard, W&B and MLflow have been told what came before."""
    socket_fd: int | None = None
    """The socket of Prometheus' port, which listens."""
    thresholds: DiagnosticsConfig = field(default_factory=DiagnosticsConfig)

    @property
    def run(self) -> str:
        """The run's name."""
        return self.settings.run_name or Path(self.run_dir).resolve().name

    def to_json(self) -> str:
        """As an argument of a command line; there is no secret in it."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ExportJob:
        """Read what :meth:`to_json` wrote."""
        raw: dict[str, Any] = json.loads(text)
        raw["settings"] = ExportConfig(**raw["settings"])
        raw["thresholds"] = DiagnosticsConfig(**raw["thresholds"])
        return cls(**raw)


def check_variables(settings: ExportConfig, environ: Mapping[str, str]) -> None:
    """Refuse what OpenTelemetry's variables ask for and is not there.

    Raises:
        ConfigError: another protocol than OTLP over HTTP; names the variable.
    """
    if not settings.opentelemetry:
        return
    for name in ("OTEL_EXPORTER_OTLP_METRICS_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        value = environ.get(name)
        if value not in (None, "", "http/protobuf"):
            raise ConfigError(
                f"{name}={value}: metrics go by http/protobuf alone", f"unset it, or set {name}=http/protobuf"
            )
        if value:
            return  # the first one overrides the second


def read_token(settings: ExportConfig) -> str | None:
    """The token of Prometheus' port; None if none is asked for.

    Raises:
        ConfigError: the file cannot be read, or holds no token of one line of printable ASCII.
    """
    path = settings.prometheus_token_file
    return None if path is None else port_token.read_token(path, "export.prometheus_token_file")
