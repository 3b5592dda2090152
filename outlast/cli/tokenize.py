"""``outlast tokenize``."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TextIO

import tyro

from outlast.cli.verb import Verb
from outlast.config import Overrides, require

LINE_EVERY_S = 10.0


class Counting:
    """Call it with numbers of tokens: now and then it writes how many there have been.

    Args:
        lines: takes a line every ten seconds at most.
        clock: the time in seconds.
    """

    def __init__(self, lines: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._lines, self._clock = lines, clock
        self._began_s = self._told_s = clock()
        self._tokens = 0

    def __call__(self, tokens: int) -> None:
        self._tokens += tokens
        now_s = self._clock()
        if now_s - self._told_s >= LINE_EVERY_S:
            self._told_s = now_s
            rate = self._tokens / (now_s - self._began_s)
            print(f"{self._tokens:,} tokens, {rate:,.0f} a second", file=self._lines, flush=True)


@dataclass(frozen=True, kw_only=True)
class Tokenize(Verb):
    """Turn text into token files for data.files: train.bin and held_out.bin, uint16 or uint32.

    The texts are files, of which a share is held out by their names, as the trainer does with text, or the end of a
    single one; or rows of a dataset that Hugging Face's save_to_disk wrote, of which the last are held out.
    """

    to: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")]
    """Where the token files go; made if it is missing."""
    tokenizer: Path
    """A tokenizer.json, or the folder of a model that has one."""
    files: tuple[str, ...] = ()
    """Files or globs, as data.files has them; UTF-8."""
    dataset: Path | None = None
    """In place of files: the folder of a dataset."""
    column: str = "text"
    """The dataset's column of texts."""
    held_out_share: float = 0.05
    """Share of the files or rows that goes to held_out.bin."""
    end_token: str | None = None
    """Written after each document, e.g. '<|endoftext|>'; must be one of the tokenizer's."""

    def run(self, overrides: Overrides) -> int:
        """Encode everything, and print the settings that read it."""
        from outlast.trainer.config import DataConfig
        from outlast.trainer.data import find_files, split_held_out
        from outlast.trainer.tokenize import (
            HELD_OUT,
            TRAIN,
            Documents,
            Encoder,
            texts_of_dataset,
            texts_of_files,
            texts_of_rows,
            tokenize,
        )

        require(bool(self.files) != (self.dataset is not None), "files", self.files, "set, or dataset, not both")
        require(0 < self.held_out_share < 1, "held-out-share", self.held_out_share, "0 < share < 1")
        encoder = Encoder(self.tokenizer, self.end_token)
        held_out: Documents | float
        if self.dataset is not None:
            rows = texts_of_dataset(self.dataset, self.column)
            training_rows = len(rows) - max(1, int(len(rows) * self.held_out_share))
            training = texts_of_rows(rows, self.column, 0, training_rows)
            held_out = texts_of_rows(rows, self.column, training_rows, len(rows))
        else:
            files = find_files(DataConfig(files=self.files))
            if len(files) == 1:
                training, held_out = texts_of_files(files), self.held_out_share
            else:
                training, held_out = map(texts_of_files, split_held_out(files, self.held_out_share))
        found = tokenize(training, held_out, encoder, self.to, told=Counting(sys.stderr))
        print(
            f"{found.train_tokens:,} tokens for training and {found.held_out_tokens:,} held out\n\n"
            f"[model]\nvocabulary = {found.vocabulary}\n\n"
            f'[data]\nfiles = ["{self.to / TRAIN}"]\nheld_out_files = ["{self.to / HELD_OUT}"]\n'
            f'format = "{found.format}"'
        )
        return 0
