"""What a step would take with each method on a link that is not there yet: the model of ``compressor = "auto"``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from outlast.comm.auto.policy import Link, Timing, candidate, candidates, codec_s_per_entry, predict, wire_s
from outlast.comm.config import CommConfig
from outlast.config import require

METHODS = (
    *candidates(CommConfig(compressor="auto", target="gradient")),
    *candidates(CommConfig(compressor="auto", target="update"))[1:],
)
"""Dense first; then those that ``compressor = "auto"`` chooses from. docs/compression.md has their cost in loss."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """One method on one link."""

    method: str
    wire_bytes: int
    """Sent over the link in a step."""
    codec_s: float
    """Of encode and decode in a step, measured here."""
    wire_s: float
    """Of the link in a step, hidden behind backward or not."""
    step_s: float
    """A step as predicted: computation, codec, and what of ``wire_s`` backward does not hide."""


def forecast(
    numel: int,
    nodes: int,
    link: Link,
    timing: Timing,
    *,
    device: torch.device | None = None,
    bucket_numel: int = 25 * 2**18,
    methods: Sequence[CommConfig] = METHODS,
) -> list[Forecast]:
    """What a step takes with each method; measures the codecs on this machine, for about a second each.

    The ranks of a node are taken to average among themselves first (``ranks_per_node``, or NCCL's own rings), so that a
    node sends each message once. Gradients are fp32, in buckets that become ready one after the other; all entries
    are compressed.

    Args:
        numel: trainable parameters.
        nodes: that exchange over ``link``, at least 2.
        link: of each node.
        timing: of a step on one node.
        device: where gradients are; the CPU if None.
        bucket_numel: entries of a bucket; the default is DDP's 25 MiB.

    Raises:
        OutOfRange: a number that is not allowed.
    """
    require(numel >= 1, "parameters", numel, "1 or more")
    require(nodes >= 2, "nodes", nodes, "2 or more")
    device = torch.device("cpu") if device is None else device
    side = max(1, round(numel**0.5))
    shapes: dict[tuple[int, ...], int] = {(side, side): max(1, round(numel / side**2))}
    buckets = -(-numel // bucket_numel)
    rows = []
    for config in methods:
        option = candidate(config, shapes, 0, nodes, buckets, codec_s_per_entry(config, nodes, device))
        step_s = predict(option, link, timing, buckets)
        rows.append(Forecast(config.describe(), option.wire_bytes, option.codec_s, wire_s(option, link), step_s))
    return rows
