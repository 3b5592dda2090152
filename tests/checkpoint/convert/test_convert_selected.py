"""Export and import of parts, under other names, in another precision, and without what a format cannot hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from outlast.checkpoint.convert import export_step, import_step
from outlast.checkpoint.tools import verify
from outlast.cli.main import main
from outlast.errors import CheckpointError, StateMismatch
from tests.checkpoint.converting import FORMATS, needs_safetensors, restored, save
from tests.checkpoint.states import same

W = torch.arange(6.0).reshape(2, 3)
STATE: dict[str, Any] = {
    "model": {"module._orig_mod.body.w": W, "module._orig_mod.head.w": W + 1, "steps": torch.tensor(3)},
    "ema": {"body.w": W / 2},
    "optimizer": {"state": {0: {"exp_avg": W, "step": 4}}, "lrs": [torch.tensor(0.5), 0.1]},
    "note": "kept",
}


def there_and_back(tmp_path: Path, format: Any, how: str, part: str | None = None, **select: Any) -> dict[str, Any]:
    """What is exported or imported with a selection, and the other way without."""
    save(tmp_path / "a", STATE)
    out, back = (select, {}) if how == "export" else ({}, select)
    export_step(tmp_path / "a", tmp_path / "x", format, part=part, **out)
    import_step(tmp_path / "x", tmp_path / "b", format, step=4, **back)
    assert verify(tmp_path / "b", 4).ok
    return restored(tmp_path / "b")[1]


@pytest.mark.parametrize("how", ["export", "import"])
@pytest.mark.parametrize("format", FORMATS)
def test_parts(tmp_path: Path, format: Any, how: str) -> None:
    got = there_and_back(tmp_path, format, how, parts=("model", "note"))
    assert same(got, {key: STATE[key] for key in ("model", "note")})


@pytest.mark.parametrize("how", ["export", "import"])
@pytest.mark.parametrize("format", FORMATS)
def test_names(tmp_path: Path, format: Any, how: str) -> None:
    names = {"model/module._orig_mod.body.": "model/encoder.", "ema": "average", "optimizer/state/0/exp_avg": "first"}
    got = there_and_back(tmp_path, format, how, rename=names)
    assert set(got["model"]) == {"encoder.w", "module._orig_mod.head.w", "steps"}
    assert same(got["average"], {"body.w": W / 2})
    assert same({"first": got["first"]}, {"first": W})
    assert "ema" not in got


@pytest.mark.parametrize("how", ["export", "import"])
@pytest.mark.parametrize("format", FORMATS)
def test_names_without_those_of_wrappers(tmp_path: Path, format: Any, how: str) -> None:
    got = there_and_back(tmp_path, format, how, rename="unwrapped")
    assert same(dict(sorted(got.pop("model").items())), {"body.w": W, "head.w": W + 1, "steps": torch.tensor(3)})
    assert same(got["ema"], STATE["ema"])
    assert got["note"] == "kept"


@pytest.mark.parametrize("how", ["export", "import"])
@pytest.mark.parametrize("format", FORMATS)
def test_precision(tmp_path: Path, format: Any, how: str) -> None:
    """In lists and under keys that are numbers, too; integers stay as they are."""
    got = there_and_back(tmp_path, format, how, cast=torch.bfloat16)
    assert got["model"]["steps"].dtype == torch.int64
    assert got["optimizer"]["lrs"][0].dtype == torch.bfloat16
    assert got["optimizer"]["lrs"][1] == 0.1
    floats = [*got["ema"].values(), got["model"]["module._orig_mod.head.w"]]
    assert {tensor.dtype for tensor in floats} == {torch.bfloat16}
    assert same({"w": got["ema"]["body.w"]}, {"w": (W / 2).bfloat16()})


@pytest.mark.parametrize("how", ["export", "import"])
def test_what_is_wrong_in_a_selection_is_named(tmp_path: Path, how: str) -> None:
    large = {"w": torch.tensor([1e30]), "v": torch.ones(1)}
    save(tmp_path / "a", large)
    torch.save(large, tmp_path / "x")

    def convert(**select: Any) -> None:
        if how == "export":
            export_step(tmp_path / "a", tmp_path / "y", "torch", **select)
        else:
            import_step(tmp_path / "x", tmp_path / "b", "torch", **select)

    for select, said in (
        ({"parts": ("u",)}, r"has no part 'u'[\s\S]*its parts: [wv], [wv]"),
        ({"parts": "w"}, "is a string"),
        ({"rename": {"w": "v"}}, "would both become 'v'"),
        ({"cast": torch.float16}, r"'w' has elements that torch.float16 cannot hold, 1.0000000150474662e\+30"),
        ({"cast": torch.int8}, "pass a floating-point type"),
    ):
        with pytest.raises((CheckpointError, StateMismatch), match=said):
            convert(**select)
    assert not (tmp_path / "y").exists()
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("format", ["torch", "dcp"])
def test_what_a_format_cannot_hold_is_left_out_when_asked(tmp_path: Path, format: Any) -> None:
    save(tmp_path / "a", {"model": {"w": W, "deep": [W, range(3), {"odd": frozenset({1})}]}, "odd": range(2)})
    with pytest.raises(CheckpointError, match="does not read back"):
        export_step(tmp_path / "a", tmp_path / "x", format)
    done = export_step(tmp_path / "a", tmp_path / "x", format, strict=False)
    assert set(done.left_out) >= {"model/deep/1", "model/deep/2/odd", "odd"}
    import_step(tmp_path / "x", tmp_path / "b", format)
    model = restored(tmp_path / "b")[1]["model"]
    assert same({"w": model["w"], "first": model["deep"][0]}, {"w": W, "first": W})
    assert model["deep"][1] is None


@needs_safetensors
def test_what_safetensors_cannot_hold_is_left_out_when_asked(tmp_path: Path) -> None:
    save(tmp_path / "a", {"w": W, "c": torch.ones(2, dtype=torch.complex128)})
    assert export_step(tmp_path / "a", tmp_path / "x", "safetensors", strict=False).left_out == ("c",)
    import_step(tmp_path / "x", tmp_path / "b", "safetensors")
    assert same(restored(tmp_path / "b")[1], {"w": W})


def test_what_a_step_cannot_hold_is_left_out_when_asked(tmp_path: Path) -> None:
    torch.save({"model": {"w": W, "sparse": W.to_sparse(), "l": [W.to_sparse(), W]}}, tmp_path / "x")
    with pytest.raises(CheckpointError, match="only dense"):
        import_step(tmp_path / "x", tmp_path / "b", "torch")
    assert import_step(tmp_path / "x", tmp_path / "b", "torch", strict=False).left_out == ("model/sparse", "model/l/0")
    assert same(restored(tmp_path / "b")[1], {"model": {"w": W, "l": [None, W]}})


@pytest.mark.parametrize("value", [True, "6", 6.0])
def test_a_step_is_a_number(tmp_path: Path, value: Any) -> None:
    torch.save({"w": W}, tmp_path / "x")
    with pytest.raises(CheckpointError, match="import_step: a step is an integer >= 0, got"):
        import_step(tmp_path / "x", tmp_path / "b", "torch", step=value)


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "a", {**STATE, "odd": range(2)})
    url, x, b = (str(tmp_path / name) for name in ("a", "x", "b"))
    select = ["--rename", "unwrapped", "--cast", "float16", "--no-strict"]
    assert main(["ckpt", "export", url, x, "--format", "torch", "--parts", "model", "odd", *select]) == 0
    assert "left out: odd: torch cannot hold it" in capsys.readouterr().out
    words = ["--format", "torch", "--rename", "model/body.=model/encoder.", "model/head.=head/", "--json"]
    assert main(["ckpt", "import", x, b, *words, "--cast", "float64"]) == 0
    assert json.loads(capsys.readouterr().out)["left_out"] == []
    got = restored(b)[1]
    want = {"model": {"encoder.w": W.double(), "steps": torch.tensor(3)}, "head": {"w": (W + 1).double()}}
    assert same(got, want)
    for bad in (["--rename", "model"], ["--rename", "a=b", "a=c"], ["--cast", "int8"], ["--cast", "float17"]):
        assert main(["ckpt", "export", url, str(tmp_path / "y"), "--format", "torch", *bad]) == 2
        assert bad[0] in capsys.readouterr().err
