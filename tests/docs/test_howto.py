"""What answers of docs/howto.md promise, beyond that they run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import outlast
from tests.comm.ranks import Ranks
from tests.docs.blocks import ROOT, of_page
from tests.docs.test_recipes import LAST, RECIPES, train

PAGE = ROOT / "docs/howto.md"
ANSWERS = {block.name.partition(": ")[2]: block for block in of_page(PAGE) if block.language == "python"}


def test_every_answer_has_a_command_or_a_snippet() -> None:
    """But for the last one, which is a page."""
    *answers, last = re.split(r"^## ", PAGE.read_text(), flags=re.M)[1:]
    assert len(answers) >= 14
    assert "references.md" in last
    for answer in answers:
        assert "```" in answer, answer.splitlines()[0]


@pytest.mark.parametrize("before", [3, 25], ids=["in the warm-up", "after it"])
@pytest.mark.parametrize("kind", ["linear", "cosine", "one by one"])
def test_another_learning_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, before: int) -> None:
    """Goes on as a run does that had the new rate from the beginning."""

    def made(lr: float) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=lr)
        schedulers = {
            "linear": lambda: torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=20),
            "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50),
            "one by one": lambda: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 20)),
        }
        return optimizer, schedulers[kind]()

    def rates(optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LRScheduler, n: int) -> list[float]:
        seen = []
        for _ in range(n):
            optimizer.step()
            seen.append(float(optimizer.param_groups[0]["lr"]))
            scheduler.step()
        return seen

    monkeypatch.chdir(tmp_path)
    optimizer, scheduler = made(1e-3)
    rates(optimizer, scheduler, before)
    parts = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    with outlast.checkpoint.attach("runs/mine/checkpoints") as checkpointer:
        checkpointer.save(before, replicated=parts)
    optimizer, scheduler = made(1e-3)
    exec(
        ANSWERS["Resume with another learning rate"].code,
        {"outlast": outlast, "optimizer": optimizer, "scheduler": scheduler},
    )
    expected = rates(*made(5e-4), before + 30)[before:]
    assert rates(optimizer, scheduler, 30) == pytest.approx(expected)


@pytest.mark.parametrize(("saved_by", "resumed_by"), [(2, 1), (1, 2)])
def test_another_world_size(tmp_path: Path, saved_by: int, resumed_by: int) -> None:
    block = RECIPES["docs/howto.md: Resume on another world size"]
    for ranks, first in ((saved_by, 1), (resumed_by, 21)):
        world = Ranks(ranks)
        try:
            took = [step for step, _ in world.run(train, block, "loop", str(tmp_path), False)]
        finally:
            world.close()
        assert took == [first] * ranks
    assert LAST > 21
