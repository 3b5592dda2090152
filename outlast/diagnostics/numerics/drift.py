"""Early warnings: attention logits, log Z and the gradients' size, sampled, and when they will matter."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from outlast.diagnostics.numerics.attention import LOG_Z, ForwardSampler
from outlast.diagnostics.numerics.config import NumericsConfig
from outlast.diagnostics.numerics.events import NumericsDrift
from outlast.diagnostics.numerics.model_parts import bare, local
from outlast.diagnostics.numerics.to_host import OnItsWay
from outlast.diagnostics.numerics.trend import Drift, Trend

ATTENTION, RMS = "attention logit", "gradient RMS"


class DriftWatch:
    """Samples one step in ``drift_every_steps``; what is found is read when the next sample is begun.

    Args:
        model: as the loop calls it.
        optimizer: whose epsilon gradients are compared with; None, or one without, and they are not.
        config: limits, and how often.
        step: the step that the loop is in.
        note: is told what cannot be sampled, and why.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        config: NumericsConfig,
        step: Callable[[], int],
        note: Callable[[str], None],
    ) -> None:
        self._config = config
        self._step = step
        self._note = note
        self._names = {param: name for name, param in bare(model).named_parameters()}
        self._optimizer = optimizer
        self._trends: dict[tuple[str, str], Trend] = {}
        self._waiting: list[tuple[int, list[tuple[str, str, float]], OnItsWay]] = []
        self._looked = False
        self._sampler: ForwardSampler | None = None
        if ForwardSampler.is_compiled(model):
            self._note("attention logits and log Z are not sampled: parts of the model are compiled")
        else:
            self._sampler = ForwardSampler(model, self._is_due)
        if not self._epsilons():
            self._note("gradients are not compared with epsilon: the optimizer has none, as Adam has")

    def after_update(self) -> None:
        """An update was made from the gradients, which are still there: as clipped as the optimizer saw them."""
        if not self._is_due():
            return
        found: list[tuple[str, str, float]] = []
        numbers: list[Tensor] = []
        if self._sampler is not None:
            for name, value in self._sampler.samples.items():
                is_log_z = name == LOG_Z
                limit = self._config.log_z_limit if is_log_z else self._config.attention_logit_limit
                found.append((LOG_Z if is_log_z else ATTENTION, "the output" if is_log_z else name, limit))
                numbers.append(value.abs() if is_log_z else value)
            self._note_unseen(self._sampler.samples)
            self._sampler.samples = {}
        grads = [
            (self._names[param], local(param.grad), eps) for param, eps in self._epsilons() if param.grad is not None
        ]
        grads = [one for one in grads if one[1].numel()]
        if grads:
            norms = torch._foreach_norm([grad for _, grad, _ in grads])
            found += [(RMS, name, self._config.gradient_eps_factor * eps) for name, _, eps in grads]
            numbers += [norm / math.sqrt(grad.numel()) for norm, (_, grad, _) in zip(norms, grads, strict=True)]
        if numbers:
            device = numbers[0].device
            on_one = torch.stack([one.detach().to(device, torch.float32).reshape(()) for one in numbers])
            self._waiting.append((self._step(), found, OnItsWay(on_one)))

    def look(self, before: int) -> list[NumericsDrift]:
        """What samples of steps before ``before`` have shown that is worth telling."""
        told = []
        while self._waiting and self._waiting[0][0] < before:
            step, found, numbers = self._waiting.pop(0)
            drifts: dict[tuple[str, bool], list[tuple[Drift, str, float]]] = {}
            for (what, where, limit), value in zip(found, numbers.values(), strict=True):
                drift = self._trend(what, where, limit).add(step, value)
                if drift is not None:
                    drifts.setdefault((what, drift.at_step is None), []).append((drift, where, limit))
            told += [self._event(step, what, each) for (what, _), each in drifts.items()]
        return told

    def close(self) -> None:
        """Take the hooks away."""
        if self._sampler is not None:
            self._sampler.close()

    def _is_due(self) -> bool:
        return self._step() % self._config.drift_every_steps == 0

    def _trend(self, what: str, where: str, limit: float) -> Trend:
        if (what, where) not in self._trends:
            self._trends[what, where] = Trend(limit, falling=what == RMS, in_logs=what == RMS)
        return self._trends[what, where]

    def _epsilons(self) -> list[tuple[nn.Parameter, float]]:
        """Of the parameters that Adam, or one like it, updates."""
        return [
            (param, float(group["eps"]))
            for group in (self._optimizer.param_groups if self._optimizer is not None else ())
            if "betas" in group and group.get("eps", 0) > 0
            for param in group["params"]
            if param in self._names
        ]

    def _note_unseen(self, samples: dict[str, Tensor]) -> None:
        if self._looked:
            return
        self._looked = True
        if not samples.keys() - {LOG_Z}:
            self._note(
                "no attention logits are sampled: no forward called scaled_dot_product_attention, or a softmax in it"
            )
        if LOG_Z not in samples:
            self._note("log Z is not sampled: no cross_entropy in the forward, and no output.logits")

    def _event(self, step: int, what: str, drifts: Sequence[tuple[Drift, str, float]]) -> NumericsDrift:
        drift, where, limit = min(drifts, key=lambda one: (one[0].at_step or 0, one[0].value / one[2]))
        more = f", and {len(drifts) - 1} more" if len(drifts) > 1 else ""
        name = {ATTENTION: "the largest attention logit of", LOG_Z: "|log Z| of", RMS: "the gradients' RMS of"}[what]
        matter = {
            ATTENTION: "attention collapses to single tokens",
            LOG_Z: "bf16 cannot tell losses apart",
            RMS: "Adam's epsilon makes updates small",
        }[what]
        if drift.at_step is None:
            course = f"has reached {drift.value:.3g} (limit {limit:.3g}): {matter}"
        else:
            course = (
                f"is {drift.value:.3g}, and meets {limit:.3g}, where {matter}, at step {drift.at_step} if it goes on "
                f"as in the {drift.samples} samples since step {drift.first_step}"
            )
        return NumericsDrift(
            step=step,
            what=what,
            where=where,
            count=len(drifts),
            value=drift.value,
            limit=limit,
            at_step=drift.at_step,
            told=f"{name} {where}{more} {course}",
        )
