"""What a step would take with each method on a link that is not there yet: the model of ``compressor = "auto"``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from outlast.comm.auto.policy import Candidate, Link, Timing, codec_s_per_entry, predict, wire_bytes
from outlast.comm.config import CommConfig, two_phase
from outlast.config import require

METHODS = (
    CommConfig(compressor="dense", target="gradient"),
    CommConfig(compressor="int8", target="gradient", feedback="ef21", transport="two-phase"),
    CommConfig(compressor="int4", target="gradient", feedback="ef21", transport="two-phase"),
    CommConfig(compressor="topk", target="update", density=0.02),
    CommConfig(compressor="topk", target="update", density=0.01),
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
        sent = wire_bytes(config, shapes, 0, nodes)
        codec_s = codec_s_per_entry(config, nodes, device) * numel
        rounds = 2 if config.compressor == "dense" or two_phase(config, nodes) else 1
        candidate = Candidate(config, sent, rounds * buckets, codec_s)
        wire_s = candidate.collectives * link.latency_s + sent / link.bytes_per_s
        rows.append(Forecast(config.describe(), sent, codec_s, wire_s, predict(candidate, link, timing, buckets)))
    return rows
