"""Hugging Face's Trainer on a small GPT-2 with random weights; what outlast adds is marked.

    outlast launch --nproc-per-node 2 --run-dir runs/hf_trainer examples/hf_trainer.py runs/hf_trainer

Stop it whenever you like and start it again: it goes on from the newest complete checkpoint, bit for bit.
"""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from outlast.integrations.huggingface import train  # outlast

CONTEXT = 64


class Text(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Bytes of the standard library's sources, ``CONTEXT`` of them an example."""

    def __init__(self, first: int, examples: int) -> None:
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        data = b"".join(file.read_bytes() for file in files)[first * CONTEXT : (first + examples) * CONTEXT]
        self.tokens = torch.frombuffer(bytearray(data), dtype=torch.uint8).long().view(-1, CONTEXT)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def main() -> None:
    """Train, and say how well the model predicts text that it has not seen."""
    words = argparse.ArgumentParser()
    words.add_argument("run", type=Path)
    words.add_argument("--steps", type=int, default=60)
    args = words.parse_args()
    set_seed(0)
    size = {"n_positions": CONTEXT, "n_embd": 64, "n_layer": 2, "n_head": 2}
    trainer = Trainer(
        GPT2LMHeadModel(GPT2Config(vocab_size=256, bos_token_id=0, eos_token_id=0, **size)),
        TrainingArguments(
            output_dir=str(args.run / "trainer"),
            max_steps=args.steps,
            per_device_train_batch_size=16,
            learning_rate=3e-3,
            warmup_steps=5,
            logging_steps=20,
            eval_strategy="steps",
            eval_steps=30,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=Text(0, 4096),
        eval_dataset=Text(4096, 64),
    )
    train(trainer, args.run)  # outlast, in place of trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    if trainer.is_world_process_zero():
        print(f"loss {loss:.3f} after step {trainer.state.global_step}", flush=True)


if __name__ == "__main__":
    main()
