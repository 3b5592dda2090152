"""The report of a run as data; :func:`outlast.diagnostics.build_report` computes it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from outlast.diagnostics.config import DiagnosticsConfig
from outlast.diagnostics.report.failures import Failure
from outlast.diagnostics.report.incidents import Incident
from outlast.diagnostics.report.numerics import NumericsRow
from outlast.diagnostics.report.phases import SlowPhase
from outlast.diagnostics.report.scene import Scene
from outlast.diagnostics.report.stragglers import StragglerRow

Series = tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Start:
    """One start of the ranks, by a person or by the launcher."""

    attempt: int
    generation: int
    """How often the launcher had restarted the ranks before; 0 for the first start of a launch."""
    world_size: int
    hosts: tuple[str, ...]
    """The host of each rank, in order."""
    launched_s: float
    """When the launcher started the processes, seconds since the run's first event; ``began_s`` without a launcher."""
    began_s: float
    """When its ranks wrote their first event."""
    training_s: float | None
    """When its first step was done; None if there is none."""
    ended_s: float
    """When its ranks wrote their last event."""
    first_step: int | None
    last_step: int | None
    """The last step it finished; None if there is none."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What ran, and how far it got. Fields are empty or 0 if the events do not say."""

    world_size: int
    device: str
    parameters: int
    comm: str
    starts: tuple[Start, ...]
    hosts: tuple[str, ...]
    """Where ranks ran; where none wrote an event, where the launchers started them."""
    restarts: int
    """Starts by the launcher after ranks had failed."""
    steps_done: int
    steps_planned: int
    steps_redone: int
    """Executions of steps that a restart discarded."""
    finished: bool
    """Whether every rank of the newest start ended with success."""
    began_t: float
    """First event, seconds since the epoch."""
    wall_s: float
    """From the first to the last event, without the pauses between launches by hand."""
    useful_s: float
    """The part of it spent in steps that count: without set-up, evaluation, restarts and redone steps."""
    tokens: int
    """Tokens trained on, by all ranks, in steps that count."""
    median_step_s: float


@dataclass(frozen=True, kw_only=True)
class LossCurve:
    """Training loss as the mean over ranks of every step, and loss on held-out text."""

    steps: tuple[int, ...]
    train: Series
    lr: Series
    grad_norm: Series
    """Norm of the averaged gradient; NaN where updates were averaged."""
    update_norm: Series
    """Norm of the averaged update; NaN where gradients were averaged."""
    eval_steps: tuple[int, ...]
    evaluated: Series


@dataclass(frozen=True, kw_only=True)
class TimeSplit:
    """Where every step's wall-clock time went, in seconds, mean over ranks. The four parts add up to the step.

    ``compute = step - data - communication - checkpoint``: forward, backward, update, and overlapped communication.
    """

    steps: tuple[int, ...]
    compute_s: Series
    data_s: Series
    communication_s: Series
    """Not overlapped with the backward pass: transfer, and the wait for late ranks."""
    checkpoint_s: Series
    waiting_s: Series
    """Of ``communication_s``, the wait for the latest rank; the rest is transfer."""
    waited_for: tuple[tuple[int, float], ...]
    """Each rank that others waited for, and its share of all waiting; the largest first."""

    def totals_s(self) -> dict[str, float]:
        """Seconds over all steps, by part."""
        return {
            "compute": math.fsum(self.compute_s),
            "data": math.fsum(self.data_s),
            "communication": math.fsum(self.communication_s),
            "checkpoint": math.fsum(self.checkpoint_s),
        }

    def shares(self) -> dict[str, float]:
        """Share of all steps' time, by part; zeros for no steps."""
        return _shares(self.totals_s())

    def told_apart_s(self) -> dict[str, float]:
        """As :meth:`totals_s`, with communication as two parts: ``transfer``, and ``waiting`` for late ranks."""
        totals = self.totals_s()
        waiting = math.fsum(self.waiting_s)
        return {
            "compute": totals["compute"],
            "data": totals["data"],
            "transfer": max(totals["communication"] - waiting, 0.0),
            "waiting": waiting,
            "checkpoint": totals["checkpoint"],
        }

    def shares_told_apart(self) -> dict[str, float]:
        """As :meth:`shares`, of the parts of :meth:`told_apart_s`."""
        return _shares(self.told_apart_s())


def _shares(totals: dict[str, float]) -> dict[str, float]:
    whole = math.fsum(totals.values())
    return {name: seconds / whole if whole > 0 else 0.0 for name, seconds in totals.items()}


@dataclass(frozen=True, kw_only=True)
class GoodputSplit:
    """Where the run's wall time went, in seconds: the parts add up to ``wall_s``. See ``report.goodput.CAUSES``."""

    wall_s: float
    """From the first to the last event, without the pauses between launches by hand."""
    useful_s: float
    redone_s: float
    restart_s: float
    hang_s: float
    checkpoint_s: float
    evaluation_s: float
    data_s: float
    startup_s: float

    def parts_s(self) -> dict[str, float]:
        """Seconds by cause."""
        parts = dataclasses.asdict(self)
        return {name.removesuffix("_s"): seconds for name, seconds in parts.items() if name != "wall_s"}

    def shares(self) -> dict[str, float]:
        """Share of the wall time by cause; zeros for none."""
        return _shares(self.parts_s())


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Gradient bytes that all ranks sent in the steps that count."""

    wire_bytes: int
    dense_bytes: int
    """What a ring all-reduce in fp32 would have sent."""
    ratio: float | None
    """dense / wire; None without traffic."""
    collective_share: float
    """Time inside collectives, overlapped or not, as a share of the step time; mean over ranks."""
    codec_share: float
    """Time in compression and decompression, overlapped or not, as a share of the step time; mean over ranks."""
    alpha: float | None = None
    """Measured contraction: the median over ranks and over the steps in which it was measured, or None."""
    residual: float | None = None
    """Relative residual ||e|| / ||g||, likewise."""


@dataclass(frozen=True, kw_only=True)
class CheckpointRow:
    """One checkpoint in one tier: the sum or maximum over the ranks that reported it."""

    step: int
    attempt: int
    tier: str
    """``storage``, ``memory``, ``partner`` or ``local``."""
    state: str
    """``committed``, ``copied`` (from memory, by all ranks), ``written`` (by some ranks, not known to be committed
    or copied by all) or ``failed``."""
    ranks: int
    size_bytes: int
    blocked_s: float
    """The longest time it held a rank's training thread."""
    durable_s: float
    """From the call until the last rank's part was durable and it was committed."""
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """All checkpoints, and what they cost."""

    rows: tuple[CheckpointRow, ...]
    time_share: float
    """Share of the step time that checkpoints blocked training."""


@dataclass(frozen=True, kw_only=True)
class Lateness:
    """How late each rank was in each step; NaN where it did not take the step."""

    steps: tuple[int, ...]
    ranks: tuple[int, ...]
    hosts: tuple[str, ...]
    """The host of each rank in the newest start."""
    late_ms: tuple[Series, ...]
    """[ranks][steps]: longest time any rank spent inside collectives minus this rank's."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """The report of a run."""

    name: str
    run_dir: str
    verdict: str
    """Which ranks are stragglers, with numbers; or that there is none; or why there is no verdict."""
    facts: Facts
    loss: LossCurve
    split: TimeSplit
    goodput: GoodputSplit
    traffic: Traffic
    checkpoints: Checkpoints
    incidents: tuple[Incident, ...]
    failures: tuple[Failure, ...]
    """What ended ranks, oldest first, each with what it cost; several incidents may belong to one."""
    slow_phases: tuple[SlowPhase, ...]
    """Stretches of steps in which one rank was slow, and was not in the rest of the run."""
    numerics: tuple[NumericsRow, ...]
    """What was told of the run's numbers, oldest first: values that are not finite, spikes, replicas that differ."""
    lateness: Lateness
    stragglers: tuple[StragglerRow, ...]
    """Every rank on every host it had; stragglers first, then by median lateness."""
    thresholds: DiagnosticsConfig
    """The thresholds of the verdict on stragglers."""
    missing: tuple[str, ...]
    """Events that are missing or could not be read."""
    scene: Scene | None = None
    """The time around the worst failure, or around the worst step of the slowest rank; None if there is neither."""

    def phases_of(self, row: StragglerRow) -> tuple[SlowPhase, ...]:
        """The slow phases of a rank on one host."""
        return tuple(one for one in self.slow_phases if (one.rank, one.host) == (row.rank, row.host))

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values; NaN and infinities are None."""
        plain: dict[str, Any] = _plain(self)
        plain["split"]["shares"] = self.split.shares()
        plain["split"]["shares_told_apart"] = self.split.shares_told_apart()
        plain["goodput"]["shares"] = self.goodput.shares()
        return plain


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {one.name: _plain(getattr(value, one.name)) for one in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
