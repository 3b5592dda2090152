"""Token files from text and from datasets on disk, with real tokenizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from outlast.cli.main import main
from outlast.cli.tokenize import Counting
from outlast.config import load
from outlast.trainer.config import Config
from outlast.trainer.sources import build_sources
from outlast.trainer.tokenize import Encoder, texts_of_files, tokenize
from tests.small_tokenizer import save_tokenizer

TEXTS = {f"{number}.txt": f"line {number} of a small text, größer\n" * (20 + number) for number in range(40)}


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """In a folder, as ``save_pretrained`` leaves one."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    save_tokenizer(folder / "tokenizer.json", TEXTS.values())
    return folder


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, text in TEXTS.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def run(*words: object) -> int:
    return main(["tokenize", *map(str, words)])


def test_what_it_prints_trains(
    tokenizer: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "data"
    words = ("--tokenizer", tokenizer, "--files", f"{texts}/*.txt", "--end-token", "<|endoftext|>")
    assert run(out, *words, "--held-out-share", "0.2") == 0
    printed = capsys.readouterr().out
    (tmp_path / "run.toml").write_text(printed.split("\n\n", 1)[1].replace("[data]", "context = 8\n[data]"))
    training, held_out = build_sources(load(Config, tmp_path / "run.toml"), 0, 1)
    assert held_out is not None
    tokens, targets = training.batches(1)[0]
    assert tokens.shape == targets.shape == (8, 8)
    assert 256 < int(json.loads((out / "tokens.json").read_text())["vocabulary"]) <= 300
    known = tokenizers.Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    sides = []
    for name in ("train.bin", "held_out.bin"):
        ids = np.fromfile(out / name, "<u2")
        documents = np.split(ids, np.flatnonzero(ids == known.token_to_id("<|endoftext|>")) + 1)
        assert len(documents[-1]) == 0
        sides.append({known.decode(document.tolist()) for document in documents[:-1]})
    assert sides[0] | sides[1] == set(TEXTS.values())
    assert not sides[0] & sides[1]
    assert run(out, *words, "--held-out-share", "0.2") == 1  # never over what is there
    assert "is there already" in capsys.readouterr().err


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=st.text(min_size=1).filter(lambda text: all(not 0xD800 <= ord(one) < 0xE000 for one in text)))
def test_whatever_the_text_it_comes_back(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    folder = tmp_path_factory.mktemp("any")
    (folder / "text").write_bytes(text.encode())
    encoder = Encoder(tokenizer, None)
    tokenize(texts_of_files([folder / "text"]), texts_of_files([folder / "text"]), encoder, folder / "data")
    ids = np.fromfile(folder / "data" / "train.bin", "<u2").tolist()
    decoded = tokenizers.Tokenizer.from_file(str(tokenizer / "tokenizer.json")).decode(ids, skip_special_tokens=False)
    assert decoded == text


def test_of_a_single_file_the_end_is_held_out(tokenizer: Path, tmp_path: Path) -> None:
    text = "".join(TEXTS.values())
    (tmp_path / "all.txt").write_text(text, encoding="utf-8")
    assert run(tmp_path / "data", "--tokenizer", tokenizer, "--files", tmp_path / "all.txt") == 0
    known = tokenizers.Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    ids = [np.fromfile(tmp_path / "data" / name, "<u2").tolist() for name in ("train.bin", "held_out.bin")]
    assert known.decode(ids[0] + ids[1]) == text
    assert len(ids[1]) == int(0.05 * len(ids[0] + ids[1]))


def test_long_files_are_taken_in_pieces(tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    (tmp_path / "text").write_text("a line of the text\n" * 500)
    documents = lambda: texts_of_files([tmp_path / "text"])  # noqa: E731
    tokenize(documents(), documents(), Encoder(tokenizer, None), whole)
    monkeypatch.setattr("outlast.trainer.tokenize._PIECE_CHARACTERS", 100)
    tokenize(documents(), documents(), Encoder(tokenizer, None), pieces)
    assert (whole / "train.bin").read_bytes() == (pieces / "train.bin").read_bytes()


def test_a_dataset_on_disk(tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = datasets.Dataset.from_dict({"content": list(TEXTS.values()), "number": list(range(len(TEXTS)))})
    rows.save_to_disk(str(tmp_path / "rows"))
    datasets.DatasetDict({"train": rows}).save_to_disk(str(tmp_path / "several"))
    words = ("--tokenizer", tokenizer / "tokenizer.json", "--dataset")
    assert run(tmp_path / "data", *words, tmp_path / "rows", "--column", "content") == 0
    known = tokenizers.Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    ids = [np.fromfile(tmp_path / "data" / name, "<u2").tolist() for name in ("train.bin", "held_out.bin")]
    assert [known.decode(one) for one in ids] == [
        "".join(list(TEXTS.values())[:-2]),
        "".join(list(TEXTS.values())[-2:]),
    ]
    for folder, column, said in (
        ("rows", "text", "no column 'text' of texts"),
        ("rows", "number", "no column 'number' of texts"),
        ("several", "content", "several datasets: train"),
        ("tokenizer", "content", "is no dataset"),
    ):
        assert run(tmp_path / "other", *words, tmp_path / folder, "--column", column) == 1
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said", "status"),
    [
        ({"--tokenizer": "nowhere"}, "the tokenizer cannot be read", 1),
        ({"--tokenizer": "texts/0.txt"}, "is no tokenizer", 1),
        ({"--end-token": "</s>"}, "has no token '</s>'", 1),
        ({"--files": "texts/*.md"}, "no data: 0 files match", 1),
        ({"--files": "bad/*"}, "cannot be read as UTF-8 text", 1),
        ({"--held-out-share": "1.5"}, "held-out-share", 2),
        ({"--dataset": "rows"}, "not both", 2),
    ],
)
def test_bad_input(
    tokenizer: Path,
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, str],
    said: str,
    status: int,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad").mkdir()
    for number in range(100):
        (tmp_path / "bad" / str(number)).write_bytes(b"\xff\xfe broken")
    given: dict[str, Any] = {"--tokenizer": tokenizer, "--files": "texts/*.txt", **change}
    assert run("data", *(word for pair in given.items() for word in pair)) == status
    assert said in capsys.readouterr().err
    assert not (tmp_path / "data").exists() or not list((tmp_path / "data").iterdir())


def test_its_progress_is_told() -> None:
    import io

    lines, now_s = io.StringIO(), iter([0.0, 5.0, 10.0, 12.0, 21.0])
    counting = Counting(lines, lambda: next(now_s))
    for _ in range(4):
        counting(1_000)
    assert lines.getvalue() == "2,000 tokens, 200 a second\n4,000 tokens, 190 a second\n"
