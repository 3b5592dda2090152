"""The table of what other tools say is the one that was measured."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.beside import Answer, table
from benchmarks.beside_program import KINDS


def test_the_table_is_that_of_the_figures(root: Path) -> None:
    found = json.loads((root / "docs" / "beside.json").read_text())
    answers = [
        Answer(**{key: tuple(one[key]) if key == "ranks" else one[key] for key in Answer.__dataclass_fields__})
        for one in found["answers"]
    ]
    page = (root / "docs" / "syndromes.md").read_text()
    assert table(answers) in page
    assert found["date"] in page
    for name in ("torch", "traceml-ai"):
        assert f"{name} {found['versions'][name]}" in page
    assert {one.fault for one in answers} == set(KINDS)
    assert all(one.named == "rank 1" for one in answers if one.tool == "outlast")
