"""Noting point-to-point operations over gloo changes no result, and torch.compile does not look into it."""

from __future__ import annotations

import json
from pathlib import Path

from tests.helpers import torchrun

PROGRAM = Path(__file__).with_name("point_to_point_program.py")


def test_who_waits_in_what() -> None:
    said = json.loads(torchrun(PROGRAM).splitlines()[-1])
    assert said["after"] == said["before"]
    assert said["before"][0] == said["before"][1]
    assert said["seen"] == [["recv from 0", "p2p 0", 8]]
    before, after = said["frames"]
    assert after <= before + 1
