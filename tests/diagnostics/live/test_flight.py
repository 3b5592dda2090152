"""torch's flight recorder, read in the middle of a program: whatever issues a collective, it is there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.helpers import clean_env, torchrun

PROGRAM = Path(__file__).with_name("flight_program.py")


def test_every_kind_of_collective_is_seen() -> None:
    said = {one["name"]: one["entries"] for one in map(json.loads, torchrun(PROGRAM).splitlines())}
    ops = {name: [op for op, *_ in entries] for name, entries in said.items()}
    assert ops["ddp"] == ["all_reduce"]
    assert said["ddp"][0][1] == 4 * (4 * 3 + 3)
    assert any("gather" in op for op in ops["fsdp"])
    assert any("reduce" in op for op in ops["fsdp"])
    assert ops["functional"] == ["all_reduce"]
    assert ops["objects"]
    assert set(ops["objects"]) <= {"all_gather", "gather", "broadcast", "all_reduce"}
    assert any("all_to_all" in op for op in ops["all to all"])
    assert said["reduce scatter"][-1][1] == 6 * 2
    assert said["another group"][-1][:2] == ["all_reduce", 24]
    assert said["another group"][-1][3] != said["ddp"][0][3], "groups are told apart"
    assert "barrier" in ops["barrier"][-1]
    assert all(completed for entries in said.values() for _, _, completed, _ in entries)


def test_without_torch_there_is_nothing_to_read() -> None:
    code = "from outlast.diagnostics.live.flight import *; import sys\n"
    code += "assert flight_counts() == {} and flight_entries(5) == [] and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=clean_env(PYTHONPATH=str(PROGRAM.parents[3])))
