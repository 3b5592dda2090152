"""A small GPT on characters, in the manner of nanoGPT; what outlast adds is marked.

    outlast launch --nproc-per-node 2 --run-dir runs/char_gpt examples/char_gpt.py runs/char_gpt

Stop it whenever you like and start it again: it goes on from the newest complete checkpoint, bit for bit.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sysconfig
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import outlast  # outlast

CONTEXT, BATCH, ACCUMULATE = 64, 8, 2
WIDTH, HEADS, LAYERS = 64, 4, 2


class Block(nn.Module):
    """Attention and a perceptron, each after a norm and beside a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.attention = nn.Linear(WIDTH, 3 * WIDTH)
        self.project = nn.Linear(WIDTH, WIDTH)
        self.perceptron = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, WIDTH) to the same."""
        q, k, v = self.attention(self.norms[0](x)).unflatten(-1, (3 * HEADS, -1)).transpose(1, 2).chunk(3, dim=1)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.drop(self.project(mixed.transpose(1, 2).flatten(2)))
        return x + self.drop(self.perceptron(self.norms[1](x)))


class GPT(nn.Module):
    """Predicts the next byte."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, WIDTH)
        self.places = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*[Block() for _ in range(LAYERS)], nn.LayerNorm(WIDTH))
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The mean loss of x, (batch, time), whose next bytes are y."""
        logits = self.head(self.blocks(self.bytes(x) + self.places.weight[: x.shape[1]]))
        return cross_entropy(logits.flatten(0, 1), y.flatten())


def draw(text: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Windows of the text, a function of a number: nothing of the data has to be saved."""
    places = torch.randint(len(text) - CONTEXT - 1, (BATCH,), generator=torch.Generator().manual_seed(number))
    rows = torch.stack([text[at : at + CONTEXT + 1] for at in places.tolist()]).long()
    return rows[:, :-1], rows[:, 1:]


def main() -> None:
    """Train for ``--steps`` steps, over all starts together."""
    words = argparse.ArgumentParser()
    words.add_argument("run", type=Path)
    words.add_argument("--steps", type=int, default=100)
    args = words.parse_args()

    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:60]
    text = torch.frombuffer(bytearray(b"".join(one.read_bytes() for one in sources)), dtype=torch.uint8)
    held_out, text = text[:100_000], text[100_000:]
    torch.manual_seed(0)
    model = GPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    rate = lambda step: min(1.0, (step + 1) / 20) * (0.55 + 0.45 * math.cos(math.pi * min(1.0, step / args.steps)))  # noqa: E731
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    with outlast.Session(args.run, model, optimizer) as session:  # outlast
        session.add(scheduler=scheduler)  # outlast
        torch.manual_seed(1 + session.rank)
        for step in session.steps(args.steps):  # outlast
            for micro in range(ACCUMULATE):
                last = micro == ACCUMULATE - 1 or session.world_size == 1
                with contextlib.nullcontext() if last else session.model.no_sync():
                    x, y = draw(text, (step * ACCUMULATE + micro) * session.world_size + session.rank)
                    loss = session.model(x, y) / ACCUMULATE
                    loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            session.log(loss=loss * ACCUMULATE, tokens=ACCUMULATE * BATCH * CONTEXT)  # outlast
            if step % 50 == 0:
                model.eval()
                with torch.no_grad(), session.evaluating():  # outlast
                    found = sum(float(model(*draw(held_out, number))) for number in range(4)) / 4
                model.train()
                if session.rank == 0:
                    print(f"step {step}: loss {found:.4f}", flush=True)


if __name__ == "__main__":
    main()
