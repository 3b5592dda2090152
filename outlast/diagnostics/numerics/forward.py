"""What a step's forwards were given, and the same forward again, module by module, once something is not finite."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from outlast.diagnostics.numerics.gradients import bad_gradients
from outlast.diagnostics.numerics.model_parts import bare

Outcome = Literal["not_seen", "failed", "finite", "forward", "loss", "backward", "finite_forward"]
OUTCOMES: tuple[Outcome, ...] = ("not_seen", "failed", "finite", "forward", "loss", "backward", "finite_forward")


@dataclass(frozen=True, slots=True)
class Call:
    """One forward of the model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rng: Tensor
    device_rng: Tensor | None
    autocast: torch.dtype | None
    """The type that autocast computes in; None without autocast."""


@dataclass(frozen=True, slots=True)
class Rerun:
    """What running a step's forwards, and backwards, again has shown on this rank."""

    outcome: Outcome
    """``not_seen``: no forward was seen. ``failed``: it could not be run again. ``finite``: all was, this time.
    ``finite_forward``: forward was, and there was no loss to go backward from. Else what was not finite first."""
    module: int = -1
    """With ``forward``: its number among the model's modules."""
    parameter: int = -1
    """With ``backward``: the first in backward order whose gradient is not finite."""
    call: int = 0
    """Which of the forwards, from 0."""
    inputs_finite: bool = True
    weights_finite: bool = True
    """With ``forward``: those of the module."""
    error: str = ""


class ForwardMemory:
    """Keeps what the newest forwards were called with, until :meth:`forget`: references, and states of random numbers.

    Args:
        model: as the loop calls it.
        most: forwards to keep.
    """

    def __init__(self, model: nn.Module, most: int) -> None:
        self._model = bare(model)
        self._device = next((one.device for one in model.parameters()), torch.device("cpu"))
        self._calls: deque[Call] = deque(maxlen=most)
        self._looking = False
        self._found: Rerun | None = None
        self._hook = model.register_forward_pre_hook(self._remember, with_kwargs=True) if most else None

    @property
    def holds_any(self) -> bool:
        """Whether there is a forward to run again."""
        return bool(self._calls)

    def forget(self) -> None:
        """The step has been updated with: let go of its inputs."""
        self._calls.clear()

    def close(self) -> None:
        """Take the hook away."""
        if self._hook is not None:
            self._hook.remove()
        self.forget()

    def rerun(self, *, backward: bool) -> Rerun:
        """Run what is kept again, as it was; the model's buffers and random numbers are afterwards as before.

        With FSDP2 it is collective, as the forward is.

        Args:
            backward: also compute local gradients, if the forward is finite and its output has a loss.
        """
        if not self._calls:
            return Rerun("not_seen")
        buffers = [(one, one.detach().clone()) for one in self._model.buffers()]
        modules = dict(self._model.named_modules())
        hooks = [
            module.register_forward_hook(partial(self._look, number), with_kwargs=True)
            for number, module in enumerate(modules.values())
        ]
        self._looking, self._found = True, None
        try:
            return self._run_calls(backward=backward)
        except (RuntimeError, ValueError, TypeError) as error:
            return Rerun("failed", error=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        finally:
            self._looking = False
            for hook in hooks:
                hook.remove()
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
            for module in self._model.modules():
                if callable(reshard := getattr(module, "reshard", None)):
                    reshard()  # FSDP2 leaves the root gathered for a backward, which does not come

    def _run_calls(self, *, backward: bool) -> Rerun:
        first: Rerun | None = None
        for number, call in enumerate(self._calls):  # all of them: where parameters are gathered, peers take part
            with torch.no_grad(), self._as_it_was(call):
                output = self._model(*call.args, **call.kwargs)
            loss = loss_of(output)
            if self._found is not None:
                first = first or dataclasses.replace(self._found, call=number)
            elif loss is not None and not bool(torch.isfinite(loss)):
                first = first or Rerun("loss", call=number)
        if first is not None:
            return first
        if not backward:
            return Rerun("finite_forward")
        parameters = [one for one in self._model.parameters() if one.requires_grad]
        for number, call in enumerate(self._calls):
            with torch.enable_grad(), self._as_it_was(call):
                loss = loss_of(self._model(*call.args, **call.kwargs))
                if loss is None or not loss.requires_grad:
                    return Rerun("finite_forward")
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            bad = bad_gradients(gradients)
            if bad.first is not None:
                return Rerun("backward", parameter=bad.first, call=number)
        return Rerun("finite")

    def _remember(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._looking or not (torch.is_grad_enabled() and module.training):
            return
        kind = self._device.type
        is_on_gpu = kind == "cuda"
        if is_on_gpu and torch.cuda.is_current_stream_capturing():
            return  # a graph is replayed without coming here, and its random numbers are its own
        self._calls.append(
            Call(
                args,
                kwargs,
                torch.get_rng_state(),
                torch.cuda.get_rng_state(self._device) if is_on_gpu else None,
                torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None,
            )
        )

    @contextlib.contextmanager
    def _as_it_was(self, call: Call) -> Iterator[None]:
        kind = self._device.type
        devices = [self._device] if kind == "cuda" else []
        with (
            torch.random.fork_rng(devices=devices),
            torch.autocast(kind, dtype=call.autocast, enabled=call.autocast is not None),
            _eager(),
        ):
            torch.set_rng_state(call.rng)
            if call.device_rng is not None:
                torch.cuda.set_rng_state(call.device_rng, self._device)
            yield

    def _look(self, number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """The innermost module whose output is not finite comes first: hooks run as modules end."""
        if self._found is not None or torch.is_grad_enabled() or all(map(_finite, tensors_in(output))):
            return
        self._found = Rerun(
            "forward",
            module=number,
            inputs_finite=all(map(_finite, tensors_in((args, kwargs)))),
            weights_finite=all(map(_finite, module.parameters(recurse=False))),
        )


def _eager() -> contextlib.AbstractContextManager[object]:
    """Compiled code does not call the hooks. Without any, its compiler, which takes seconds, is not loaded."""
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    stance: contextlib.AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors in an output or in arguments, also in dictionaries, sequences and model outputs."""
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.itemsize > 1 and value.numel():
            yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from tensors_in(each)
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from tensors_in(each)


def loss_of(output: Any) -> Tensor | None:
    """The loss in a model's output: the output itself, its ``loss``, or its first part; None if there is none."""
    if isinstance(output, (tuple, list)):
        output = output[0] if output else None
    found = output if isinstance(output, Tensor) else getattr(output, "loss", None)
    if found is None and isinstance(output, Mapping):
        found = output.get("loss")
    return found if isinstance(found, Tensor) and found.dim() == 0 else None


def _finite(tensor: Tensor) -> bool:
    """NaN and +inf count; -inf alone is what masks are made of."""
    part = getattr(tensor, "_local_tensor", tensor).detach()
    return not bool((torch.isnan(part) | torch.isposinf(part)).any())
