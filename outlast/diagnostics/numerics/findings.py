"""What the ranks have found of values that are not finite, joined and in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from outlast.diagnostics.numerics.forward import OUTCOMES, Rerun
from outlast.diagnostics.numerics.gradients import BadGradients

_MOST_RANKS = 8


@dataclass(frozen=True, slots=True)
class Found:
    """What one rank has found."""

    rerun: Rerun
    averaged: BadGradients
    """The gradients as they are, which with DDP and FSDP2 are averages."""

    def numbers(self) -> list[int]:
        """As :class:`~outlast.diagnostics.numerics.peers.Peers` sends them."""
        rerun, averaged = self.rerun, self.averaged
        return [
            OUTCOMES.index(rerun.outcome),
            rerun.module,
            rerun.parameter,
            rerun.call,
            int(rerun.inputs_finite),
            int(rerun.weights_finite),
            *(-1 if one is None else one for one in (averaged.first, averaged.largest)),
            averaged.count,
            averaged.of,
        ]

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Found:
        """The reverse of :meth:`numbers`; the words of an error stay with their rank."""
        outcome, module, parameter, call, inputs, weights, first, largest, count, of = numbers
        rerun = Rerun(OUTCOMES[outcome], module, parameter, call, bool(inputs), bool(weights))
        return cls(rerun, BadGradients(None if first < 0 else first, count, of, None if largest < 0 else largest))


@dataclass(frozen=True, slots=True)
class Joined:
    """What all ranks have found together."""

    ranks: tuple[int, ...]
    module: str
    parameter: str
    transient: bool
    told: str


def joined(by_rank: dict[int, Found], model: nn.Module, asked: str = "") -> Joined:
    """Join what ranks have found; the same on every rank that was given the same.

    Args:
        by_rank: of each rank that could be asked.
        model: whose modules and parameters the numbers are of.
        asked: why other ranks could not be asked, in words.
    """
    modules = list(model.named_modules())
    parameters = [name for name, one in model.named_parameters() if one.requires_grad]
    averaged = next((one.averaged for one in by_rank.values() if one.averaged.first is not None), None)
    largest = next((one.averaged.largest for one in by_rank.values() if one.averaged.largest is not None), None)
    parts = []
    ranks: tuple[int, ...] = ()
    module = parameter = ""
    transient = False
    for outcome in ("forward", "loss", "backward"):
        guilty = {rank: one.rerun for rank, one in by_rank.items() if one.rerun.outcome == outcome}
        if not guilty:
            continue
        ranks = tuple(guilty)
        rerun = guilty[ranks[0]]
        batch = f" (micro-batch {rerun.call + 1})" if rerun.call else ""
        if outcome == "forward":
            name, found = modules[rerun.module]
            module = name or type(model).__name__
            inputs = "its inputs are finite" if rerun.inputs_finite else "its inputs are not finite either"
            weights = "" if rerun.weights_finite else ", and its own weights are not"
            parts.append(
                f"the first module whose output is not finite is {module} ({type(found).__name__}), "
                f"{_on(ranks, len(by_rank))}{batch}: {inputs}{weights}"
            )
        elif outcome == "loss":
            parts.append(f"the loss is not finite, {_on(ranks, len(by_rank))}{batch}; all modules' outputs are")
        else:
            parameter = parameters[rerun.parameter]
            parts.append(
                f"forward is finite, and in backward the first gradient that is not is that of {parameter}, "
                f"{_on(ranks, len(by_rank))}{batch}"
            )
        break
    else:
        seen = [one.rerun.outcome for one in by_rank.values()]
        transient = bool(seen) and all(one == "finite" for one in seen) and not asked
        if transient:
            parts.append(
                f"forward and backward, run again, are finite on {'all ranks' if len(by_rank) > 1 else 'this rank'}: "
                "what happened was transient, or outside the model's forward"
            )
        if "finite_forward" in seen and set(seen) <= {"finite", "finite_forward"}:
            where = "all ranks" if len(by_rank) > 1 else "this rank"
            parts.append(
                f"forward, run again, is finite on {where}: what happened came after it, in a loss that the model does "
                "not compute or in backward, or was transient"
            )
        errors = [one.rerun.error for one in by_rank.values() if one.rerun.error]
        parts += [f"the forward could not be run again ({errors[0]})"] if errors else []
    if averaged is not None and averaged.first is not None:
        of = "the gradient" if len(by_rank) == 1 else "the averaged gradient"
        parameter = parameter or parameters[averaged.first]
        if averaged.count < averaged.of:
            parts.append(
                f"{of} of {parameters[averaged.first]} is the first in backward order that is not finite, and "
                f"{averaged.count} of {averaged.of} are not"
            )
        else:
            parts.append(f"none of {averaged.of} gradients is finite")
    elif largest is not None:
        parameter = parameter or parameters[largest]
        parts.append(f"all gradients are finite, and the square of that of {parameters[largest]} has overflowed")
    if asked:
        parts.append(asked)
    return Joined(ranks, module, parameter, transient, "; ".join(parts))


def _on(ranks: Sequence[int], of: int) -> str:
    if of == 1:
        return "here" if len(ranks) == 1 else "on this rank"
    if len(ranks) == of:
        return f"on all {of} ranks, so the model or its data are at fault, and no rank"
    shown = ", ".join(map(str, ranks[:_MOST_RANKS])) + (" and others" if len(ranks) > _MOST_RANKS else "")
    return f"on rank {shown} alone" if len(ranks) == 1 else f"on ranks {shown} of {of}"
