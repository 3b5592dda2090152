"""Speed of the codec: every compressor's encode and decode beside a copy of the same bytes, on one thread.

    python -m benchmarks.codec [--numel 10800000] [--rounds 7] [--json FILE]

Tensors are matrices of 384 rows, as many as make up --numel; gradients are random with heavy tails. A round runs every
compressor in turn beside a copy; printed are medians over rounds of seconds per pass over the model, and the ratio to
the same round's copy with its range. Encode is error compensation whole (e += g, C(e), e -= C(e)); decode adds one
rank's message.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from outlast.comm.compressors import (
    Compressor,
    make_compressor,
)
from outlast.comm.feedback import (
    EF14,
)

ROWS = 384
COLUMNS = 1536
COMPRESSORS: dict[str, dict[str, object]] = {
    "topk 1 % fp32": {"name": "topk", "density": 0.01, "values": "fp32"},
    "topk 1 % int8": {"name": "topk", "density": 0.01, "values": "int8"},
    "topk 5 % int8": {"name": "topk", "density": 0.05, "values": "int8"},
    "block-topk 1 % int8": {"name": "block-topk", "density": 0.01, "values": "int8"},
    "randk 1 % fp32": {"name": "randk", "density": 0.01},
    "sign": {"name": "sign"},
    "int8": {"name": "int8"},
    "int4": {"name": "int4"},
    "natural": {"name": "natural"},
    "lowrank 4 fp32": {"name": "lowrank", "rank": 4},
    "gear 1 % rank 4": {"name": "gear", "density": 0.01, "rank": 4},
}


def seconds(job: Callable[[], None]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    job()
    return time.perf_counter() - started


def measure(numel: int, rounds: int) -> dict[str, dict[str, list[float] | float]]:
    """By compressor: encode_s, decode_s and copy_s of each round, and nbytes of all messages."""
    torch.set_num_threads(1)
    count = max(1, round(numel / (ROWS * COLUMNS)))
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn((ROWS, COLUMNS), generator=generator).pow_(3) for _ in range(count)]
    copies = [torch.empty_like(g) for g in grads]
    compressors: dict[str, Compressor] = {
        label: make_compressor(**settings)  # type: ignore[arg-type]
        for label, settings in COMPRESSORS.items()
    }
    found: dict[str, dict[str, list[float] | float]] = {}
    times: dict[str, dict[str, list[float]]] = {}
    states = {label: [EF14(c).start(g) for g in grads] for label, c in compressors.items()}
    for label, compressor in compressors.items():
        found[label] = {"nbytes": float(count * compressor.nbytes((ROWS, COLUMNS)))}
        times[label] = {"encode_s": [], "decode_s": [], "copy_s": []}
    for number in range(rounds + 1):
        for label, compressor in compressors.items():
            feedback = EF14(compressor)
            payloads: list[Tensor] = []

            def encode(feedback: EF14 = feedback, label: str = label, payloads: list[Tensor] = payloads) -> None:
                payloads.extend(feedback.encode(state, g) for state, g in zip(states[label], grads, strict=True))

            def decode(compressor: Compressor = compressor, payloads: list[Tensor] = payloads) -> None:
                for out, payload in zip(copies, payloads, strict=True):
                    compressor.add_to(out, payload, 0.25)

            def copy() -> None:
                for out, g in zip(copies, grads, strict=True):
                    out.copy_(g)

            measured = {"copy_s": seconds(copy), "encode_s": seconds(encode), "decode_s": seconds(decode)}
            if number:  # the first round allocates
                for key, value in measured.items():
                    times[label][key].append(value)
    for label, lists in times.items():
        found[label] |= lists
    return found


def table(found: dict[str, dict[str, list[float] | float]], numel: int) -> str:
    """The figures as an aligned table."""
    lines = [f"{'':22} {'bytes/entry':>11} {'encode':>9} {'× copy':>18} {'decode':>9} {'× copy':>18}"]
    for label, figures in found.items():
        line = f"{label:22} {float(figures['nbytes']) / numel:11.3f}"  # type: ignore[arg-type]
        for part in ("encode_s", "decode_s"):
            own, copy = figures[part], figures["copy_s"]
            assert isinstance(own, list)
            assert isinstance(copy, list)
            ratios = [a / b for a, b in zip(own, copy, strict=True)]
            spread = f"({min(ratios):.1f}–{max(ratios):.1f})"
            line += f" {1e3 * statistics.median(own):7.1f}ms {statistics.median(ratios):6.1f} {spread:>11}"
        lines.append(line)
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    """Measure and print; with ``--json`` also write all figures to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, default=10_800_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(words)
    found = measure(given.numel, given.rounds)
    numel = max(1, round(given.numel / (ROWS * COLUMNS))) * ROWS * COLUMNS
    copies = [x for figures in found.values() for x in figures["copy_s"]]  # type: ignore[union-attr]
    copy_s = statistics.median(copies)
    print(f"{numel / 1e6:.1f} M entries of fp32, one thread; a copy takes {1e3 * copy_s:.1f} ms")
    print(table(found, numel))
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
