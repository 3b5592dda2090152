"""The GPT: shapes, causality, size, seeds."""

from __future__ import annotations

import math

import torch

from outlast.trainer.config import ModelConfig
from outlast.trainer.model import GPT, VOCABULARY

SMALL = ModelConfig(layers=2, heads=2, width=16, context=12)


def test_the_size_of_the_reference_model() -> None:
    model = GPT(ModelConfig(layers=6, heads=6, width=384, context=256))
    count = sum(p.numel() for p in model.parameters())
    assert count == 12 * 6 * 384**2 + (2 * 256 + 256) * 384 + (2 * 6 + 1) * 384
    assert round(count / 1e6, 1) == 10.9
    matrices = 12 * 6 * 384**2 + 256 * 384
    assert model.flops_per_token() == 6 * matrices + 12 * 6 * 256 * 384


def test_an_untrained_model_knows_nothing() -> None:
    tokens = torch.randint(0, VOCABULARY, (4, 13), generator=torch.Generator().manual_seed(0))
    loss = GPT(SMALL)(tokens[:, :-1], tokens[:, 1:])
    assert loss.shape == ()
    assert abs(float(loss.detach()) - math.log(VOCABULARY)) < 0.1


def test_no_token_sees_a_later_one() -> None:
    model = GPT(SMALL)
    tokens = torch.randint(0, VOCABULARY, (1, 12), generator=torch.Generator().manual_seed(1))

    def hidden(tokens: torch.Tensor) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        handle = model.norm.register_forward_hook(lambda _m, _i, out: seen.append(out.detach()))
        model(tokens, tokens)
        handle.remove()
        return seen[0][0]  # (T, C)

    changed = tokens.clone()
    changed[0, 7] = (changed[0, 7] + 1) % VOCABULARY
    before, after = hidden(tokens), hidden(changed)
    assert torch.equal(before[:7], after[:7])
    assert not torch.equal(before[7], after[7])


def test_weights_depend_on_the_seed_alone_and_leave_the_generator_be() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one = GPT(SMALL, seed=1)
    assert torch.equal(torch.rand(3), expected)
    two, three = GPT(SMALL, seed=1), GPT(SMALL, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.head.weight, three.head.weight)


def test_it_learns_one_batch_by_heart() -> None:
    model = GPT(SMALL)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = torch.randint(0, VOCABULARY, (2, 13), generator=torch.Generator().manual_seed(2))
    for _ in range(80):
        optimizer.zero_grad()
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.5
