"""What is seen of a program's collectives under ``outlast launch``, whoever issues them."""

from __future__ import annotations

import json
from pathlib import Path

from tests.helpers import clean_env, outlast

SCRIPT = Path(__file__).with_name("all_collectives.py")


def test_each_is_in_the_ring_with_its_group(tmp_path: Path) -> None:
    words = ["launch", "--nproc-per-node", "2", "--run-dir", tmp_path / "run", "--max-restarts", "0", SCRIPT]
    outlast(*words, tmp_path / "found", env=clean_env())
    for rank in range(2):
        found = json.loads((tmp_path / f"found_{rank}").read_text())
        assert "all_reduce" in found["ddp"]
        assert found["all_to_all"] == ["all_to_all"]
        assert set(found["objects"]) == {"all_gather"}
        assert found["functional"] == found["compiled"] == ["all_reduce"]
        assert any("gather" in op for op in found["fsdp2"])
        assert any("reduce_scatter" in op or "all_reduce" in op for op in found["fsdp2"])
        assert "all_reduce" in found["hsdp"]
        assert found["barrier"][-1] == "barrier"
        assert found["p2p"] == [], "torch does not record it over gloo; only who waits in one is seen"
