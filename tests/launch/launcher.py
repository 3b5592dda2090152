"""A launcher as a :class:`tests.forked.Job`: launch() with what its argument says, which is JSON; prints errors as the
CLI does."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from outlast.errors import OutlastError
from outlast.launch import LaunchConfig, LaunchFlags, LaunchSpec, launch


def main() -> int:
    """The exit status."""
    told = json.loads(sys.argv[1])
    spec = LaunchSpec(
        command=tuple(told["command"]),
        run_dir=Path(told["run_dir"]),
        flags=LaunchFlags(**told.get("flags", {})),
        config=LaunchConfig(**told.get("config", {})),
        obeys_notice=told.get("obeys_notice", False),
    )
    try:
        launch(spec)
    except OutlastError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0
