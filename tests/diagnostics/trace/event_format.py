"""What the description of the Trace Event Format asks of a file, as checks."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from typing import Any

KNOWN = {"X", "M", "i", "C", "s", "f"}


def check(text: str) -> list[dict[str, Any]]:
    """Fail unless ``text`` is a trace as it should be; its events."""

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is no JSON")

    whole = json.loads(text, parse_constant=refuse)
    events: list[dict[str, Any]] = whole["traceEvents"]
    slices: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    begun: dict[int, dict[str, Any]] = {}
    ended: dict[int, dict[str, Any]] = {}
    named = {(one["pid"], one.get("tid")) for one in events if one["ph"] == "M"}
    for one in events:
        assert one["ph"] in KNOWN, one
        assert isinstance(one["pid"], int), one
        assert isinstance(one["name"], str), one
        assert one["name"], one
        if one["ph"] == "M":
            assert one["name"] in ("process_name", "thread_name", "process_sort_index", "thread_sort_index")
            assert len(one["args"]) == 1
            continue
        assert isinstance(one["ts"], int), one
        assert one["ts"] >= 0, one
        if one["ph"] == "C":
            assert (one["pid"], None) in named, one
            assert all(isinstance(value, (int, float)) and math.isfinite(value) for value in one["args"].values()), one
            continue
        thread = (one["pid"], one["tid"])
        assert thread in named, one
        if one["ph"] == "X":
            assert isinstance(one["dur"], int), one
            assert one["dur"] > 0, one
            slices[thread].append((one["ts"], one["ts"] + one["dur"]))
        elif one["ph"] in "sf":
            ids = begun if one["ph"] == "s" else ended
            assert one["id"] not in ids, one
            ids[one["id"]] = one
        else:
            assert one["s"] in "tpg", one
    for spans in slices.values():
        assert spans == sorted(spans, key=lambda span: (span[0], -span[1]))
        open_ends: list[int] = []
        for begin, end in spans:  # they nest, or do not overlap
            while open_ends and open_ends[-1] <= begin:
                open_ends.pop()
            assert not open_ends or end <= open_ends[-1], (begin, end, open_ends)
            open_ends.append(end)
    assert begun.keys() == ended.keys()
    for number, here in begun.items():
        there = ended[number]
        assert (here["name"], here["cat"]) == (there["name"], there["cat"])
        assert here["ts"] <= there["ts"]
        assert there["bp"] == "e"
        for point in (here, there):
            inside = slices[point["pid"], point["tid"]]
            assert any(low <= point["ts"] < high for low, high in inside), point
    return events
