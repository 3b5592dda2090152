"""The rows of the table in docs/checkpointing.md: examples of what is stored, and of what is refused."""

from __future__ import annotations

import datetime
import decimal
import functools
import math
import random
from collections import Counter, OrderedDict, UserDict, defaultdict, deque
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import nn

from tests.checkpoint.state.storable import (
    Bits,
    Colour,
    FarPlace,
    Mine,
    Moments,
    OldPhase,
    Parts,
    Phase,
    Place,
    Priority,
    Settings,
    Table,
    Text,
)


def with_metadata() -> Any:
    state = OrderedDict(weight=torch.ones(2), bias=torch.zeros(1))
    state._metadata = OrderedDict({"": {"version": 1}, "norm": {"version": 2}})  # type: ignore[attr-defined]
    return state


STORED: dict[str, list[Any]] = {
    "`None`, `bool`, `int`, `float`, `str`": [
        None,
        True,
        0,
        -1,
        2**63,
        -(2**200),
        10**5000,
        0.1,
        -0.0,
        math.nan,
        math.inf,
        -math.inf,
        5e-324,
        "",
        "ü\0\n\ud800",
    ],
    "`complex`, `bytes`, `bytearray`": [1 - 2j, complex(-0.0, math.nan), b"", b"\0\xff", bytearray(b"abc")],
    "`list`, `tuple`, `set`, `frozenset`, `deque`, `range`": [
        [],
        [1, [2.0, ("a", None)]],
        (),
        (1, (2,)),
        {3, "a", (1, 2)},
        set(),
        frozenset({1.5}),
        deque([1, 2], 5),
        deque(["x"]),
        range(3, 30, 3),
        {True, 2.0},
    ],
    "`dict`, `OrderedDict`, `Counter`, `defaultdict`": [
        {},
        {"z": 1, "a": 2, "m": {"z": 1, "b": []}},
        OrderedDict(z=1, a=2),
        OrderedDict(),
        Counter({5: 1, 3: 2}),
        defaultdict(list, {"b": [1], "a": []}),
        defaultdict(None, x=1),
        {"a": OrderedDict(b=Counter("hello"))},
        {"outlast_float": 1},
        {"outlast_tuple": [1]},
        {"outlast_type": "set", "value": [1]},
        {"outlast_container": 5},
        nn.BatchNorm1d(3).state_dict()._metadata,  # type: ignore[attr-defined]
    ],
    "keys": [
        {5: "a", "5": "b", -5: "c", "~5": "d"},
        {True: 1, False: 2, None: 3, 1.5: 4},
        {(1, "a"): 1, (): 2, ((1,),): 3},
        {Colour.RED: 1, Priority.HIGH: 2, Phase.TRAIN: 3},
        {np.int64(5): 1, np.float32(0.5): 2},
        {b"k": 1, 1j: 2},
        {"": 1},
        {"k" * 300: 1, "k" * 301: 2},
        {"ü" * 100: 1},
        {2**70: 1, 10**400: 2, 10**5000: 3, (10**5000,): 4},
        {torch.float32: 1, torch.Size([2]): 2},
        {frozenset({1, 2}): 1, Place(1, 2): 2, range(3): 3, torch.device("cpu"): 4},
        {"a/b": 1, "..": 2, "zarr.json": 3},
        {"\ud800": 1},
    ],
    "`Enum`, `IntEnum`, `StrEnum`, `Flag`": [
        Colour.RED,
        Colour.BLUE,
        Priority.HIGH,
        Phase.TRAIN,
        OldPhase.EVAL,
        Parts.MODEL,
        Parts.MODEL | Parts.DATA,
        Parts(0),
        Bits.ONE | Bits.FOUR,
        [Colour.RED],
        {"a": (Priority.LOW,)},
    ],
    "named tuples": [Place(1), Place(2, 3), Moments([1.5], {"a": Place(0)}), [Place(1), (1, 0)]],
    "NumPy scalars and arrays": [
        np.float64(0.1),
        np.float32(-0.0),
        np.int64(5),
        np.longlong(5),
        np.bool_(True),
        np.complex64(1j),
        np.str_("ü"),
        np.bytes_(b"ab"),
        np.datetime64("2026-01-02"),
        np.float16(math.inf),
        np.arange(6.0).reshape(2, 3),
        np.zeros((0, 3), np.int8),
        np.array(5),
        np.arange(4, dtype=">i4"),
        np.array(["a", "bc"]),
        np.arange(9)[::2],
        np.asfortranarray(np.arange(6).reshape(2, 3)),
        np.array([math.nan, -0.0]),
        np.ones(2, np.longdouble),
    ],
    "`torch.Size`, `dtype`, `device`, `layout`, `memory_format`": [
        torch.Size([2, 3]),
        torch.Size([]),
        torch.bfloat16,
        torch.float8_e8m0fnu,
        torch.device("cpu"),
        torch.device("cuda", 3),
        torch.strided,
        torch.sparse_csr,
        torch.channels_last,
    ],
    "random-number states": [np.random.get_state(), random.getstate(), np.random.default_rng(5).bit_generator.state],
    "`torch.Tensor`": [
        torch.ones(2),
        torch.tensor(0.1),
        torch.zeros(0, 3),
        torch.ones(1).expand(4),
        torch.ones(3, 4).T,
        torch.tensor([1j]).conj(),
    ],
    "tensors in containers": [
        [torch.ones(2), torch.zeros(1)],
        (torch.ones(2), "a", 5),
        [[torch.ones(1)], [{"z": torch.ones(1), 0: 1}]],
        {"z": torch.ones(1), "a": 1, "m": torch.zeros(1), 0: {}, None: torch.ones(1)},
        OrderedDict(b=torch.ones(1), a=[2]),
        defaultdict(dict, {"x": {"y": torch.ones(1)}}),
        deque([torch.ones(1), torch.zeros(1)], 3),
        Moments(torch.ones(1), [torch.zeros(2)]),
        Counter({"a": torch.ones(1)}),
        with_metadata(),
        {
            (1, 2): torch.ones(1),
            "k" * 400: torch.zeros(1),
            "": torch.ones(3),
            Colour.RED: torch.ones(2),
            0.5: torch.ones(1),
        },
        {"k" * 300: {"k" * 300: torch.ones(1), 10**5000: torch.ones(2), "n": Place(1)}},
        {"outlast_container": torch.ones(1), "~5": 5, 5: "~5"},
        {"lr": torch.tensor(0.1), "betas": (torch.tensor(0.9), 0.999)},
    ],
}
"""By the row of the table: what comes back exactly."""

CHANGED: dict[str, list[tuple[Any, Any]]] = {
    "`Parameter`, and subclasses of `Tensor` that store their own elements": [
        (nn.Parameter(torch.ones(2)), torch.ones(2)),
        (torch.ones(2).as_subclass(Mine), torch.ones(2)),
        ([nn.Parameter(torch.ones(2), requires_grad=False)], [torch.ones(2)]),
    ],
}
"""By the row of the table: what is stored, and what comes back."""


def enum_in_a_function() -> Any:
    from enum import Enum

    class Inner(Enum):
        A = 1

    return Inner.A


def itself() -> Any:
    tree: dict[str, Any] = {"t": torch.ones(1)}
    tree["again"] = tree
    return tree


def deep(inner: Any) -> Any:
    for _ in range(200):
        inner = [inner]
    return inner


REFUSED: dict[str, list[tuple[Any, str]]] = {
    "objects of any other class": [
        (Settings(), "storable.Settings"),
        (datetime.date(2026, 1, 2), "datetime.date"),
        (decimal.Decimal("0.1"), "decimal.Decimal"),
        (Path("x"), "pathlib"),
        (len, "builtin_function"),
        (functools.partial(int), "functools.partial"),
        (nn.Linear(1, 1), r"state_dict\(\)"),
        (int, "builtins.type"),
        (torch.Generator(), "Generator"),
        (MappingProxyType({"a": 1}), "mappingproxy"),
        (UserDict(a=1), "UserDict"),
        (defaultdict(lambda: 5, a=1), "factory"),
        (enum_in_a_function(), "<locals>"),
        (Bits(2), "no names"),
    ],
    "subclasses of what can be stored": [
        (Text("a"), r"str\(value\)"),
        (torch.__version__, r"TorchVersion.*"),
        (Table(a=1), r"dict\(value\)"),
        (FarPlace(1), "FarPlace"),
        (np.ma.masked_array([1.0]), "MaskedArray"),
        ({Text("k"): 1}, "Text"),
        ({Text("k"): torch.ones(1)}, "Text"),
    ],
    "NumPy arrays of objects or fields, and more than 8 MiB": [
        (np.array([None]), "dtype object"),
        (np.zeros(2, [("a", "f4")]), "dtype"),
        (np.zeros(9 << 20, np.uint8), "from_numpy"),
        (bytes(9 << 20), "frombuffer"),
    ],
    "tensors in sets or keys, and NaN twice as a key of tensors": [
        ({torch.ones(1)}, "set or a key"),
        ({torch.ones(1): 5}, "set or a key"),
        ({math.nan: torch.ones(1), float("nan"): torch.ones(1)}, "cannot be told apart"),
        (frozenset({(torch.ones(1),)}), "set or a key"),
    ],
    "what contains itself, or is deeper than 100 levels": [
        (itself(), "contains itself"),
        (deep(1), "deeper than 100"),
        (deep(torch.ones(1)), "nested too deep"),
    ],
}
"""By the row of the table: what is refused, and a word of the message."""
