"""What the actions of ``outlast ckpt`` share: their URL argument, and how lines, JSON, sizes and times are printed."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any

import tyro
from rich import markup
from rich.console import Console
from rich.padding import Padding
from rich.table import Column, Table

from outlast.plain_text import plain_text

Url = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="URL")]


@dataclass(frozen=True, kw_only=True)
class Action(ABC):
    """One ``outlast ckpt ACTION``; tyro fills its fields."""

    @abstractmethod
    def run(self) -> int:
        """Do it and print what was found or done; returns the exit status.

        Raises:
            OutlastError: it could not be done; printed without a traceback.
        """


def print_line(console: Console, text: str) -> None:
    """A line as it is, never wrapped, so that paths can be copied from it."""
    console.print(plain_text(text), soft_wrap=True, markup=False, highlight=False)


def escape(text: str) -> str:
    """A text for a table as it is: no markup, and control characters made visible."""
    return markup.escape(plain_text(text))


def print_rows(console: Console, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table, or where it is too wide each row as a block: the name, which is never broken, and below it the rest.

    Args:
        console: to print on.
        heads: of the columns; the first is that of the names.
        rows: their cells, as they are.
    """
    table = Table(*(Column(head, no_wrap=True) for head in heads), box=None)
    for row in rows:
        table.add_row(*map(escape, row))
    wide = console.options.update(width=1 << 20)
    if console.measure(table, options=wide).maximum <= console.width:
        console.print(table)
        return
    for name, *cells in rows:
        print_line(console, name)
        told = [f"{head} {cell}" for head, cell in zip(heads[1:], cells, strict=True) if cell]
        console.print(Padding(escape("; ".join(told)), (0, 0, 0, 4)), highlight=False)


def print_json(value: Any) -> None:
    """JSON on standard output, for programs."""
    print(json.dumps(value, indent=1))


def finite(value: Any) -> Any:
    """The same value with NaN and infinities, which JSON lacks, as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def size(count: float) -> str:
    """Bytes for people: ``17.5 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def shape_text(shape: tuple[int, ...]) -> str:
    """``48×144``; ``scalar`` for no dimensions."""
    return "×".join(map(str, shape)) or "scalar"


def rank_text(rank: int | None) -> str:
    """The rank that a tensor belongs to; ``all`` for one that is replicated."""
    return "all" if rank is None else str(rank)


def rank_ranges(ranks: tuple[int, ...]) -> str:
    """``0-3, 8``; a dash for none."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][1] == rank - 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) or "-"


def time_text(t: float | None) -> str:
    """Local time of seconds since the epoch; empty for None."""
    return datetime.fromtimestamp(t).isoformat(" ", "seconds") if t is not None else ""
