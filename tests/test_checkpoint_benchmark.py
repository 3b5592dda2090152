"""The checkpoint benchmark runs every method, saves with it, and reads back what it saved; how fast it is, it tells."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import checkpoint


@pytest.mark.slow
def test_the_checkpoint_benchmark(root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(root)
    rows, raws = checkpoint.measure(tmp_path, 50, checkpoint.METHODS, 1, 2, 1)
    assert len(raws) == 1
    for method, row in rows.items():
        assert len(row.step_s) == 1
        saves = 0 if method == "none" else 2
        assert len(row.blocked_s) == len(row.durable_s) == saves, method
        assert len(row.load_s) == (1 if saves else 0)
        assert all(durable_s > 0 for durable_s in row.durable_s)
    table = checkpoint.text(rows, raws)
    assert all(method in table for method in checkpoint.METHODS)
    assert not list(tmp_path.iterdir())
