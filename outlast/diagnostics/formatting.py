"""Numbers, sizes, durations and dates as text for people."""

from __future__ import annotations

import datetime
import math

UNKNOWN = "–"


def duration(seconds: float) -> str:
    """``340 ms``, ``9.12 s``, ``3 min 05 s``, ``2 h 07 min``."""
    if not math.isfinite(seconds):
        return UNKNOWN
    if seconds < 0.9995:
        return f"{seconds * 1e3:.3g} ms" if seconds < 0.1 else f"{seconds * 1e3:.0f} ms"
    if seconds < 99.5:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(size_bytes: float) -> str:
    """``1.2 kB``, ``34 MB``: powers of 1000."""
    value, unit = float(size_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB", "PB"):
        if abs(value) < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"


def count(value: float) -> str:
    """``950``, ``10.8 M``."""
    number, unit = float(value), ""
    for larger in (" k", " M", " G", " T"):
        if abs(number) < 9999.5 and not unit:
            break
        if abs(number) < 999.5:
            break
        number, unit = number / 1000, larger
    return f"{number:.3g}{unit}" if unit else f"{number:.0f}"


def share(value: float) -> str:
    """``0.3%``, ``17%``."""
    if not math.isfinite(value):
        return UNKNOWN
    return f"{value:.1%}" if abs(value) < 0.0995 else f"{value:.0%}"


def number(value: float, digits: int = 3) -> str:
    """A fixed number of decimals; a dash for NaN and infinities."""
    return f"{value:.{digits}f}" if math.isfinite(value) else UNKNOWN


def signed(value: float) -> str:
    """``+1.2``, ``-0.3``, and ``+0.0`` for what rounds to nothing."""
    return f"{round(value, 1) + 0.0:+.1f}"


def date(t: float) -> str:
    """Local time of seconds since the epoch."""
    return datetime.datetime.fromtimestamp(t).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")


def first_and_last(values: tuple[float, ...]) -> str:
    """``5.512 → 2.301``; a dash if there are no values."""
    if not values:
        return UNKNOWN
    if len(values) == 1:
        return number(values[0])
    return f"{number(values[0])} → {number(values[-1])}"
