"""A GAN over slow links: two models, two optimizers, one session; what outlast adds is marked.

    torchrun --standalone --nproc-per-node 2 examples/gan.py runs/gan

The generator learns a ring of eight spots. Stop it whenever you like and start it again: it goes on from the newest
complete checkpoint, bit for bit.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import outlast  # outlast

BATCH, LATENT, WIDTH, SPOTS = 128, 16, 128, 8
GAMMA = 0.3
"""How much the critic is kept from growing steep at true points (R1, Mescheder 2018), without which a GAN circles."""


def network(inputs: int, outputs: int) -> nn.Module:
    """(batch, inputs) to (batch, outputs)."""
    hidden = [nn.Linear(inputs, WIDTH), nn.LeakyReLU(0.2), nn.Linear(WIDTH, WIDTH), nn.LeakyReLU(0.2)]
    return nn.Sequential(*hidden, nn.Linear(WIDTH, outputs))


def ring(count: int, random: torch.Generator | None = None) -> Tensor:
    """What is to be learnt: ``count`` points, (count, 2), around eight spots at distance 1 of the origin."""
    angle = torch.randint(SPOTS, (count,), generator=random) * (2 * math.pi / SPOTS)
    return torch.stack([angle.cos(), angle.sin()], dim=1) + 0.05 * torch.randn(count, 2, generator=random)


def distance(generator: nn.Module) -> float:
    """The energy distance of what it makes from what it is to make; 0 if they are alike."""
    random = torch.Generator().manual_seed(0)  # of its own, so that training draws what it would have drawn
    with torch.no_grad():
        made, true = generator(torch.randn(1000, LATENT, generator=random)), ring(1000, random)
    return float(2 * torch.cdist(made, true).mean() - torch.cdist(made, made).mean() - torch.cdist(true, true).mean())


def main() -> None:
    """Train for ``--steps`` steps, over all starts together."""
    words = argparse.ArgumentParser()
    words.add_argument("run")
    words.add_argument("--steps", type=int, default=300)
    args = words.parse_args()

    torch.manual_seed(0)
    generator, critic = network(LATENT, 2), network(2, 1)
    models = {"generator": generator, "critic": critic}
    optimizers = {
        "generator": torch.optim.AdamW(generator.parameters(), lr=1e-3, betas=(0.5, 0.9)),
        "critic": torch.optim.AdamW(critic.parameters(), lr=2e-3, betas=(0.5, 0.9)),
    }
    average = AveragedModel(generator, multi_avg_fn=get_ema_multi_avg_fn(0.97))
    with outlast.Session(args.run, models, optimizers) as session:  # outlast
        session.add(average=average)  # outlast
        torch.manual_seed(1 + session.rank)  # each rank draws points of its own; what it draws next is saved
        for step in session.steps(args.steps):  # outlast
            # The critic's turn: one forward of all points, because DDP averages after one backward for each forward.
            with torch.no_grad():
                made = generator(torch.randn(BATCH, LATENT))
            true = ring(BATCH).requires_grad_()
            verdict = session.model["critic"](torch.cat([true, made]))  # outlast
            (slope,) = torch.autograd.grad(verdict[:BATCH].sum(), true, create_graph=True)
            wrong = softplus(-verdict[:BATCH]).mean() + softplus(verdict[BATCH:]).mean()
            (wrong + GAMMA / 2 * slope.square().sum(dim=1).mean()).backward()
            optimizers["critic"].step()
            optimizers["critic"].zero_grad()
            # The generator's turn: the critic is called bare and takes no gradients, so nothing of it is averaged.
            critic.requires_grad_(False)
            unmasked = softplus(-critic(session.model["generator"](torch.randn(BATCH, LATENT)))).mean()  # outlast
            unmasked.backward()
            optimizers["generator"].step()
            optimizers["generator"].zero_grad()
            critic.requires_grad_(True)
            average.update_parameters(generator)
            session.log(loss=unmasked, critic=wrong)  # outlast
            if session.rank == 0 and (step == 1 or step == args.steps):
                print(f"step {step}: distance {distance(average):.4f}", flush=True)


if __name__ == "__main__":
    main()
