"""Settings of metrics for others: section ``[export]``."""

from __future__ import annotations

from dataclasses import dataclass

from outlast.config import require


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Where a run's metrics go besides its events. Nothing unless asked for; ``docs/metrics.md`` lists the metrics.

    A process of its own beside each launcher reads the events of its node's ranks. It survives restarts of the ranks,
    and when it fails or is slow, training does not notice.
    """

    prometheus_port: int | None = None
    """Serve metrics to Prometheus on this port of every node; 0 takes a free one, which the log names. Without it none
    are served. Needs ``pip install 'outlast[prometheus]'``."""
    prometheus_token_file: str | None = None
    """A file that contains a token. The port is then open to other machines, and each request must carry
    ``Authorization: Bearer TOKEN``. Without it, only this machine reaches the port."""
    opentelemetry: bool = False
    """Push metrics by OTLP over HTTP; where to, and how often, is said by OpenTelemetry's own variables, such as
    ``OTEL_EXPORTER_OTLP_ENDPOINT``. Needs ``pip install 'outlast[opentelemetry]'``."""
    tensorboard: bool = False
    """Write scalars for TensorBoard to ``RUN/tensorboard``. Needs ``pip install 'outlast[tensorboard]'``."""
    wandb: bool = False
    """Log scalars to Weights & Biases; its own variables, such as ``WANDB_PROJECT`` and ``WANDB_MODE``, say where.
    Needs ``pip install 'outlast[wandb]'``."""
    mlflow: bool = False
    """Log scalars to MLflow; its own variables, such as ``MLFLOW_TRACKING_URI`` and ``MLFLOW_EXPERIMENT_NAME``, say
    where. Needs ``pip install 'outlast[mlflow]'``."""
    run_name: str | None = None
    """The label ``run`` of metrics, and the run's name in trackers; by default that of its directory."""
    queue_records: int = 10_000
    """Events that may wait for TensorBoard, W&B or MLflow. Beyond that they are dropped, counted and told."""

    def __post_init__(self) -> None:
        port = self.prometheus_port
        require(port is None or 0 <= port <= 65535, "export.prometheus_port", port, "0 to 65535, or none")
        alone = self.prometheus_token_file is not None and port is None
        require(not alone, "export.prometheus_port", port, "set, with export.prometheus_token_file")
        require(self.run_name != "", "export.run_name", self.run_name, "a name, or none")
        require(self.queue_records >= 1, "export.queue_records", self.queue_records, "1 or more events")

    @property
    def targets(self) -> tuple[str, ...]:
        """What is asked for, by the names of the extras that it needs."""
        asked = {
            "prometheus": self.prometheus_port is not None,
            "opentelemetry": self.opentelemetry,
            "tensorboard": self.tensorboard,
            "wandb": self.wandb,
            "mlflow": self.mlflow,
        }
        return tuple(name for name, wanted in asked.items() if wanted)
