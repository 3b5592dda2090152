"""TensorBoard, Weights & Biases and MLflow, through their own clients."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from outlast.diagnostics.export.job import ExportJob
from outlast.diagnostics.export.scalars import Tracker


class TensorBoard:
    """Writes ``RUN/tensorboard``, through ``torch.utils.tensorboard``."""

    def __init__(self, job: ExportJob) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(Path(job.run_dir) / "tensorboard"), flush_secs=10)

    def log(self, step: int, t: float, values: Mapping[str, float]) -> None:
        """Write scalars."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step, walltime=t)

    def close(self) -> None:
        """Flush, and close the file."""
        self._writer.close()


class WandB:
    """One run of Weights & Biases for a run's directory: a later launch goes on with it."""

    def __init__(self, job: ExportJob) -> None:
        import wandb

        self._run = wandb.init(
            id=os.environ.get("WANDB_RUN_ID") or _stable_id(job.run_dir),
            name=os.environ.get("WANDB_NAME") or job.run,
            dir=job.run_dir,
            resume="allow",
            settings=wandb.Settings(console="off", silent=True, init_timeout=60),
        )
        # Steps that are done again have lower numbers than those before, which W&B's own counter does not take.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, t: float, values: Mapping[str, float]) -> None:
        """Log numbers of a step."""
        self._run.log({"step": step, **values})

    def close(self) -> None:
        """Send what waits, and end the run."""
        self._run.finish()


class Mlflow:
    """One run of MLflow for a run's directory: a later launch goes on with it.

    It is kept in ``RUN/mlruns`` unless ``MLFLOW_TRACKING_URI`` says where.
    """

    def __init__(self, job: ExportJob) -> None:
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            uri = (Path(job.run_dir).resolve() / "mlruns").as_uri()
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri=uri)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "outlast"
        known = self._client.get_experiment_by_name(name)
        experiment = known.experiment_id if known is not None else self._client.create_experiment(name)
        mark = _stable_id(job.run_dir)
        found = self._client.search_runs([experiment], f"tags.outlast_run_dir = '{mark}'", max_results=1)
        if found:
            self._run_id = found[0].info.run_id
            self._client.update_run(self._run_id, status="RUNNING")
        else:
            tags = {"outlast_run_dir": mark}
            self._run_id = self._client.create_run(experiment, run_name=job.run, tags=tags).info.run_id

    def log(self, step: int, t: float, values: Mapping[str, float]) -> None:
        """Log numbers of a step, in one request."""
        from mlflow.entities import Metric

        told = [Metric(re.sub(r"[^\w./ -]", "_", name), value, round(t * 1e3), step) for name, value in values.items()]
        self._client.log_batch(self._run_id, metrics=told)

    def close(self) -> None:
        """Mark the run as finished."""
        self._client.set_terminated(self._run_id)


TRACKERS: dict[str, Callable[[ExportJob], Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": Mlflow}


def _stable_id(run_dir: str) -> str:
    """The same for each launch in a directory."""
    return hashlib.sha256(str(Path(run_dir).resolve()).encode()).hexdigest()[:16]
