"""The model of the sections that train: outlast's own GPT, built on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.gpu.harness import Settings, seconds
from outlast.trainer import GPT
from outlast.trainer.blocks import compile_model
from outlast.trainer.config import ModelConfig

Batch = tuple[Tensor, Tensor]


def sizes(settings: Settings) -> ModelConfig:
    """1.2 G parameters: 24 layers of width 2,048, context 2,048."""
    if settings.tiny:
        return ModelConfig(layers=2, heads=2, width=32, context=32)
    return ModelConfig(layers=24, heads=16, width=2048, context=2048)


def build(settings: Settings) -> GPT:
    """The model, blocks compiled where that is worth it."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    with settings.device:
        model = GPT(sizes(settings))
    if settings.cuda:
        compile_model(model)
    return model


def batches(settings: Settings, sequences: int, count: int) -> list[Batch]:
    """Random tokens on the device: ``count`` micro-batches of ``sequences``."""
    config = sizes(settings)
    draw = torch.Generator(settings.device).manual_seed(1)
    shape = (count, sequences, config.context + 1)
    tokens = torch.randint(0, 256, shape, device=settings.device, generator=draw)
    return [(row[:, :-1].contiguous(), row[:, 1:].contiguous()) for row in tokens]


def loss_of(model: torch.nn.Module, batch: Batch, settings: Settings) -> Tensor:
    """Under bf16 autocast."""
    with torch.autocast(settings.device.type, dtype=torch.bfloat16):
        loss: Tensor = model(*batch)
    return loss


def matmul_flops_per_s(settings: Settings) -> float:
    """The measured rate of a product of bf16 matrices of random numbers."""
    side = settings.size(8192, 128)
    a, b = (torch.randn((side, side), device=settings.device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        torch.mm(a, b)
    times = settings.size(20, 2)
    return 2.0 * side**3 / min(seconds(lambda: torch.mm(a, b), settings.device, times) for _ in range(3))
