"""Settings: precedence, types, errors that name the nearest right key."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outlast.config import _field_docs, load, override_arguments, split_overrides, to_toml
from outlast.errors import ConfigError, OutOfRange, UnknownKey
from outlast.trainer.config import Config


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "c.toml"
    path.write_text(text)
    return path


def test_command_line_beats_file_beats_environment_beats_default(tmp_path: Path) -> None:
    path = write(tmp_path, "[model]\nlayers = 3\nheads = 2\nwidth = 32\n")
    environ = {"OUTLAST_MODEL_LAYERS": "9", "OUTLAST_OPTIM_LR": "0.5", "OUTLAST_MODEL_CONTEXT": "7"}
    config = load(Config, path, environ, {"model.context": "64", "optim.lr": "0.25"})
    assert (config.model.layers, config.model.context, config.optim.lr) == (3, 64, 0.25)
    assert load(Config, path, environ).optim.lr == 0.5
    assert load(Config, path, {}).optim.lr == Config().optim.lr


@pytest.mark.parametrize(
    ("text", "kind", "says"),
    [
        ("[model]\nlayer = 3\n", UnknownKey, "did you mean 'layers'?"),
        ("[modle]\nlayers = 3\n", UnknownKey, "did you mean 'model'?"),
        ("[model]\nlr = 3\n", UnknownKey, "did you mean optim.lr?"),
        ("layers = 3\n", UnknownKey, "outside any section"),
        ("[model]\nlayers = 'three'\n", ConfigError, "model.layers = 'three' is not of type int"),
        ("[model]\nlayers = 1.5\n", ConfigError, "not of type int"),
        ("[model]\nlayers = true\n", ConfigError, "not of type int"),
        ("[model]\nlayers = 0\n", OutOfRange, "model.layers = 0 is out of range"),
        ("[model]\nheads = 5\n", OutOfRange, "a divisor of model.width = 384"),
        ("[trainer]\nprecision = 'fp61'\n", OutOfRange, "is not one of fp32, bf16"),
        ("[run]\nresume = 'perhaps'\n", OutOfRange, "auto, never, or the number"),
        (
            "[checkpoint]\nevery_steps = 'often'\n",
            ConfigError,
            "every_steps = 'often' is none of: int, 'auto'",
        ),
        ("[checkpoint]\nevery_steps = 2.5\n", ConfigError, "checkpoint.every_steps = 2.5 is none of: int, 'auto'"),
        ("[checkpoint]\nevery_steps = 'none'\n", ConfigError, "checkpoint.every_steps = 'none' is none of"),
        ("[checkpoint]\nevery_steps = 0\n", OutOfRange, 'every_steps >= 1, or "auto"'),
        ("[comm]\ndensity = 1.5\n", OutOfRange, "comm.density = 1.5"),
        ("[model\n", ConfigError, "not valid TOML"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, text: str, kind: type[ConfigError], says: str) -> None:
    with pytest.raises(kind) as caught:
        load(Config, write(tmp_path, text), {})
    assert says in str(caught.value)


def test_a_wrong_value_in_the_environment_names_the_variable() -> None:
    with pytest.raises(ConfigError, match="OUTLAST_MODEL_LAYERS"):
        load(Config, None, {"OUTLAST_MODEL_LAYERS": "many"})


@pytest.mark.parametrize(("word", "value"), [("12", 12), ("auto", "auto")])
def test_a_number_or_a_word_is_taken_from_everywhere(tmp_path: Path, word: str, value: object) -> None:
    for config in (
        load(Config, None, {"OUTLAST_CHECKPOINT_EVERY_STEPS": word}),
        load(Config, None, {}, {"checkpoint.every_steps": word}),
        load(Config, write(tmp_path, f"[checkpoint]\nevery_steps = {value!r}\n"), {}),
    ):
        assert config.checkpoint.every_steps == value
        assert load(Config, write(tmp_path, to_toml(config)), {}) == config


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no config file at"):
        load(Config, tmp_path / "none.toml", {})


@pytest.mark.parametrize(
    ("flag", "hint"),
    [
        ("--comm.densty", "did you mean --comm.density?"),
        ("--model.lr", "did you mean --optim.lr?"),
        ("--data.batch-sise", "did you mean --data.batch-size?"),
        ("--modle.layers", "did you mean --model.layers?"),
        ("--x.y", "sections are: run, model"),
    ],
)
def test_a_mistyped_option_names_the_nearest(flag: str, hint: str) -> None:
    _, overrides = split_overrides([flag, "0.1"])
    with pytest.raises(UnknownKey) as caught:
        load(Config, None, {}, overrides)
    assert f"no setting {flag}" in str(caught.value)
    assert hint in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("comm.density", "7", "comm.density = 7.0 is out of range\n  what to do: allowed: 0 < density <= 1"),
        ("model.layers", "three", "command line: model.layers = 'three' is not of type int"),
        ("trainer.precision", "fp61", "is not one of fp32, bf16"),
    ],
)
def test_a_wrong_value_on_the_command_line(name: str, value: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(Config, None, {}, {name: value})
    assert says in str(caught.value)


def test_overrides_are_separated_from_flags_wherever_they_are() -> None:
    words = ["--nproc-per-node", "2", "--comm.density", "0.1", "c.toml", "--data.files=a,b", "--dry-run"]
    rest, overrides = split_overrides([*words, "--data.batch-size", "3", "--data.batch_size", "4", "--run.dir=a=b"])
    assert rest == ["--nproc-per-node", "2", "c.toml", "--dry-run"]
    assert overrides == {"comm.density": "0.1", "data.files": "a,b", "data.batch_size": "4", "run.dir": "a=b"}
    config = load(Config, None, {}, overrides)
    assert (config.data.files, config.data.batch_size, config.run.dir) == (("a", "b"), 4, "a=b")
    with pytest.raises(ConfigError, match="has no value"):
        split_overrides(["--a.b"])


def test_a_child_process_is_given_the_same_settings() -> None:
    _, overrides = split_overrides(["--data.files", "a b,c,--d", "--optim.clip-norm", "none", "--comm.density=0.1"])
    assert split_overrides(override_arguments(overrides)) == ([], overrides)


@given(
    st.text(st.characters(exclude_characters="/", exclude_categories=["Cs", "Cc"]), min_size=1),
    st.floats(min_value=1e-12, max_value=1e3),
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1).map(tuple),
)
def test_what_is_written_reads_back_equal(
    tmp_path_factory: pytest.TempPathFactory, name: str, lr: float, files: tuple[str, ...]
) -> None:
    config = Config()
    config = dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, name=name),
        optim=dataclasses.replace(config.optim, lr=lr),
        data=dataclasses.replace(config.data, files=files),
    )
    path = tmp_path_factory.mktemp("toml") / "c.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    assert load(Config, path, {}) == config


def test_explained_toml_gives_meaning_and_choices_of_every_setting(tmp_path: Path) -> None:
    text = to_toml(Config(), explain=True)
    assert load(Config, write(tmp_path, text), {}) == Config()
    lines = text.splitlines()
    at = lines.index('precision = "fp32"')
    assert lines[at - 2 : at] == [
        "# bf16: autocast in forward and backward; parameters, gradients and optimizer state stay fp32.",
        "# values: 'fp32', 'bf16'",
    ]
    assert "# dir is not set" in lines
    assert "``" not in "".join(lines)


def test_every_setting_is_documented() -> None:
    for section in typing.get_type_hints(Config).values():
        assert set(_field_docs(section)) == {field.name for field in dataclasses.fields(section)}, section


def test_every_shipped_config_is_valid(root: Path) -> None:
    shipped = sorted((root / "configs").glob("*.toml"))
    assert shipped
    for path in shipped:
        load(Config, path, {})
