"""``outlast``, on a node whose clock is ``CLOCK_SHIFT_S`` seconds ahead, as torchelastic reads it."""

from __future__ import annotations

import datetime as real
import os

from torch.distributed.elastic.rendezvous import dynamic_rendezvous

from outlast.cli import main as outlast_main
from outlast.launch import node_clocks


class Shifted(real.datetime):
    """The time of day on that node."""

    @classmethod
    def now(cls, tz: real.tzinfo | None = None) -> real.datetime:  # type: ignore[override]
        return real.datetime.now(tz) + real.timedelta(seconds=float(os.environ["CLOCK_SHIFT_S"]))


def main() -> int:
    for module in (dynamic_rendezvous, node_clocks):
        module.datetime = Shifted  # type: ignore[attr-defined]
    return outlast_main()
