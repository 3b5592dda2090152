"""Text files, or the texts of a Hugging Face dataset, into the token files that the trainer reads."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from outlast.errors import DataError, MissingDependency

TRAIN, HELD_OUT, RECORD = "train.bin", "held_out.bin", "tokens.json"
_PIECE_CHARACTERS = 1 << 20
_BATCH_PIECES = 16
"""Pieces that are encoded at once; the tokenizer spreads them over the processor's cores."""

Documents = Iterable[Iterable[str]]
"""Texts, each in pieces, so that none is in memory as a whole."""


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """What was written; ``tokens.json`` beside the files holds it, too."""

    format: str
    """``uint16`` or ``uint32``: ``data.format``."""
    vocabulary: int
    """Tokens that the tokenizer knows: ``model.vocabulary`` is at least this."""
    train_tokens: int
    held_out_tokens: int
    tokenizer: str
    """SHA-256 of ``tokenizer.json``."""


class Encoder:
    """A tokenizer of the ``tokenizers`` library.

    Args:
        path: of a ``tokenizer.json``, or the folder of a model that has one.
        end_token: written after each document; none: nothing.

    Raises:
        MissingDependency: ``tokenizers`` is not installed.
        DataError: there is no tokenizer, or it cannot be read, or does not know ``end_token``.
    """

    def __init__(self, path: Path, end_token: str | None) -> None:
        tokenizers = _library("tokenizers")
        file = path / "tokenizer.json" if path.is_dir() else path
        try:
            content = file.read_bytes()
        except OSError as error:
            raise DataError(f"the tokenizer cannot be read: {error}", "name a tokenizer.json, or its folder") from error
        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises nothing narrower
            raise DataError(f"{file} is no tokenizer: {error}", "save one with tokenizer.save_pretrained") from error
        self.digest = hashlib.sha256(content).hexdigest()
        self.vocabulary = 1 + max(self._tokenizer.get_vocab().values(), default=-1)  # the numbers of some have gaps
        self.end: list[int] = []
        if end_token is not None:
            number = self._tokenizer.token_to_id(end_token)
            if number is None:
                raise DataError(f"{file} has no token {end_token!r}", "name one that it has, or leave it out")
            self.end = [number]

    def encode(self, pieces: Iterable[str]) -> Iterator[list[int]]:
        """The tokens of a document, some at a time, without those that a template would add around a text."""
        each = iter(pieces)
        while some := list(islice(each, _BATCH_PIECES)):
            for encoding in self._tokenizer.encode_batch(some, add_special_tokens=False):
                yield encoding.ids
        yield self.end


def tokenize(
    training: Documents,
    held_out: Documents | float,
    encoder: Encoder,
    folder: Path,
    *,
    told: Callable[[int], None] = lambda tokens: None,
) -> Tokens:
    """Write ``train.bin``, ``held_out.bin`` and ``tokens.json``; tokens are little-endian, one after the other.

    The files appear when all of them are complete.

    Args:
        training: the documents of ``train.bin``.
        held_out: those of ``held_out.bin``; or a share, 0 to 1, of the tokens of ``training``: its last.
        encoder: of what each piece is encoded with.
        folder: is made if it is missing, and must have none of the files.
        told: called with the number of tokens of each batch.

    Raises:
        DataError: a file is there, or one of the two sides has no tokens, or a text is not UTF-8.
        OSError: a file cannot be written.
    """
    for name in (TRAIN, HELD_OUT, RECORD):
        if (folder / name).exists():
            raise DataError(f"{folder / name} is there already", "remove it, or write to another folder")
    folder.mkdir(parents=True, exist_ok=True)
    form = "uint16" if encoder.vocabulary <= 1 << 16 else "uint32"
    dtype = np.dtype(form).newbyteorder("<")
    unfinished = {name: folder / f".{name}.{os.getpid()}.tmp" for name in (TRAIN, HELD_OUT, RECORD)}
    try:
        for name, documents in ((TRAIN, training), (HELD_OUT, () if isinstance(held_out, float) else held_out)):
            with unfinished[name].open("wb") as file:
                for document in documents:
                    for ids in encoder.encode(document):
                        file.write(np.asarray(ids, dtype).tobytes())
                        told(len(ids))
        if isinstance(held_out, float):
            _move_end(unfinished[TRAIN], unfinished[HELD_OUT], held_out, dtype.itemsize)
        counts = {name: unfinished[name].stat().st_size // dtype.itemsize for name in (TRAIN, HELD_OUT)}
        if missing := [name for name, count in counts.items() if not count]:
            raise DataError(f"{missing[0]} would have no tokens", "name files or a dataset with text for it")
        found = Tokens(
            format=form,
            vocabulary=encoder.vocabulary,
            train_tokens=counts[TRAIN],
            held_out_tokens=counts[HELD_OUT],
            tokenizer=encoder.digest,
        )
        unfinished[RECORD].write_text(json.dumps(asdict(found), indent=1) + "\n")
        for name, path in unfinished.items():
            path.replace(folder / name)
    finally:
        for path in unfinished.values():
            path.unlink(missing_ok=True)
    return found


def _move_end(whole: Path, end: Path, share: float, token_bytes: int) -> None:
    """Move the last ``share`` of the tokens from one file to the other."""
    tokens = whole.stat().st_size // token_bytes
    stays_bytes = (tokens - int(share * tokens)) * token_bytes
    with whole.open("r+b") as first, end.open("wb") as last:
        first.seek(stays_bytes)
        shutil.copyfileobj(first, last)
        first.truncate(stays_bytes)


def texts_of_files(files: Iterable[Path]) -> Iterator[Iterator[str]]:
    """Each file as a document, in pieces that end with a line, as far as lines are short enough.

    Raises:
        DataError: a file is not UTF-8, or cannot be read.
    """
    return (_pieces(file) for file in files)


def _pieces(file: Path) -> Iterator[str]:
    try:
        with file.open(encoding="utf-8", newline="") as text:
            while piece := text.read(_PIECE_CHARACTERS):
                yield piece + text.readline(_PIECE_CHARACTERS)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as UTF-8 text: {error}", "leave it out with data.exclude") from error


def texts_of_dataset(folder: Path, column: str) -> Any:
    """A Hugging Face dataset that ``save_to_disk`` wrote, one text of ``column`` a document: ``len``, and slices.

    Raises:
        MissingDependency: ``datasets`` is not installed.
        DataError: it cannot be read, is a dictionary of datasets, or has no such column of texts.
    """
    datasets = _library("datasets")
    try:
        dataset: Any = datasets.load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} is no dataset: {error}", "write one with dataset.save_to_disk") from error
    names = dataset.column_names
    if isinstance(names, dict):
        raise DataError(
            f"{folder} holds several datasets: {', '.join(names)}", f"name one: {folder / next(iter(names), '')}"
        )
    if column not in names or not len(dataset) or not isinstance(dataset[0][column], str):
        raise DataError(f"{folder} has no column {column!r} of texts", f"its columns: {', '.join(names)}")
    return dataset


def texts_of_rows(dataset: Any, column: str, first: int, last: int) -> Iterator[Iterator[str]]:
    """The texts of some rows, each a document."""
    return (iter((dataset[row][column],)) for row in range(first, last))


def _library(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise MissingDependency(f"{name} cannot be imported: {error}", f"pip install {name}") from error
