"""The settings that a checkpoint was trained with, and what a run that resumes it may change."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from outlast.config import to_toml_value
from outlast.errors import StateMismatch
from outlast.trainer.config import Config

SECTIONS = ("model", "data", "optim", "trainer", "comm")
"""Their settings, and ``run.seed``, decide what a run computes; those of other sections only where and how it runs."""


def saved_settings(config: Config) -> dict[str, Any]:
    """The settings that are saved with a checkpoint, by dotted name, as JSON values."""
    settings: dict[str, Any] = {"run.seed": config.run.seed}
    for section in SECTIONS:
        part = getattr(config, section)
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            settings[f"{section}.{field.name}"] = _saved(value)
    return settings


def _saved(value: Any) -> Any:
    if isinstance(value, Mapping):  # in one order, however the sources gave it
        return to_toml_value(_sorted(value))
    return list(value) if isinstance(value, tuple) else value


def _sorted(value: Any) -> Any:
    return {key: _sorted(value[key]) for key in sorted(value)} if isinstance(value, Mapping) else value


def changed_settings(saved: Mapping[str, Any], config: Config, step: int) -> list[str]:
    """What differs from the settings that step ``step`` was trained with, as ``optim.lr: 0.001 -> 0.0005``.

    All of these take effect from the next step on. A setting that one of the two versions does not know is left out.

    Raises:
        StateMismatch: one that may not change differs. The text and the state of error feedback are not judged here:
            whether they fit is seen from the state itself.
    """
    now = saved_settings(config)
    differing = [name for name in now if name in saved and saved[name] != now[name]]
    lines = {name: f"{name}: {_text(name, saved)} -> {_text(name, now)}" for name in differing}
    fixed = [name for name in differing if name == "run.seed" or name.startswith("model.")]
    if "optim.beta1" in differing and config.comm.target == "update" and saved.get("comm.target") == "update":
        # Without a first moment the direction's state has no slot for one.
        fixed += ["optim.beta1"] if bool(saved["optim.beta1"]) != bool(now["optim.beta1"]) else []
    if fixed:
        raise StateMismatch(
            f"step {step} was trained with other settings, which may not change: "
            + "; ".join(lines[name] for name in fixed),
            "resume with the saved values, or start a new run with --run.dir OTHER",
        )
    return list(lines.values())


def _text(name: str, settings: Mapping[str, Any]) -> str:
    value = settings[name]
    if name.endswith("arguments"):  # saved as TOML
        return str(value)
    return "not set" if value is None else to_toml_value(value)
