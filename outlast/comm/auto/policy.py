"""``compressor = "auto"``: whether to compress at all, and how, from what was measured on this job's own links.

Compression pays on slow links only: Agarwal et al. (arXiv 2103.00543) found that it paid in six of more than 200
set-ups. So the first steps are sent dense and timed, and links and codecs are measured. Among dense and some candidates
whose cost in loss is known to be small, the one with the shortest predicted step is taken; dense, unless another is
clearly shorter.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from outlast.comm.config import CommConfig, two_phase
from outlast.comm.feedback.from_config import feedback_from_config
from outlast.comm.transport.communicator import Communicator, slowest

DENSE_STEPS = 4
"""Steps sent dense before the choice; the first of them is not timed."""
WORTH = 0.95
"""Dense stays unless a candidate's predicted step takes less than this share of dense's."""
_SAMPLE = 1 << 20
_PROBE_S = 0.05
_CANDIDATES: dict[str, tuple[dict[str, object], ...]] = {
    "update": (
        {"compressor": "topk", "density": 0.02, "values": "int8"},
        {"compressor": "topk", "density": 0.01, "values": "int8"},
    ),
    "gradient": (
        {"compressor": "int8", "transport": "two-phase"},
        {"compressor": "int4", "transport": "two-phase"},
    ),
}
"""By target: methods whose cost in loss is small, see docs/compression.md."""


@dataclass(frozen=True, slots=True)
class Link:
    """How fast the slowest rank's link moves messages."""

    latency_s: float
    """Of one small all-gather."""
    bytes_per_s: float
    """Bytes that a rank sends a second, in an all-gather."""


@dataclass(frozen=True, slots=True)
class Timing:
    """A dense step, the slowest rank's."""

    step_s: float
    """Without the wait for the exchange at the end."""
    hidden_s: float
    """From the first ready bucket to the last, which may hide an exchange."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A method to choose from."""

    config: CommConfig
    wire_bytes: int
    """Sent by a rank in a step."""
    collectives: int
    """In a step."""
    codec_s: float
    """In a step, on the slowest rank; not counted as hidden, because it takes the same cores or the same device."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen, and why."""

    config: CommConfig
    why: str
    """One line."""


def candidate(
    config: CommConfig,
    shapes: Mapping[tuple[int, ...], int],
    whole_numel: int,
    n: int,
    buckets: int,
    codec_s_per_entry: float,
) -> Candidate:
    """One method for what :func:`wire_bytes` describes, with its codec's measured speed."""
    numel = sum(count * torch.Size(shape).numel() for shape, count in shapes.items())
    rounds = 1 if config.transport == "all-gather" and config.compressor != "dense" else 2
    sent = wire_bytes(config, shapes, whole_numel, n)
    return Candidate(config, sent, rounds * buckets, codec_s_per_entry * numel)


def wire_s(option: Candidate, link: Link) -> float:
    """Seconds of the link in a step, hidden behind backward or not."""
    return option.collectives * link.latency_s + option.wire_bytes / link.bytes_per_s


def candidates(config: CommConfig) -> list[CommConfig]:
    """What ``compressor = "auto"`` may become; dense first."""
    dense = replace(config, compressor="dense")
    return [dense, *(replace(config, **settings) for settings in _CANDIDATES[config.target])]  # type: ignore[arg-type]


def predict(option: Candidate, link: Link, timing: Timing, buckets: int) -> float:
    """Seconds a step: compute, codec, and the wire time that backward cannot hide, at least the last bucket's."""
    on_link_s = wire_s(option, link)
    exposed_s = max(on_link_s - timing.hidden_s, on_link_s / max(1, buckets))
    return timing.step_s + option.codec_s + exposed_s


def choose(options: Sequence[Candidate], link: Link, timing: Timing, buckets: int) -> Choice:
    """The option with the shortest predicted step; the first, which is dense, unless another is clearly shorter."""
    dense, *others = options
    seconds = {id(option): predict(option, link, timing, buckets) for option in options}
    best = min(others, key=lambda option: seconds[id(option)])
    measured = (
        f"links {link.bytes_per_s / 1e6:.3g} MB/s and {1e3 * link.latency_s:.2g} ms, "
        f"codec {1e3 * best.codec_s:.3g} ms, backward hides {1e3 * timing.hidden_s:.3g} ms"
    )
    figures = (
        f"{best.config.describe()} {seconds[id(best)]:.3g} s a step, dense {seconds[id(dense)]:.3g} s"
        f" ({best.wire_bytes / 1e6:.3g} of {dense.wire_bytes / 1e6:.3g} MB; {measured})"
    )
    if seconds[id(best)] < WORTH * seconds[id(dense)]:
        return Choice(best.config, f"compressing: predicted {figures}")
    return Choice(dense.config, f"staying dense: predicted {figures}")


def measure_link(communicator: Communicator, device: torch.device) -> Link:
    """Time all-gathers of growing size until one takes long enough; the slowest rank's, the same on every rank.

    A collective call; make it outside the communicator's thread. It moves a few MB.

    Raises:
        CommError: a peer died or the limit passed.
    """

    def timed(nbytes: int) -> float:
        payload = torch.zeros(nbytes, dtype=torch.uint8, device=device)
        out = torch.empty((communicator.world_size, nbytes), dtype=torch.uint8, device=device)
        communicator.run(lambda: communicator.all_gather(payload, "link probe", out), "measuring the link")
        started = time.perf_counter()
        communicator.run(lambda: communicator.all_gather(payload, "link probe", out), "measuring the link")
        return time.perf_counter() - started

    latency_s = slowest(communicator, statistics.median(timed(64) for _ in range(5)), device)
    nbytes, taken_s = 1 << 16, 0.0
    while True:
        taken_s = slowest(communicator, timed(nbytes), device)
        if taken_s > latency_s + _PROBE_S or nbytes >= 1 << 24:
            break
        nbytes *= 4
    sent = (communicator.world_size - 1) * nbytes
    return Link(latency_s, max(1.0, sent) / max(taken_s - latency_s, 1e-6))


def measure_codec(config: CommConfig, communicator: Communicator, device: torch.device) -> float:
    """Seconds an entry of one step's encode and decode, the slowest rank's; a collective call.

    Raises:
        CommError: a peer died or the limit passed.
    """
    if feedback_from_config(config) is None:
        return 0.0
    return slowest(communicator, codec_s_per_entry(config, communicator.world_size, device), device)


def codec_s_per_entry(config: CommConfig, n: int, device: torch.device) -> float:
    """Seconds an entry of one step's encode and decode among ``n`` ranks take on this device; 0 for dense."""
    feedback = feedback_from_config(config)
    if feedback is None:
        return 0.0
    g = torch.randn((1024, _SAMPLE // 1024), generator=torch.Generator().manual_seed(0)).to(device)
    local, out = feedback.start(g), torch.empty_like(g)
    replicated = feedback.new_replicated(g)
    payload = feedback.encode(local, g)
    best_s = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        payload = feedback.encode(local, g)
        # In the two-phase transport: n messages of an n-th each, and as much again.
        feedback.decode(replicated, [payload] * (2 if two_phase(config, n) else n), out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best_s = min(best_s, time.perf_counter() - started)
    return best_s / _SAMPLE


def wire_bytes(config: CommConfig, tensors: Mapping[tuple[int, ...], int], whole_numel: int, n: int) -> int:
    """Bytes that a rank sends in a step.

    Args:
        config: the method.
        tensors: how many tensors there are of each shape that is compressed.
        whole_numel: entries of tensors that never are.
        n: ranks.
    """
    feedback = feedback_from_config(config)
    dense = 2 * (n - 1) * 4 * whole_numel // n
    if feedback is None:
        numel = sum(count * torch.Size(shape).numel() for shape, count in tensors.items())
        return dense + 2 * (n - 1) * 4 * numel // n
    payload = sum(count * feedback.compressor.nbytes(shape) for shape, count in tensors.items())
    return dense + (2 * (n - 1) * payload // n if two_phase(config, n) else (n - 1) * payload)


def timing_of(steps: Sequence[tuple[float, float]], communicator: Communicator, device: torch.device) -> Timing:
    """The median of this rank's (step_s, hidden_s), of the slowest rank; a collective call."""
    step_s = statistics.median(step for step, _ in steps)
    hidden_s = statistics.median(hidden for _, hidden in steps)
    return Timing(slowest(communicator, step_s, device), slowest(communicator, hidden_s, device))


def shapes_of(tensors: Sequence[Tensor]) -> dict[tuple[int, ...], int]:
    """How many tensors there are of each shape."""
    counts: dict[tuple[int, ...], int] = {}
    for tensor in tensors:
        counts[tuple(tensor.shape)] = counts.get(tuple(tensor.shape), 0) + 1
    return counts
