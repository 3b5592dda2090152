"""The GPU benchmark runs, as a trial on the CPU; what it finds on a GPU is in docs/gpu.md."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.gpu.__main__ import PHASES, SECTIONS, main


def run(out: Path, *sections: str) -> dict[str, list[dict[str, object]]]:
    """The checks of each section."""
    only = [word for section in sections for word in ("--only", section)]
    status = main(["--out", str(out), "--device", "cpu", "--tiny", "--minutes", "12", *only])
    found = json.loads((out / "results.json").read_text())["sections"]
    failed = {name: [check for check in one["checks"] if check["passed"] is False] for name, one in found.items()}
    assert status == 0, (failed, (out / "log.txt").read_text()[-4000:])
    return {name: one["checks"] for name, one in found.items()}


def test_what_is_right_is_told(tmp_path: Path) -> None:
    found = run(tmp_path, "mutation", "recorder")
    assert [check["passed"] for check in found["mutation"]] == [True]
    assert any("50 collectives" in str(check["what"]) for check in found["recorder"])


LONG = ("company", "kernels", "runs", "snapshot", "speed")


@pytest.mark.slow
@pytest.mark.parametrize(
    "section",
    [
        pytest.param(one, marks=[pytest.mark.soak] if one in LONG else [])
        for one in SECTIONS
        if one not in ("mutation", "recorder")
    ],
)
def test_every_section(tmp_path: Path, section: str) -> None:
    assert run(tmp_path, section)[section]


def test_an_unknown_section_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), "--only", "everything"])


def test_sections_fit_their_minutes() -> None:
    assert sum(max(phase.values()) for phase in PHASES) <= 6 * 60 + 60
