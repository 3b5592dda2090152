"""What a node can do is measured on this one; what fails or hangs is told."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from outlast.diagnostics.probes.node_test import NodeTest, _within, self_test


def test_this_node_is_well_and_nothing_is_left_behind(tmp_path: Path) -> None:
    found = self_test(tmp_path, limit_s=60.0)
    assert found.reasons == ()
    assert found.compute_flops is not None
    assert found.compute_flops > 1e7
    assert found.memory_bytes_s is not None
    assert found.memory_bytes_s > 1e7
    assert found.disk_bytes_s is not None
    assert found.disk_bytes_s > 1e3
    assert not os.listdir(tmp_path)
    assert NodeTest.from_json(json.loads(json.dumps(found.as_json()))) == found


def test_a_disk_that_is_not_there(tmp_path: Path) -> None:
    found = self_test(tmp_path / "gone", limit_s=60.0)
    assert found.disk_bytes_s is None
    assert found.memory_bytes_s is not None
    (reason,) = found.reasons
    assert reason.startswith("disk: [Errno 2]")


def test_a_part_that_hangs_is_left_behind() -> None:
    go_on = threading.Event()
    assert _within(lambda: float(go_on.wait()), 0.05) == (None, "no answer within 0.05 s")
    go_on.set()


@pytest.mark.parametrize("raw", [None, 3, {"compute_flops": "x"}, {"reasons": 5}])
def test_what_is_no_result_is_refused(raw: object) -> None:
    with pytest.raises((TypeError, ValueError, AttributeError)):
        NodeTest.from_json(raw)
