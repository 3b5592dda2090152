"""Control characters in other people's texts: visible where outlast prints them, and unable to forge a line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from outlast.cli.main import main
from outlast.events import parse_event
from outlast.plain_text import plain_text
from tests.checkpoint.helpers import checkpointer

HOSTILE = "\x1b[2J\x1b[1;32mOK\rverified\n0 restarts\u202e\x9b\x7f\u2028"
UNSEEN = set("\x1b\r\x9b\x7f\u202e\u2028")


def test_plain_text() -> None:
    assert plain_text("blocks.0.w") == "blocks.0.w"
    assert plain_text("Größe 4×4 μs 模型") == "Größe 4×4 μs 模型"
    assert plain_text("a\nb") == "a b"
    assert plain_text("a\nb", keep="\n") == "a\nb"
    shown = plain_text(HOSTILE)
    assert "\\x1b[2J" in shown
    assert not UNSEEN & set(shown)
    assert "\n" not in shown


@pytest.mark.parametrize("ascii_only", [True, False])
def test_texts_of_events_are_plain_wherever_they_are(ascii_only: bool) -> None:
    fields = {"host": HOSTILE, "metrics": {HOSTILE: [HOSTILE, 1.5]}, "text": "plain"}
    line = {"v": 1, "t": 1.0, "rank": 0, "generation": 0, "kind": HOSTILE, **fields}
    record = parse_event(json.dumps(line, ensure_ascii=ascii_only).encode(), "here:1")
    shown = plain_text(HOSTILE)
    assert record.kind == shown
    assert record.fields == {"host": shown, "metrics": {shown: [shown, 1.5]}, "text": "plain"}


def test_tensor_names_and_paths_on_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = tmp_path / "checkpoints"
    name = "\x1b[2Jw\u202e[bold]"
    for step in (1, 2):
        with checkpointer(url, attempt_id=f"a{step}", old_steps="keep") as saver:
            saver.save(step, replicated={"model": {name: torch.ones(2) * step}, "data": {name: step}})
    hostile = tmp_path / "check\x1b[2Jpoints"
    shutil.copytree(url, hostile)
    for words in (["ls"], ["show"], ["verify"], ["memory"], ["prune", "--keep-last", "1", "--dry-run"]):
        assert main(["ckpt", words[0], str(hostile), *words[1:]]) == 0
    assert main(["ckpt", "diff", str(hostile), "--step", "1", "--other-step", "2"]) == 1
    assert main(["ckpt", "show", str(tmp_path / "none\x1b[2J")]) == 1
    printed = capsys.readouterr()
    assert "\\x1b[2Jw\\u202e[bold]" in printed.out
    assert not UNSEEN & set(printed.out + printed.err)
