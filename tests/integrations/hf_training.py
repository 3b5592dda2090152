"""A Hugging Face Trainer on this rank, from its first step to its end, and what a test wants to happen on the way."""

from __future__ import annotations

import logging
import os
import signal
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from outlast.errors import OutlastError
from tests.session.program import digest


@dataclass(frozen=True, slots=True)
class Plan:
    """One start."""

    steps: int = 22
    """Of the run; an epoch has 16."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of ``TrainingArguments``."""
    checkpoint: dict[str, Any] = field(default_factory=lambda: {"every_steps": 4})
    comm: Any = None
    plain: bool = False
    """Without outlast."""
    kill_at: int = 0
    """Kill rank 1 after this step's update."""
    notice_at: int = 0
    """Send the last rank a SIGTERM then."""


class Text(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """A language with a rule: each token follows from the one before, but for some noise."""

    def __init__(self, size: int, seed: int) -> None:
        random = torch.Generator().manual_seed(seed)
        tokens = torch.randint(16, (size, 16), generator=random)
        for at in range(1, 16):
            follows = torch.rand(size, generator=random) < 0.9
            tokens[follows, at] = (tokens[follows, at - 1] * 5 + 3) % 16
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def as_launched(rank: int, folder: str | Path) -> None:
    """Be what a launcher starts, in that folder."""
    os.chdir(folder)
    port = str(1)  # nobody joins: the group is there
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": dist.get_world_size(), "LOCAL_WORLD_SIZE": 2}
    os.environ |= {name: str(value) for name, value in place.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    warnings.simplefilter("default")


def make_trainer(plan: Plan, *, callbacks: Any = (), data: Any = None) -> Any:
    """A Trainer of a small GPT-2 with dropout, the same each time."""
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

    set_seed(0)
    size = {"n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=16, bos_token_id=0, eos_token_id=0, **size))
    defaults = {
        "output_dir": "trainer",
        "use_cpu": True,
        "max_steps": plan.steps,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "warmup_steps": 5,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    return Trainer(
        model,
        TrainingArguments(**{**defaults, **plan.settings}),
        train_dataset=data or Text(128, 1),
        eval_dataset=Text(32, 2),
        callbacks=list(callbacks),
    )


def train(rank: int, folder: str, plan: Plan) -> dict[str, Any]:
    """Train, and what became of it; ``status`` is that of a process that ended by a notice."""
    from transformers import TrainerCallback

    from outlast.integrations.huggingface import train as train_in_session

    class Deeds(TrainerCallback):  # type: ignore[misc]
        """What the plan says."""

        def __init__(self) -> None:
            self.steps: list[int] = []

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """After the update of ``state.global_step``."""
            self.steps.append(state.global_step)
            if state.global_step == plan.kill_at and rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            if state.global_step == plan.notice_at and rank == args.world_size - 1:
                os.kill(os.getpid(), signal.SIGTERM)

    as_launched(rank, folder)
    deeds = Deeds()
    trainer = make_trainer(plan, callbacks=[deeds])
    try:
        if plan.plain:
            trainer.train()
        else:
            train_in_session(trainer, "run", comm=plan.comm, checkpoint=plan.checkpoint)
    except SystemExit as end:
        return {"status": end.code, "step": trainer.state.global_step}
    kept = ("step", "loss", "eval_loss", "grad_norm", "learning_rate", "epoch")
    history = [
        {name: value for name, value in entry.items() if name in kept}
        for entry in trainer.state.log_history
        if "loss" in entry or "eval_loss" in entry
    ]
    return {
        "steps": deeds.steps,
        "step": trainer.state.global_step,
        "weights": weights_of(trainer),
        "flos": trainer.state.total_flos,
        "history": history,
        "loss": trainer.evaluate()["eval_loss"],
    }


def weights_of(trainer: Any) -> str:
    """A hash of the model, whole."""
    gathered: Any = nullcontext()
    if trainer.is_deepspeed_enabled:
        gathered = import_module("deepspeed").zero.GatheredParameters(list(trainer.model.parameters()))
    with gathered:
        return digest(trainer.model)


class Masking:
    """A collator that draws from the global generator, as those for masked language models do."""

    def __call__(self, examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        tokens = torch.stack([example["input_ids"] for example in examples])
        return {"input_ids": tokens.where(torch.rand(tokens.shape) < 0.8, 0), "labels": tokens}


def said(rank: int, folder: str, plan: Plan, masking: bool = False) -> list[str]:
    """What is refused or warned of: errors and log lines."""
    from outlast.integrations.huggingface import train as train_in_session

    as_launched(rank, folder)
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("outlast").addHandler(handler)
    trainer = make_trainer(plan)
    if masking:
        trainer.data_collator = Masking()
    try:
        train_in_session(trainer, "run", comm=plan.comm, checkpoint=plan.checkpoint)
    except OutlastError as error:
        found.append(f"{type(error).__name__}: {error}")
    finally:
        logging.getLogger("outlast").removeHandler(handler)
    return found
