"""Factories: what a setting names is found, compared with its arguments, and what it made is looked at."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from outlast.config import load, split_overrides, to_toml
from outlast.errors import ConfigError, OutOfRange, UnknownKey
from outlast.trainer.batches import loss_in, size_of, split_target
from outlast.trainer.config import Config
from outlast.trainer.factories import Factory, search_beside
from outlast.trainer.optim import load_scheduler_state, scheduler_state
from outlast.trainer.parts import build_loss, build_model, check_factories, make_optimizer, make_scheduler
from outlast.trainer.saved_settings import saved_settings
from tests.helpers import outlast

MODULE = """
from torch import nn

SIZE = 4

class Net(nn.Sequential):
    def __init__(self, width: int, *, depth: int = 1, bias: bool = True):
        super().__init__(*(nn.Linear(width, width, bias=bias) for _ in range(depth)))

    @classmethod
    def small(cls):
        return cls(2)

def number(): return 7
def a_list(*parts): return list(parts)
def frozen(): return Net(2).requires_grad_(False)
def anything(**settings): return Net(settings["width"])
def with_scale(scale): return Net(scale.in_features)
def of_model(parameters, model, lr, momentum=0.0):
    import torch
    assert len(list(model.parameters())) == len(parameters)
    return torch.optim.SGD(parameters, lr=lr, momentum=momentum)
def half_square(output, target, weight=1.0): return weight * (output - target).square().mean() / 2
"""


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a module of the user's, and what is wrong with modules."""
    folder = tmp_path_factory.mktemp("beside")
    (folder / "users_net.py").write_text(MODULE)
    (folder / "users_broken.py").write_text("x = 1 / 0\n")
    (folder / "users_syntax.py").write_text("def f(:\n")
    (folder / "users_needs.py").write_text("import not_installed_here\n")
    return folder


@pytest.fixture(autouse=True)
def _found(beside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(beside))


def settings(*words: str) -> Config:
    return load(Config, None, {}, split_overrides(["--comm.target", "gradient", *words])[1])


WRONG = [
    ("users_net", {}, "names no function", "package.module:name"),
    ("users_nett:Net", {"width": 1}, "there is no module users_nett", "beside the config file"),
    ("torch.nnn:Linear", {}, "there is no module torch.nnn", "install it"),
    ("users_needs:f", {}, "users_needs imports not_installed_here", ""),
    ("users_broken:f", {}, "importing users_broken failed: ZeroDivisionError", "python -c"),
    ("users_syntax:f", {}, "importing users_syntax failed: SyntaxError", "python -c"),
    ("users_net:Nett", {"width": 1}, "users_net has no 'Nett'", "did you mean 'Net'?"),
    ("users_net:Net.smal", {}, "users_net.Net has no 'smal'", "did you mean 'small'?"),
    ("users_net:SIZE", {}, "is a int, which cannot be called", ""),
    ("users_net:Net", {"widht": 1}, "model.arguments: users_net:Net has no argument 'widht'", "did you mean 'width'?"),
    ("users_net:Net", {}, "missing a required argument: 'width'", "Net(width: int, *, depth: int = 1"),
    ("users_net:number", {"width": 1}, "has no argument 'width'", "it takes none"),
    ("users_net:with_scale", {"scale": {"factory": "torch.nn:Linearr"}}, "model.arguments.scale.factory", "'Linear'"),
    (
        "users_net:with_scale",
        {"scale": {"factory": "torch.nn:Linear", "arguments": {"in_featurs": 2, "out_features": 2}}},
        "model.arguments.scale.arguments: torch.nn:Linear has no argument 'in_featurs'",
        "did you mean 'in_features'?",
    ),
    ("users_net:with_scale", {"scale": {"factory": "torch.nn:Linear", "in_features": 2}}, "in_features beside it", ""),
]


@pytest.mark.parametrize(("path", "arguments", "what", "fix"), WRONG, ids=[f"{row[0]}-{row[2]}" for row in WRONG])
def test_what_is_wrong_is_named_before_anything_is_made(
    path: str, arguments: dict[str, object], what: str, fix: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        Factory("model.factory", path, arguments)
    assert what in caught.value.what
    assert fix in (caught.value.fix or "")


def test_a_model_is_made_with_its_arguments_and_the_same_on_every_rank() -> None:
    config = settings("--model.factory", "users_net:Net", "--model.arguments.width", "3", "--run.seed", "5")
    torch.manual_seed(1)
    one = build_model(config)
    torch.manual_seed(2)
    two = build_model(config)
    assert [p.shape for p in one.parameters()] == [(3, 3), (3,)]
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert build_model(settings("--model.factory", "users_net:Net.small"))[0].in_features == 2
    nested = "{factory = 'torch.nn:Linear', arguments = {in_features = 6, out_features = 1}}"
    made = build_model(settings("--model.factory", "users_net:with_scale", "--model.arguments.scale", nested))
    assert made[0].in_features == 6
    made = build_model(settings("--model.factory", "users_net:anything", "--model.arguments", "{width = 9}"))
    assert made[0].in_features == 9


def test_what_is_no_model_optimizer_or_schedule_is_refused() -> None:
    for path, what in (("users_net:number", "returned a int, not"), ("users_net:frozen", "without a parameter that")):
        with pytest.raises(ConfigError, match=what):
            build_model(settings("--model.factory", path))
    model = nn.Linear(2, 1)
    plain = settings()
    with pytest.raises(ConfigError, match=r"optim\.arguments: torch\.optim:SGD has no argument 'momentun'") as caught:
        make_optimizer(model, settings("--optim.factory", "torch.optim:SGD", "--optim.arguments.momentun", "0.9"))
    assert "momentum" in (caught.value.fix or "")
    with pytest.raises(ConfigError, match="returned a list, not a"):
        make_optimizer(model, settings("--optim.factory", "users_net:a_list"))
    optimizer = make_optimizer(model, plain)
    with pytest.raises(ConfigError, match="follows a metric"):
        make_scheduler(optimizer, settings("--optim.scheduler", "torch.optim.lr_scheduler:ReduceLROnPlateau"))
    with pytest.raises(ConfigError, match="returned a list, not a"):
        make_scheduler(optimizer, settings("--optim.scheduler", "users_net:a_list"))


def test_optimizers_and_schedules_of_others_go_on_where_they_were() -> None:
    words = ["--optim.factory", "users_net:of_model", "--optim.lr", "0.5", "--optim.arguments.momentum", "0.9"]
    words += ["--optim.scheduler", "torch.optim.lr_scheduler:OneCycleLR", "--trainer.steps", "20"]
    words += ["--optim.scheduler_arguments", "{max_lr = 0.5, total_steps = 20}"]
    config = settings(*words)

    def fresh() -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        optimizer = make_optimizer(nn.Linear(2, 1), config)
        return optimizer, make_scheduler(optimizer, config)

    def rates(
        optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler, count: int
    ) -> list[float]:
        found = []
        for _ in range(count):
            optimizer.step()
            schedule.step()
            found += [optimizer.param_groups[0][key] for key in ("lr", "momentum")]
        return found

    straight, first, second = fresh(), fresh(), fresh()
    expected = rates(*straight, 12)
    rates(*first, 5)
    load_scheduler_state(second[1], scheduler_state(first[1]))
    assert rates(*second, 7) == expected[10:]


def test_a_loss_is_found_computed_or_refused() -> None:
    x, y = torch.ones(4, 2), torch.zeros(4, 2)
    model = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=r"returned a tensor of shape \(4, 2\), and no loss"):
        build_loss(settings("--model.factory", "users_net:Net.small"))(model, [x])
    words = ["--model.factory", "users_net:Net.small", "--model.loss"]
    by_class = build_loss(settings(*words, "torch.nn:MSELoss"))(model, (x, y))
    by_function = build_loss(settings(*words, "users_net:half_square", "--model.loss_arguments.weight", "2.0"))
    assert float(by_function(model, {"input": x, "labels": y}).detach()) == pytest.approx(float(by_class.detach()))
    with pytest.raises(ConfigError, match="needs a target") as caught:
        split_target({"input": x})
    assert "labels" in (caught.value.fix or "")
    with pytest.raises(ConfigError, match="has no argument 'weigth'"):
        check_factories(settings(*words, "users_net:half_square", "--model.loss_arguments.weigth", "2.0"))
    for output in ({"loss": x.sum()}, type("Output", (), {"loss": x.sum()})(), x.sum()):
        assert float(loss_in(output)) == 8
    assert size_of({"ids": torch.zeros(3, 5, dtype=torch.int64)}) == 15
    assert size_of((torch.zeros(3, 5), torch.zeros(3))) == 3


def test_arguments_are_joined_key_by_key_and_written_back(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text(
        textwrap.dedent("""
            [model]
            factory = "users_net:Net"
            [model.arguments]
            width = 3
            name = "8"
            config = {"odd key" = [1, 2.5, true], inner = {a = "x", b = 1}}
        """)
    )
    environ = {"OUTLAST_MODEL_ARGUMENTS": "{width = 1, depth = 2}"}
    words = ["--model.arguments.config.inner.b=2", "--model.arguments.path", "a/b.txt", "--model.arguments.on", "true"]
    config = load(Config, file, environ, split_overrides(words)[1])
    expected = {
        "width": 3,
        "depth": 2,
        "name": "8",
        "config": {"odd key": [1, 2.5, True], "inner": {"a": "x", "b": 2}},
        "path": "a/b.txt",
        "on": True,
    }
    assert config.model.arguments == expected
    (tmp_path / "again.toml").write_text(to_toml(config, explain=True))
    assert load(Config, tmp_path / "again.toml", {}) == config
    reordered = load(Config, tmp_path / "again.toml", {}, {"model.arguments": "{width = 3}"})
    assert saved_settings(reordered) == saved_settings(config)


@pytest.mark.parametrize(
    ("words", "error", "match"),
    [
        (["--model.arguments.width", "3"], OutOfRange, "model.factory = None"),
        (["--model.factory", "a:b", "--model.layers", "3"], OutOfRange, "model.layers = 3"),
        (["--model.factory", "a:b", "--model.arguments", "3"], ConfigError, "is not a table"),
        (["--model.factory", "a:b", "--model.arguments.day", "2026-01-01"], ConfigError, "a date or time"),
        (["--optim.factory", "a:b", "--optim.beta2", "0.5"], OutOfRange, "optim.beta2"),
        (["--optim.factory", "a:b", "--comm.target", "update"], OutOfRange, "optim.factory"),
        (["--optim.scheduler_arguments.steps", "3"], OutOfRange, "optim.scheduler"),
        (["--data.form", "transformers"], OutOfRange, "data.form"),
        (["--model.argumnets.width", "3"], UnknownKey, "no setting"),
    ],
)
def test_settings_that_do_not_go_together(words: list[str], error: type[ConfigError], match: str) -> None:
    with pytest.raises(error, match=match):
        settings(*words)


def test_validate_and_a_start_find_what_is_wrong(tmp_path: Path, beside: Path) -> None:
    file = beside / "model.toml"
    file.write_text(
        f'[run]\ndir = "{tmp_path / "run"}"\n[model]\nfactory = "users_net:Net"\narguments = {{widht = 3}}\n'
    )
    for words in (["config", "validate", file], ["train", file]):
        done = outlast(*words, check=2)
        assert "did you mean 'width'?" in done.stderr
    assert not (tmp_path / "run").exists()
    file.write_text(file.read_text().replace("widht", "width"))
    assert outlast("config", "validate", file).stdout.endswith("valid\n")


def test_the_config_files_folder_is_searched_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    search_beside(tmp_path / "c.toml")
    search_beside(tmp_path / "c.toml")
    assert sys.path.count(str(tmp_path)) == 1
    assert sys.path[-1] == str(tmp_path)
