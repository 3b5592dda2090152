"""Every kernel and every compressor on the device, against the CPU."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu.harness import Report, Settings, run
from outlast.comm.compressors import COMPRESSORS, Compressor, TopK, make_compressor

ROUNDED = ("sign", "lowrank", "gear")
"""Sums and products of many entries are rounded in another order than on the CPU; all others give the CPU's bytes."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CLOSE = 1e-4
KERNEL_TESTS = Path(__file__).parents[2] / "tests" / "comm" / "kernels" / "kernel_checks.py"


def numbers(kind: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Gradients of a kind, on the CPU."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if kind == "ties":
        x = (2 * x).round()
    elif kind == "zeros":
        x = torch.zeros(shape)
    elif kind == "huge":
        x *= 6e3 if dtype == torch.float16 else 1e36
    elif kind == "tiny":
        x *= 6e-8 if dtype == torch.float16 else 1e-39
    elif kind == "nan":
        x.view(-1)[:: max(1, x.numel() // 3)] = math.nan
    elif kind == "inf":
        x.view(-1)[-1] = -math.inf
    return x.to(dtype)


def compressors() -> Iterator[tuple[str, Compressor]]:
    """Each, with each way to write its values."""
    for name in COMPRESSORS:
        codes = ("fp32", "int8", "int4", "bf16", "natural") if name in ("topk", "lowrank") else ("int8",)
        for values in codes:
            yield f"{name} {values}", make_compressor(name, density=0.05, rank=2, values=values)
    for values in ("fp16", "sign"):
        yield f"topk {values}", make_compressor("topk", density=0.05, values=values)


def exact(label: str) -> bool:
    """Whether the device's bytes must be the CPU's."""
    return label.split()[0] not in ROUNDED and not label.endswith("sign")


def error(ours: Tensor, theirs: Tensor) -> float:
    """Of what the device sends, against what the CPU sends, relative to it."""
    one, other = ours.double().cpu(), theirs.double()
    scale = float(other.abs().max()) or 1.0
    return float(((one - other) / scale).norm() / ((other / scale).norm() or 1.0))


def against_cpu(report: Report, settings: Settings) -> None:
    """The same bytes from device and CPU, twice the same ones, and the same sums from the CPU's bytes."""
    sizes = ((24, 40), (1000, 333), (257,), (7,), (1,), (5, 6, 17))
    kinds = ("normal", "huge", "tiny", "nan", "ties", "zeros", "inf", "strided")
    cases, wrong, worst = 0, [], 0.0
    for label, compressor in compressors():
        for dtype in DTYPES[: 1 if settings.tiny else None]:
            narrow = dtype != torch.float32
            for shape in sizes[: 3 if narrow or settings.tiny else None]:
                for kind in kinds[: 4 if narrow else None]:
                    x = numbers(kind, shape, dtype, cases)
                    case = f"{label} {kind} {shape} {str(dtype).removeprefix('torch.')}"
                    cases += 1
                    y = x.to(settings.device)
                    if kind == "strided":
                        x, y = x[::2], y[::2]
                    theirs, ours, again = (compressor.compress(g) for g in (x, y, y))
                    if not torch.equal(ours.payload, again.payload):
                        wrong.append(f"{case}: twice other bytes")
                    if ours.finite() != theirs.finite():
                        wrong.append(f"{case}: finite() is {ours.finite()}")
                    if not theirs.finite():
                        continue
                    sent = torch.zeros(x.shape)
                    theirs.add_to(sent, 0.5)
                    read = torch.zeros(x.shape, device=settings.device)
                    compressor.add_to(read, theirs.payload.to(settings.device), 0.5)
                    if label.startswith(("lowrank", "gear")):
                        worst = max(worst, error(read, sent))
                    elif not torch.equal(read.cpu().view(torch.int32), sent.view(torch.int32)):
                        wrong.append(f"{case}: the CPU's bytes are read as other numbers")
                    if exact(label):
                        if not torch.equal(ours.payload.cpu(), theirs.payload):
                            wrong.append(f"{case}: other bytes than the CPU")
                    elif label.split()[0] == "sign":
                        mine = torch.zeros(x.shape, device=settings.device)
                        ours.add_to(mine, 0.5)
                        worst = max(worst, error(mine, sent))
    report.add(
        "bytes and sums as on the CPU",
        not wrong and worst < CLOSE,
        cases=cases,
        wrong=len(wrong),
        worst=worst,
        first=wrong[:4],
    )


def large(report: Report, settings: Settings) -> None:
    """Up to 2^28 entries: both selections send the same bytes, twice; what was left is no larger than what was sent."""
    for power in (12, 16) if settings.tiny else (12, 20, 24, 28):
        numel = 2**power
        x = torch.randn(numel, device=settings.device, generator=torch.Generator(settings.device).manual_seed(power))
        x = x.to(torch.bfloat16).float()  # with ties
        found = [TopK(0.01, selection=selection).compress(x) for selection in ("sampled", "exact", "sampled")]
        same = all(torch.equal(found[0].payload, other.payload) for other in found[1:])
        rest = x.clone()
        found[0].add_to(rest, -1.0)
        sent = torch.zeros_like(x)
        found[0].add_to(sent)
        chosen = sent != 0
        k = math.ceil(0.01 * numel)
        least, most = float(sent[chosen].abs().min()), float(rest.abs().max())
        holds = same and int(chosen.sum()) == k and least >= most and bool((rest + sent == x).all())
        bits = {}
        for name in ("int8", "int4", "sign", "natural"):
            compressor = make_compressor(name)
            one, other = (compressor.compress(x).payload for _ in range(2))
            bits[name] = torch.equal(one, other)
            if power <= 24 and name != "sign":
                bits[f"{name} as on the CPU"] = torch.equal(one.cpu(), compressor.compress(x.cpu()).payload)
        report.add(f"2^{power} entries", holds and all(bits.values()), same=same, k=k, **bits)
        del x, rest, sent, chosen, found


def kernel_tests(report: Report, settings: Settings) -> None:
    """The tests of the kernels, where the repository is."""
    if not settings.cuda or not KERNEL_TESTS.exists():
        report.add("tests of the kernels", None, left_out="no GPU, or no tests beside the benchmarks")
        return
    ask = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(KERNEL_TESTS)]
    done = subprocess.run(ask, capture_output=True, text=True, cwd=KERNEL_TESTS.parents[3], check=False)
    print(done.stdout, done.stderr)
    report.add("tests of the kernels", done.returncode == 0, said=done.stdout.strip().splitlines()[-1:])


def section(report: Report, settings: Settings) -> None:
    """What decides first."""
    for what, part in (
        ("bytes and sums as on the CPU", against_cpu),
        ("large tensors", large),
        ("tests of the kernels", kernel_tests),
    ):
        report.attempt(what, partial(part, report, settings))


if __name__ == "__main__":
    run("kernels", section)
