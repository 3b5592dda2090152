"""Classes of a program, at the top level of a module, as a checkpoint needs them."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from enum import Enum, Flag, IntEnum, IntFlag, StrEnum
from typing import NamedTuple

import torch


class Colour(Enum):
    RED = "rot"
    BLUE = (0, 0, 255)


class Priority(IntEnum):
    LOW = 1
    HIGH = 2


class Phase(StrEnum):
    TRAIN = "train"


class OldPhase(str, Enum):  # noqa: UP042  the way it was written before StrEnum
    EVAL = "eval"


class Parts(Flag):
    MODEL = 1
    DATA = 2


class Bits(IntFlag):
    ONE = 1
    FOUR = 4


class Place(NamedTuple):
    row: int
    column: int = 0


Moments = namedtuple("Moments", ["mean", "square"])


@dataclass
class Settings:
    lr: float = 0.1


class Text(str):
    """No plain string."""


class Table(dict):  # type: ignore[type-arg]
    """No plain dictionary."""


class FarPlace(Place):
    """A named tuple with more to it."""


class Mine(torch.Tensor):
    """A class of tensors without a ``__torch_dispatch__`` of its own."""
