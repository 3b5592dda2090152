"""Settings that are wrong say so, with the nearest right one."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from outlast.comm import (
    CommConfig,
)
from outlast.comm import config as settings_module
from outlast.comm.compressors import (
    COMPRESSORS,
    VALUES,
    TopK,
)
from outlast.comm.config import FEEDBACKS
from outlast.comm.feedback import (
    EF21SGDM,
    EControl,
)
from outlast.comm.feedback.from_config import (
    feedback_from_config,
)
from outlast.config import load, to_toml
from outlast.errors import ConfigError, OutOfRange, UnknownCompressor


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"compressor": "topkk"}, "did you mean 'topk'"),
        ({"compressor": "powersgd"}, "known are: auto, block-topk, dense, gear"),
        ({"feedback": "ef12"}, "did you mean 'ef"),
        ({"feedback": "ef21_sgdm"}, "did you mean 'ef21-sgdm'"),
    ],
)
def test_unknown_names(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UnknownCompressor) as caught:
        CommConfig(**settings)
    assert said in caught.value.fix
    assert repr(next(iter(settings.values()))) in caught.value.what
    assert isinstance(caught.value, ConfigError)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"density": 0.0}, "comm.density = 0.0"),
        ({"density": 1.01}, "comm.density = 1.01"),
        ({"density": float("nan")}, "comm.density = nan"),
        ({"selection": "exakt"}, "did you mean 'exact'"),
        ({"target": "momentum"}, "known are: auto, gradient, update"),
        ({"transport": "two-faze"}, "did you mean 'two-phase'"),
        ({"values": "int2"}, "did you mean 'int"),
        ({"residual": "int4"}, "did you mean 'int8'"),
        ({"residual": "int8", "feedback": "ef21"}, "comm.residual = 'int8'"),
        ({"feedback": "ef21-bc"}, "comm.transport = 'all-gather'"),
        ({"probe_every_steps": -1}, "comm.probe_every_steps = -1"),
        ({"rank": 0}, "comm.rank = 0"),
        ({"block": -1}, "comm.block = -1"),
        ({"ranks_per_node": 0}, "comm.ranks_per_node = 0"),
        ({"warmup_steps": -1}, "comm.warmup_steps = -1"),
        ({"dense_below": -1}, "comm.dense_below = -1"),
        ({"timeout_s": 0.0}, "comm.timeout_s = 0.0"),
        ({"feedback": "none"}, "diverges"),
        ({"feedback": "econtrol", "density": 0.01, "eta": 0.05}, "min(2 * density, 0.5) = 0.02"),
        ({"feedback": "econtrol", "density": 0.4, "eta": 0.6}, "= 0.5"),
        ({"feedback": "econtrol", "eta": 0.0}, "comm.eta = 0.0"),
        ({"feedback": "ef21-sgdm", "eta": 1.5}, "comm.eta = 1.5"),
        ({"feedback": "ef21", "eta": 0.1}, "'ef21' has no eta"),
        ({"feedback": "ef14", "eta": 0.1}, "'ef14' has no eta"),
    ],
)
def test_out_of_range(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(OutOfRange) as caught:
        CommConfig(**settings)
    assert said in str(caught.value)


@dataclass(frozen=True)
class Joined:
    comm: CommConfig = field(default_factory=CommConfig)


@pytest.mark.parametrize(
    ("setting", "error", "said"),
    [
        ('compressor = "topkk"', UnknownCompressor, "did you mean 'topk'"),
        ('compressor = "powersgd"', UnknownCompressor, "known are: auto, block-topk, dense, gear"),
        ('feedback = "ef21_sgdm"', UnknownCompressor, "did you mean 'ef21-sgdm'"),
        ('target = "momentum"', OutOfRange, "known are: auto, gradient, update"),
        ('values = "int2"', OutOfRange, "did you mean 'int"),
        ('feedback = "none"', OutOfRange, "compressor = 'dense'"),
    ],
)
def test_wrong_choices_in_a_file_and_on_the_command_line(
    tmp_path: Path, setting: str, error: type[ConfigError], said: str
) -> None:
    file = tmp_path / "run.toml"
    file.write_text(f"[comm]\n{setting}\n")
    key, value = setting.split(" = ")
    for read, source in (
        (lambda: load(Joined, file, {}), str(file)),
        (lambda: load(Joined, None, {f"OUTLAST_COMM_{key}".upper(): value.strip('"')}), f"OUTLAST_COMM_{key.upper()}"),
        (lambda: load(Joined, None, {}, {f"comm.{key}": value.strip('"')}), "command line"),
    ):
        with pytest.raises(error) as caught:
            read()
        assert type(caught.value) is error
        assert said in caught.value.fix
        assert f"comm.{key} = {value}".replace('"', "'") in caught.value.what
        assert value == '"none"' or caught.value.what.startswith(f"{source}: ")


def test_explained_settings_list_the_choices() -> None:
    lines = to_toml(Joined(), explain=True).splitlines()
    for choices in (("auto", *COMPRESSORS), FEEDBACKS, VALUES):
        assert any(line.startswith(f"# values: {', '.join(map(repr, choices))}") for line in lines), choices


def test_defaults_of_eta() -> None:
    econtrol = feedback_from_config(CommConfig(feedback="econtrol", density=0.01, values="fp32"))
    assert isinstance(econtrol, EControl)
    assert econtrol.strength((10_000,)) == pytest.approx(0.01)
    momentum = feedback_from_config(CommConfig(feedback="ef21-sgdm"))
    assert isinstance(momentum, EF21SGDM)
    assert momentum.eta == 0.1
    assert EControl(TopK(0.9)).strength((1000,)) == 0.5
    with pytest.raises(OutOfRange, match=r"eta = 0.3"):
        EControl(TopK(k=1), eta=0.3).start(torch.zeros(100))
    CommConfig(feedback="econtrol", density=0.01, eta=0.02)


def test_in_words() -> None:
    assert CommConfig(target="gradient", feedback="ef21", values="fp32").describe() == "ef21 topk 1%"
    assert CommConfig(target="gradient", compressor="dense").describe() == "dense"
    assert CommConfig(target="update", compressor="dense").describe() == "dense updates"
    several = CommConfig(
        target="update", compressor="lowrank", feedback="ef14", values="int8", transport="two-phase", ranks_per_node=8
    )
    assert CommConfig(compressor="dense").target == "gradient"
    assert CommConfig(compressor="auto").target == "update" == CommConfig().target
    assert CommConfig().describe() == "ef14 topk 1% int8 of updates"
    assert several.describe() == "ef14 lowrank 4 int8 of updates, two-phase, 8 ranks a node"
    assert feedback_from_config(CommConfig(compressor="dense", feedback="none")) is None


def test_every_name_is_known_to_both() -> None:
    assert settings_module.COMPRESSORS == COMPRESSORS
    assert tuple(VALUES) == settings_module.VALUES
    for name in COMPRESSORS:
        feedback = feedback_from_config(CommConfig(compressor=name))
        assert (feedback is None) == (name == "dense")
        assert feedback is None or feedback.compressor.name == name


def test_settings_read_no_torch() -> None:
    code = "import sys, runpy; runpy.run_path(sys.argv[1]); assert 'torch' not in sys.modules"
    path = sys.modules[CommConfig.__module__].__file__
    assert path is not None
    subprocess.run([sys.executable, "-c", code, path], check=True, timeout=60)
