"""A model whose gradients are whatever a test wants: the loss is sum of parameter x wanted gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from outlast.comm import (
    CommConfig,
    GradientReducer,
)
from outlast.comm.feedback import (
    Feedback,
)
from outlast.comm.feedback.from_config import (
    feedback_from_config,
)

SHAPES = {"wide": (300, 303), "bias": (50,), "small": (7, 11), "mid": (40, 50), "scale": (301,), "tall": (131, 20)}
"""``wide`` takes more than 65 536 entries: sampled selection, and blocks in the payload."""
CONFIG: dict[str, Any] = {
    "target": "gradient",
    "feedback": "ef21",
    "density": 0.03,
    "values": "fp32",
    "dense_below": 100,
}
FEEDBACKS = ["ef14", "ef21", "ef21-sgdm", "econtrol"]


class Toy(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=dtype)))

    def forward(self, wanted: dict[str, Tensor]) -> Tensor:
        return sum(((p * wanted[name]).sum() for name, p in self.named_parameters()), torch.zeros(()))


def gradients(step: int, rank: int, micro: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + 10 * rank + micro)
    return {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in SHAPES.items()}


def wrap(
    settings: dict[str, Any],
    *,
    cap_mb: float = 25,
    view: bool = False,
    observer: Any = None,
    group: Any = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[DistributedDataParallel, GradientReducer]:
    model = Toy(dtype)
    ddp = DistributedDataParallel(model, bucket_cap_mb=cap_mb, gradient_as_bucket_view=view, process_group=group)
    reducer = GradientReducer(
        model.named_parameters(), CommConfig(**{**CONFIG, **settings}), group=group, observer=observer
    )
    reducer.attach(ddp)
    return ddp, reducer


def backward(ddp: DistributedDataParallel, wanted: dict[str, Tensor]) -> None:
    ddp.zero_grad()
    ddp(wanted).backward()


def estimates(module: nn.Module) -> dict[str, bytes]:
    """Every gradient, bit by bit."""
    found = {}
    for name, p in module.named_parameters():
        assert p.grad is not None
        found[name] = p.grad.to(torch.float64).numpy().tobytes()
    return found


def frozen(tree: Any) -> Any:
    """A state dict that can be compared with ==, bit by bit."""
    if isinstance(tree, dict):
        return {key: frozen(value) for key, value in tree.items()}
    return (tree.dtype, tuple(tree.shape), tree.numpy().tobytes()) if isinstance(tree, Tensor) else tree


def simulate(settings: dict[str, Any], per_step: list[list[dict[str, Tensor]]]) -> list[dict[str, bytes]]:
    """What every rank's gradients must become: ``per_step[step][rank][name]`` through the feedback classes alone."""
    config = CommConfig(**{**CONFIG, **settings})
    result = []
    methods: dict[str, Feedback] = {}
    local: dict[str, list[dict[str, Tensor]]] = {}
    replicated: dict[str, dict[str, Tensor]] = {}
    for step, ranks in enumerate(per_step, 1):
        found = {}
        for name, shape in SHAPES.items():
            gs = [rank[name] for rank in ranks]
            method = feedback_from_config(config)
            if method is None or len(shape) < 2 or gs[0].numel() < config.dense_below:
                estimate = rank_order_mean(gs)
            else:
                method = methods.setdefault(name, method)
                first = name not in local
                if first:
                    local[name] = [method.start(g) for g in gs]
                    replicated[name] = method.new_replicated(gs[0])
                if (first and method.dense_start) or step <= config.warmup_steps:
                    pairs = zip(local[name], gs, strict=True)
                    messages = gs if first else [method.encode_dense(slots, g) for slots, g in pairs]
                    estimate = method.decode_dense(replicated[name], rank_order_mean(messages))
                else:
                    payloads = [method.encode(slots, g) for slots, g in zip(local[name], gs, strict=True)]
                    estimate = method.decode(replicated[name], payloads, torch.empty_like(gs[0]))
            found[name] = estimate.to(torch.float64).numpy().tobytes()
        result.append(found)
    return result


def rank_order_mean(messages: list[Tensor]) -> Tensor:
    total = messages[0].clone()
    for message in messages[1:]:
        total += message
    return total / len(messages)
