"""Training text as memory-mapped bytes, in an order that is a pure function of (seed, step, rank, world size).

The files are concatenated and cut into windows of ``context`` bytes (plus the byte after, which is the last target).
Window number *i* of the run is window ``permute(i mod N)`` of the text under a permutation keyed by (seed, epoch):
every window is seen exactly once an epoch, and any position is reached in constant time. So a resumed run sees what the
uninterrupted run would have seen, and only the step has to be saved.
"""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import sysconfig
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from outlast.errors import DataError
from outlast.trainer.config import DataConfig

Tokens = npt.NDArray[Any]
_BYTE = np.dtype(np.uint8)

_OPEN_MAPS = 256  # each map holds a descriptor; the usual limit on those is 1024


def find_files(config: DataConfig, named: Sequence[str] | None = None) -> list[Path]:
    """The non-empty files that ``config`` names, or these patterns, sorted.

    Raises:
        DataError: nothing matches; the message lists the expanded patterns.
    """
    stdlib = sysconfig.get_paths()["stdlib"]
    patterns = [pattern.replace("{stdlib}", glob.escape(stdlib)) for pattern in named or config.files]
    matches = {Path(name) for pattern in patterns for name in glob.glob(pattern, recursive=True)}
    kept = sorted(
        path
        for path in matches
        if path.is_file()
        and path.stat().st_size > 0
        and not any(fnmatch.fnmatch(str(path), no) for no in config.exclude)
    )
    if not kept:
        raise DataError(
            f"no data: {len(matches)} files match {', '.join(patterns)}, and none is left after data.exclude",
            "set data.files to existing files or globs",
        )
    return kept


def split_held_out(files: Sequence[Path], share: float) -> tuple[list[Path], list[Path]]:
    """Files for training and for evaluation. A file's side depends only on its name and its folder's name.

    Raises:
        DataError: one side would be empty.
    """
    held_out = [f for f in files if zlib.crc32(f"{f.parent.name}/{f.name}".encode()) / 2**32 < share]
    training = [f for f in files if f not in set(held_out)]
    if not held_out or not training:
        raise DataError(
            f"{len(files)} files split into {len(training)} for training and {len(held_out)} held out",
            f"add files, or change data.held_out_share = {share}",
        )
    return training, held_out


class Corpus:
    """Concatenated files as one array of tokens, memory-mapped and never loaded as a whole.

    Args:
        files: at least one; they must not change while in use.
        dtype: of a token; by default each byte is one.
    """

    def __init__(self, files: Sequence[Path], dtype: np.dtype[Any] = _BYTE) -> None:
        self.files = list(files)
        self.dtype = dtype
        sizes = [file.stat().st_size for file in self.files]
        self._ends = np.cumsum([size // dtype.itemsize for size in sizes])
        self._maps: OrderedDict[int, Tokens] = OrderedDict()
        digest = hashlib.sha256()
        for file, size in zip(self.files, sizes, strict=True):
            digest.update(f"{file.name}:{size}\n".encode())
        if dtype != _BYTE:
            digest.update(f"{dtype}\n".encode())
        self.fingerprint = digest.hexdigest()[:16]
        """A hash of the names and sizes of the files, in order."""

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, start: int, count: int) -> Tokens:
        """Copy ``count`` tokens from ``start`` on, across file boundaries."""
        out = np.empty(count, dtype=self.dtype)
        filled = 0
        index = int(np.searchsorted(self._ends, start, side="right"))
        while filled < count:
            offset = start + filled - (int(self._ends[index - 1]) if index else 0)
            part = self._map(index)[offset : offset + count - filled]
            out[filled : filled + len(part)] = part
            filled += len(part)
            index += 1
        return out

    def _map(self, index: int) -> Tokens:
        if index in self._maps:
            self._maps.move_to_end(index)
            return self._maps[index]
        if len(self._maps) >= _OPEN_MAPS:
            self._maps.popitem(last=False)
        mapped: Tokens = np.memmap(self.files[index], dtype=self.dtype, mode="r")
        self._maps[index] = mapped
        return mapped


def permute(index: int, size: int, key: bytes) -> int:
    """The image of ``index`` under a permutation of ``range(size)`` chosen by ``key``.

    A four-round Feistel network over the next even power of two, repeated until the result is in range (cycle walking;
    Black and Rogaway 2002): random access without a table.
    """
    half_bits = max(1, (size - 1).bit_length() + 1) // 2 if size > 1 else 1
    while size > 1 << (2 * half_bits):
        half_bits += 1
    mask = (1 << half_bits) - 1
    while True:
        left, right = index >> half_bits, index & mask
        for turn in range(4):
            word = hashlib.blake2b(right.to_bytes(8, "little") + bytes([turn]), key=key, digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(word, "little") & mask)
        index = left << half_bits | right
        if index < size:
            return index


@dataclass(frozen=True, slots=True)
class Loader:
    """Batches of one rank, addressed by step.

    Args:
        corpus: the text.
        context: ``T``, tokens per sequence.
        batch_size: ``B``, sequences per micro-batch.
        accumulate: micro-batches per step.
        seed: chooses the permutations.
        rank, world_size: choose this rank's part of each step's windows.
        vocabulary: if given, no token may be as large.
        origin_step, origin_window: steps after ``origin_step`` take windows from ``origin_window`` on.

    Raises:
        DataError: the text has fewer windows than all ranks take in one step.
    """

    corpus: Corpus
    context: int
    batch_size: int
    accumulate: int
    seed: int
    rank: int
    world_size: int
    origin_step: int = 0
    origin_window: int = 0
    vocabulary: int | None = None

    def __post_init__(self) -> None:
        if self.windows < self.windows_per_step:
            raise DataError(
                f"the {self.what}, but one step of {self.world_size} ranks takes {self.windows_per_step}", self.remedy
            )

    @property
    def what(self) -> str:
        """For messages."""
        return f"text has {self.windows} windows of {self.context} tokens"

    @property
    def remedy(self) -> str:
        """What helps where this is too little."""
        return "add data, or lower data.batch_size or model.context"

    def describe(self) -> str:
        """For the log."""
        return f"text: {len(self.corpus) / 1e6:.1f} MB in {len(self.corpus.files)} files"

    def fresh(self) -> Loader:
        """This: batches are addressed by step."""
        return self

    def local_state(self) -> dict[str, Any]:
        """Nothing: no rank has state of its own."""
        return {}

    @property
    def windows(self) -> int:
        """Windows in an epoch."""
        return (len(self.corpus) - 1) // self.context

    @property
    def windows_per_step(self) -> int:
        """Windows that all ranks together take in one step."""
        return self.world_size * self.accumulate * self.batch_size

    def window(self, number: int) -> int:
        """The index in the text of the run's window ``number``."""
        epoch, index = divmod(number, self.windows)
        return permute(index, self.windows, key=f"{self.seed}:{epoch}".encode())

    def indices(self, step: int) -> list[int]:
        """Which windows this rank takes in ``step``."""
        first = self._next_window(step - 1) + self.rank * self.accumulate * self.batch_size
        return [self.window(number) for number in range(first, first + self.accumulate * self.batch_size)]

    def batches(self, step: int) -> list[tuple[Tensor, Tensor]]:
        """The micro-batches of ``step`` (from 1 on): ``accumulate`` pairs of tokens and targets, each (B, T) int64.

        Raises:
            DataError: a token is not in the vocabulary.
        """
        rows = np.stack([self.corpus.read(index * self.context, self.context + 1) for index in self.indices(step)])
        if self.vocabulary is not None and int(rows.max()) >= self.vocabulary:
            raise DataError(
                f"the data has a token {int(rows.max())}, and model.vocabulary = {self.vocabulary}",
                "set model.vocabulary to the tokenizer's",
            )
        text = torch.from_numpy(rows.astype(np.int64))  # (accumulate·B, T+1)
        return [(part[:, :-1], part[:, 1:]) for part in torch.split(text, self.batch_size)]

    def state(self) -> dict[str, int | str]:
        """What the data order depends on; equal states mean equal batches."""
        return {
            "fingerprint": self.corpus.fingerprint,
            "seed": self.seed,
            "context": self.context,
            "windows_per_step": self.windows_per_step,
            "origin_step": self.origin_step,
            "origin_window": self.origin_window,
        }

    def resumed_from(self, saved: dict[str, int | str], step: int, local: Mapping[str, Any] | None = None) -> Loader:
        """The loader that continues after ``step`` where the loader of ``saved`` (a :meth:`state`) stopped.

        A step may take another number of windows than before: it continues with the first that no step has taken.

        Args:
            saved: the state in the checkpoint.
            step: the checkpoint's step.
            local: a rank's own state, of which there is none.

        Raises:
            DataError: names what differs, with both values.
        """
        movable = {"origin_step", "origin_window", "windows_per_step"}
        for key, now in self.state().items():
            if key not in movable and saved.get(key) != now:
                raise DataError(
                    f"the checkpoint has data {key} = {saved.get(key)!r}, this run {now!r}: the data order would not "
                    "continue where it stopped",
                    "restore the data and settings of the checkpoint's run, or start a new run",
                )
        before_step, before_window = int(saved["origin_step"]), int(saved["origin_window"])
        per_step = int(saved["windows_per_step"])
        if per_step == self.windows_per_step:
            return replace(self, origin_step=before_step, origin_window=before_window)
        return replace(self, origin_step=step, origin_window=before_window + (step - before_step) * per_step)

    def _next_window(self, step: int) -> int:
        """The first window after those of all steps up to ``step``."""
        return self.origin_window + (step - self.origin_step) * self.windows_per_step
