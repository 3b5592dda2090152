"""A checkpoint is plain Zarr: stock ``zarr`` opens it, and every parameter read that way equals the trained one."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from outlast.checkpoint import tools
from tests.helpers import clean_env, outlast, steps_saved, tiny_config


def test_parameters_read_by_stock_zarr_equal_the_trained_ones(tmp_path: Path) -> None:
    config, run = tiny_config(tmp_path)
    kept = tmp_path / "parameters.npz"
    script = [sys.executable, str(Path(__file__).parent / "keep_parameters.py"), str(kept), str(config)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=120, env=clean_env())
    assert done.returncode == 0, done.stderr[-4000:]
    newest = run / "checkpoints" / f"step_{steps_saved(run)[-1]:08d}"
    step = zarr.open_group(str(newest), mode="r")
    found = {name: np.asarray(array[...]) for name, array in step["model"].arrays()}  # type: ignore[union-attr]
    assert found
    packs = step["packed"]
    assert isinstance(packs, zarr.Group)
    for _, pack in packs.arrays():
        index: Any = pack.attrs["outlast_packed"]
        raw = np.asarray(pack[...])
        for path, (offset, shape, dtype) in index.items():
            if path.startswith("model/"):
                values = raw[offset : offset + math.prod(shape) * np.dtype(dtype).itemsize]
                found[path.removeprefix("model/")] = values.view(dtype).reshape(shape)
    trained = np.load(kept)
    assert set(found) == set(trained.files)
    for name in trained.files:
        assert found[name].tobytes() == trained[name].tobytes(), name


def test_one_flipped_bit_in_any_file_is_found(tmp_path: Path) -> None:
    """Every file of a real checkpoint, each in turn; ``test_bad_input`` shows that the step before is taken then."""
    config, run = tiny_config(tmp_path)
    outlast("train", config, "--trainer.steps", "10")
    step = run / "checkpoints" / "step_00000010"
    files = sorted(path for path in step.rglob("*") if path.is_file())
    assert len(files) > 50
    assert not tools.verify(run / "checkpoints", 10).problems
    for number, path in enumerate(files):
        raw = bytearray(path.read_bytes())
        raw[(number * 7919) % len(raw)] ^= 1 << number % 8
        good = path.read_bytes()
        path.write_bytes(raw)
        problems = tools.verify(run / "checkpoints", 10).problems
        assert [p.file for p in problems] == [str(path.relative_to(step))], path
        path.write_bytes(good)
