"""A GPT, of bytes by default: pre-norm blocks, causal attention, untied head, no biases.

Shapes are written as ``B`` sequences, ``T`` tokens, ``C`` width, ``H`` heads, ``V`` vocabulary.
GPT-2 (Radford et al. 2019) with the pre-norm placement of arXiv:2002.04745. It has no biases, no dropout,
and a head that does not share the embedding's weight.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from outlast.trainer.config import ModelConfig

VOCABULARY = 256  # the values of a byte, and the default of ``model.vocabulary``


class Attention(nn.Module):
    """Causal multi-head self-attention, computed by PyTorch's fused kernel."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)  # weight (3C, C)
        self.out = nn.Linear(config.width, config.width, bias=False)  # weight (C, C)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)  # each (B, H, T, C/H)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, C/H)
        mixed: Tensor = self.out(y.transpose(1, 2).reshape(B, T, C))
        return mixed


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, bias=False)  # weight (C,)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(config.width, bias=False)  # weight (C,)
        self.up = nn.Linear(config.width, 4 * config.width, bias=False)  # weight (4C, C)
        self.down = nn.Linear(4 * config.width, config.width, bias=False)  # weight (C, 4C)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return out


class GPT(nn.Module):
    """Predicts the next token.

    Args:
        config: sizes; 12·layers·width² + (2·vocabulary + context)·width parameters, and the norms'.
        seed: seeds the initial weights; PyTorch's global generator is neither used nor changed.
    """

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.token = nn.Embedding(config.vocabulary, config.width)  # weight (V, C)
            self.position = nn.Embedding(config.context, config.width)  # weight (T, C)
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
            self.norm = nn.LayerNorm(config.width, bias=False)  # weight (C,)
            self.head = nn.Linear(config.width, config.vocabulary, bias=False)  # weight (V, C)
            self._initialise()

    def _initialise(self) -> None:
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                continue  # norms start at one
            # Projections back into the residual stream are scaled down by its number of summands (GPT-2).
            residual = name.endswith(("attention.out.weight", "down.weight"))
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.layers) if residual else 0.02)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats per token.

        Args:
            tokens: (B, T) int64, values below the vocabulary's size, T at most the context.
            targets: (B, T) int64, the token that follows each token.

        Returns:
            A scalar.
        """
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]  # (B, T, C)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))  # (B, T, V)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def flops_per_token(self) -> float:
        """FLOPs of forward and backward per token: 6N + 12·layers·context·width (arXiv:2204.02311, appendix B)."""
        matrices = sum(p.numel() for n, p in self.named_parameters() if p.dim() >= 2 and n != "position.weight")
        matrices -= self.token.weight.numel()  # looked up, not multiplied
        return 6.0 * matrices + 12.0 * self.config.layers * self.config.context * self.config.width
