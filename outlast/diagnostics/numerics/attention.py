"""Attention logits and log Z of a forward, wherever the model computes them: sampled, on their device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from outlast.diagnostics.numerics.model_parts import bare

LOG_Z = "log Z"
_ROWS = 64
"""Queries of the first sequence that are looked at, of each head."""
_TOKENS = 512
"""Rows of output logits that log Z is a mean of."""


class ForwardSampler:
    """Looks into one forward when it is asked to.

    It sees calls of ``scaled_dot_product_attention``, the softmax of an attention that is written out, and
    ``cross_entropy``, or output that has ``logits``. That is what transformers' models and ours are made of.

    Args:
        model: as the loop calls it.
        wanted: asked at each forward of training.
    """

    def __init__(self, model: nn.Module, wanted: Callable[[], bool]) -> None:
        self._model = bare(model)
        self._wanted = wanted
        self._mode: _Seen | None = None
        self._inner: list[Any] = []
        self.samples: dict[str, Tensor] = {}
        """Of the newest forward: the largest attention logit by the module's name, and ``log Z``; scalars."""
        self._outer = [
            model.register_forward_pre_hook(self._begin),
            model.register_forward_hook(self._end, always_call=True),
        ]

    @staticmethod
    def is_compiled(model: nn.Module) -> bool:
        """Whether code of it is compiled, which nothing can look into."""
        return any(
            hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
            for module in model.modules()
        )

    def close(self) -> None:
        """Take the hooks away."""
        for hook in self._outer:
            hook.remove()

    def _begin(self, module: nn.Module, args: Any) -> None:
        if self._mode is not None or not (torch.is_grad_enabled() and module.training and self._wanted()):
            return
        self._mode = _Seen()
        for name, each in self._model.named_modules():
            if not name:  # whose hooks are being called
                continue
            self._inner.append(each.register_forward_pre_hook(partial(self._mode.enter, name)))
            self._inner.append(each.register_forward_hook(self._mode.leave, always_call=True))
        self._mode.__enter__()  # type: ignore[no-untyped-call]

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._mode is None:
            return
        mode, self._mode = self._mode, None
        mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        for hook in self._inner:
            hook.remove()
        self._inner.clear()
        logits = getattr(output, "logits", None)
        if LOG_Z not in mode.samples and isinstance(logits, Tensor) and logits.is_floating_point() and logits.dim() > 1:
            mode.samples[LOG_Z] = mean_log_z(logits.flatten(0, -2))
        self.samples = mode.samples


class _Seen(TorchFunctionMode):
    """Takes samples from the calls that are made while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.samples: dict[str, Tensor] = {}
        self._inside: list[tuple[str, str]] = []

    def enter(self, name: str, module: nn.Module, args: Any) -> None:
        """A module begins."""
        self._inside.append((name, type(module).__name__))

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """A module ends."""
        if self._inside:
            self._inside.pop()

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "scaled_dot_product_attention":
            self._larger(_of_attention(*args, **kwargs))
        elif name == "softmax" and args and self._is_attention(args[0]):
            self._larger(args[0][:1].detach().float().amax())
        elif name == "cross_entropy":
            found = args[0] if args else kwargs.get("input")
            if isinstance(found, Tensor) and found.is_floating_point() and found.dim() > 1:
                self.samples[LOG_Z] = mean_log_z(found.movedim(1, -1).flatten(0, -2))
        return func(*args, **kwargs)

    def _is_attention(self, scores: Any) -> bool:
        within = any("attention" in kind.lower() or "attn" in kind.lower() for _, kind in self._inside)
        return within and isinstance(scores, Tensor) and scores.dim() == 4

    def _larger(self, logit: Tensor) -> None:
        """The innermost module that has a name; several calls in one module count as one."""
        name = next((name for name, _ in reversed(self._inside) if name), "attention")
        before = self.samples.get(name)
        self.samples[name] = logit if before is None else torch.maximum(before, logit)


@torch.no_grad()
def _of_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The largest logit among some queries of the first sequence; arguments as PyTorch's."""
    q, k = (one.detach()[:1] if one.dim() > 3 else one.detach() for one in (query, key))
    length, keys = q.shape[-2], k.shape[-2]
    rows = torch.linspace(0, length - 1, min(length, _ROWS), device=q.device).long()
    q = q.index_select(-2, rows)
    if enable_gqa and q.dim() > 2 and k.shape[-3] != q.shape[-3]:
        k = k.repeat_interleave(q.shape[-3] // k.shape[-3], -3)
    with torch.autocast(q.device.type, enabled=False):
        logits = q.float() @ k.float().transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        logits = logits.masked_fill(torch.arange(keys, device=q.device) > rows[:, None], -torch.inf)
    if attn_mask is not None:
        mask = attn_mask.detach()
        mask = mask[:1] if mask.dim() == logits.dim() and mask.shape[0] > 1 else mask
        mask = mask.index_select(-2, rows) if mask.dim() > 1 and mask.shape[-2] == length else mask
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else logits + mask.float()
    return logits.amax()


@torch.no_grad()
def mean_log_z(logits: Tensor) -> Tensor:
    """The mean over some of the rows of (tokens, classes) logits of the logarithm of the softmax's denominator."""
    every = max(1, logits.shape[0] // _TOKENS)
    return logits.detach()[::every].float().logsumexp(-1).mean()
