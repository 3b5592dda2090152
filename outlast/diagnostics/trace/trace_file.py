"""Writes Chrome's Trace Event Format, event by event, so that a trace of any length needs no memory.

Perfetto (https://ui.perfetto.dev) and ``chrome://tracing`` open it. All times are whole microseconds: Perfetto turns
times and durations into nanoseconds separately, and fractions of a microsecond could make a slice end after the one
that encloses it.
"""

from __future__ import annotations

import functools
import gzip
import json
import math
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from outlast.errors import DiagnosticsError


@dataclass(frozen=True, slots=True)
class Place:
    """A thread of the trace."""

    pid: int
    tid: int


class TraceFile:
    """A trace that is being written; its file appears when all of it is there.

    Args:
        path: the file; one that ends in ``.gz`` is compressed, which both viewers read.

    Raises:
        DiagnosticsError: it cannot be written; nothing is left of the attempt.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        final = path.resolve()
        self._final = final
        self._temporary = final.parent / f".{final.name[:50]}.{secrets.token_hex(4)}.tmp"
        self._separator = "\n"
        self._file: IO[str]
        self.arrows = 0
        """Arrows written so far."""
        self.events = 0
        """Events written so far."""

    def __enter__(self) -> Self:
        try:
            if self._final.name.endswith(".gz"):
                self._file = gzip.open(self._temporary, "xt", compresslevel=4, encoding="utf-8")
            else:
                self._file = self._temporary.open("x", encoding="utf-8", buffering=1 << 20)
        except OSError as error:
            raise self._refusal(error) from error
        self._file.write('{"displayTimeUnit":"ms","traceEvents":[')
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            if error is None:
                self._file.write("\n]}\n")
            self._file.close()
            if error is None:
                os.replace(self._temporary, self._final)
        except OSError as failed:
            self._temporary.unlink(missing_ok=True)
            if error is None:
                raise self._refusal(failed) from failed
        if error is not None:
            self._temporary.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.filename is None:  # of a write
                raise self._refusal(error) from error

    def process(self, pid: int, name: str) -> None:
        """Name a process; processes stand in the order of their ids."""
        self._event(f'"ph":"M","pid":{pid},"name":"process_name","args":{{"name":{_text(name)}}}')
        self._event(f'"ph":"M","pid":{pid},"name":"process_sort_index","args":{{"sort_index":{pid}}}')

    def thread(self, place: Place, name: str, order: int) -> None:
        """Name a thread, and say where it stands among those of its process."""
        at = f'"ph":"M","pid":{place.pid},"tid":{place.tid}'
        self._event(f'{at},"name":"thread_name","args":{{"name":{_text(name)}}}')
        self._event(f'{at},"name":"thread_sort_index","args":{{"sort_index":{order}}}')

    def slice(
        self, place: Place, name: str, begin_us: int, end_us: int, kind: str, args: Mapping[str, Any] | None = None
    ) -> None:
        """What a thread did from one time to another; slices of a thread nest, or do not overlap."""
        self._event(
            f'"ph":"X","pid":{place.pid},"tid":{place.tid},"ts":{begin_us},"dur":{end_us - begin_us},'
            f'"name":{_text(name)},"cat":{_text(kind)}{_args(args)}'
        )

    def instant(self, place: Place, name: str, at_us: int, kind: str, args: Mapping[str, Any] | None = None) -> None:
        """What happened on a thread at a time."""
        self._event(
            f'"ph":"i","s":"t","pid":{place.pid},"tid":{place.tid},"ts":{at_us},'
            f'"name":{_text(name)},"cat":{_text(kind)}{_args(args)}'
        )

    def counter(self, pid: int, name: str, at_us: int, value: float) -> None:
        """The value of a counter from now on; one that is not finite is left out, for JSON has no word for it."""
        if math.isfinite(value):
            self._event(f'"ph":"C","pid":{pid},"ts":{at_us},"name":{_text(name)},"args":{{"value":{value!r}}}')

    def arrow(self, name: str, begin: tuple[Place, int], end: tuple[Place, int]) -> None:
        """An arrow from inside one slice to inside another, each a thread and a time; it must not go back in time."""
        (here, from_us), (there, to_us) = begin, end
        if to_us < from_us:
            raise ValueError(f"an arrow from {from_us} µs back to {to_us} µs")
        self.arrows += 1
        common = f'"id":{self.arrows},"name":{_text(name)},"cat":"waits"'
        self._event(f'"ph":"s","pid":{here.pid},"tid":{here.tid},"ts":{from_us},{common}')
        self._event(f'"ph":"f","bp":"e","pid":{there.pid},"tid":{there.tid},"ts":{to_us},{common}')

    def _event(self, fields: str) -> None:
        self._file.write(f"{self._separator}{{{fields}}}")
        self._separator = ",\n"
        self.events += 1

    def _refusal(self, error: OSError) -> DiagnosticsError:
        return DiagnosticsError(
            f"{self.path} cannot be written: {error.strerror}", "choose another file, or make room on the disk"
        )


@functools.lru_cache(maxsize=4096)
def _text(text: str) -> str:
    return json.dumps(text)


def _args(args: Mapping[str, Any] | None) -> str:
    if not args:
        return ""
    told = {key: None if isinstance(one, float) and not math.isfinite(one) else one for key, one in args.items()}
    return f',"args":{json.dumps(told, allow_nan=False, separators=(",", ":"))}'
