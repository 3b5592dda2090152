"""Settings of numerics: section ``[numerics]``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from outlast.config import require


@dataclass(frozen=True, kw_only=True)
class NumericsConfig:
    """What is watched of a run's numbers. ``docs/numerics.md`` says what each check costs and what it can show."""

    not_finite: Literal["before_update", "after_update", "off"] = "before_update"
    """When the norm of the gradients is looked at. ``before_update``: before it spoils the weights; the host waits for
    the device once a step, which the trainer does in any case. ``after_update``: one step late and without waiting; the
    weights are not finite either by then."""
    rerun_batches: int = 4
    """Of a step's newest micro-batches, how many are kept until its update, to be run again when something is not
    finite: so the first module is found whose output is not. 0: none, and only parameters are named."""
    spikes: bool = True
    """Whether spikes of the loss and of the gradients' norm are told."""
    spike_window: int = 128
    """Steps whose median a value is compared with."""
    spike_sigmas: float = 8.0
    """A spike is this many standard deviations (1.4826 x the median absolute deviation) above the median..."""
    spike_loss_share: float = 0.25
    """... and, for a loss, by this share of the median above it ..."""
    spike_norm_factor: float = 3.0
    """... or, for a norm, this many times the median."""
    replicas_every_steps: int = 100
    """After every so many updates, digests of all that replicas must have in common are compared; 0: never."""
    replicas_action: Literal["tell", "stop"] = "tell"
    """``stop``: replicas that differ end the run, so that a launcher restarts it from the newest checkpoint."""
    drift_every_steps: int = 0
    """Every so many steps, attention logits, log Z and the gradients' root mean square are sampled, and extrapolated to
    the step at which they will matter; 0: never."""
    attention_logit_limit: float = 1e4
    """The largest attention logit that training survives, in order of magnitude."""
    log_z_limit: float = 100.0
    """The absolute log Z of the output logits from which bf16 no longer tells neighbouring losses apart."""
    gradient_eps_factor: float = 10.0
    """The root mean square of a parameter's gradient matters to Adam when it is below this many times its epsilon."""
    peers_timeout_s: float = 60.0
    """How long a rank waits for the others, when findings or digests are compared."""

    def __post_init__(self) -> None:
        require(self.rerun_batches >= 0, "numerics.rerun_batches", self.rerun_batches, "0 or more micro-batches")
        require(self.spike_window >= 16, "numerics.spike_window", self.spike_window, "16 or more steps")
        require(self.spike_sigmas > 0, "numerics.spike_sigmas", self.spike_sigmas, "more than 0")
        require(self.spike_loss_share > 0, "numerics.spike_loss_share", self.spike_loss_share, "more than 0")
        require(self.spike_norm_factor > 1, "numerics.spike_norm_factor", self.spike_norm_factor, "more than 1")
        require(
            self.replicas_every_steps >= 0,
            "numerics.replicas_every_steps",
            self.replicas_every_steps,
            "0 or more steps",
        )
        require(self.drift_every_steps >= 0, "numerics.drift_every_steps", self.drift_every_steps, "0 or more steps")
        for key in ("attention_logit_limit", "log_z_limit", "gradient_eps_factor", "peers_timeout_s"):
            require(getattr(self, key) > 0, f"numerics.{key}", getattr(self, key), "more than 0")
