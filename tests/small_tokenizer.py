"""A real tokenizer, made in a moment."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import tokenizers


def save_tokenizer(file: Path, texts: Iterable[str]) -> None:
    """A byte-level BPE of at most 300 tokens and ``<|endoftext|>``, learned from some texts."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    made.save(str(file))
