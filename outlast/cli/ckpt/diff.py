"""``outlast ckpt diff``."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console

from outlast.cli.ckpt.output import Action, Url, finite, print_json, print_line, print_rows, rank_text, shape_text
from outlast.errors import ConfigError

if TYPE_CHECKING:
    from outlast.checkpoint.tools import Comparison

Other = Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[OTHER]")]


@dataclass(frozen=True, kw_only=True)
class Diff(Action):
    """Compare two steps, tensor by tensor, bit for bit. Exit status 0 if they are equal, 1 if not."""

    url: Url
    """The folder or fsspec URL of a run's checkpoints."""
    other: Other = None
    """The URL of the other step; without it, the same URL."""
    step: int | None = None
    """The step at URL; without it, the newest."""
    other_step: int | None = None
    """The other step; without it, the newest at OTHER."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        """Compare them."""
        from outlast.checkpoint import tools

        if self.other is None and self.other_step is None:
            raise ConfigError("there is nothing to compare with", "give a second URL, or --other-step, or both")
        other = self.url if self.other is None else self.other
        comparison = tools.diff(self.url, other, self.step, self.other_step)
        if self.json:
            print_json({"equal": comparison.equal, **finite(dataclasses.asdict(comparison))})
        else:
            _print(comparison, Console())
        return 0 if comparison.equal else 1


def _print(comparison: Comparison, console: Console) -> None:
    print_line(console, f"a: {comparison.url_a}, {comparison.world_size_a} ranks")
    print_line(console, f"b: {comparison.url_b}, {comparison.world_size_b} ranks")
    if comparison.tensors:
        heads = ("tensor", "rank", "differs in", "a", "b", "elements", "max |a-b|", "relative L2")
        print_rows(console, heads, _tensors(comparison))
    if comparison.values:
        print_rows(console, ("value", "rank", "differs in", "a", "b"), _values(comparison))
    equal = f"{len(comparison.equal_tensors)} tensors and {len(comparison.equal_values)} values"
    unequal = f"{len(comparison.tensors)} tensors and {len(comparison.values)} values differ"
    console.print(f"equal: all {equal}" if comparison.equal else f"{unequal}, {equal} are equal")


def _tensors(comparison: Comparison) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for tensor in comparison.tensors:
        amounts = ("", "", "")
        if tensor.differing is not None and tensor.shape_a is not None:
            count = f"{tensor.differing} of {math.prod(tensor.shape_a)}"
            amounts = (count, f"{tensor.max_abs:.3g}", f"{tensor.relative_l2:.3g}")
        a, b = _tensor_text(tensor.shape_a, tensor.dtype_a), _tensor_text(tensor.shape_b, tensor.dtype_b)
        rows.append((tensor.name, rank_text(tensor.rank), tensor.kind, a, b, *amounts))
    return rows


def _values(comparison: Comparison) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for value in comparison.values:
        a = "" if value.kind == "only in b" else _short(value.a)
        b = "" if value.kind == "only in a" else _short(value.b)
        rows.append((value.name, rank_text(value.rank), value.kind, a, b))
    return rows


def _tensor_text(shape: tuple[int, ...] | None, dtype: str | None) -> str:
    return "" if shape is None else f"{shape_text(shape)} {dtype}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
