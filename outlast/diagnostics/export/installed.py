"""Whether what is asked for can be used here, found out before any rank starts."""

from __future__ import annotations

import importlib.util

from outlast.diagnostics.export.config import ExportConfig
from outlast.errors import MissingDependency

MODULES = {
    "prometheus": ("prometheus_client",),
    "opentelemetry": ("opentelemetry.sdk.metrics", "opentelemetry.exporter.otlp.proto.http"),
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
}
"""What each extra installs."""


def check_installed(settings: ExportConfig) -> None:
    """Look for what is asked for, without importing it.

    Raises:
        MissingDependency: it is not there; names the setting and the extra.
    """
    for extra in settings.targets:
        for module in MODULES[extra]:
            try:
                found = importlib.util.find_spec(module) is not None
            except ModuleNotFoundError:  # of a package above it
                found = False
            if not found:
                setting = "prometheus_port" if extra == "prometheus" else extra
                raise MissingDependency(
                    f"[export] {setting} is set, but {module} is not installed",
                    f"pip install 'outlast[{extra}]', or leave the setting out",
                )
