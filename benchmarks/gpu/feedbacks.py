"""Every compressor with every feedback on the device, and the conformance kit with tensors there."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from torch import Tensor

from benchmarks.gpu.harness import Report, Settings, run
from benchmarks.gpu.kernels import CLOSE, DTYPES, compressors, error, exact, numbers
from outlast.comm.feedback import Feedback, make_feedback
from outlast.comm.testing import check_compressor

FEEDBACKS = ("ef14", "ef21", "ef21-sgdm", "ef21-w", "ef21-pp", "econtrol", "none")


def broken(label: str, device: str, tiny: bool) -> str:
    """What of the contract a compressor breaks on the device; empty: nothing."""
    torch.set_num_threads(1)
    try:
        check_compressor(dict(compressors())[label], dtypes=DTYPES[: 1 if tiny else 2], rounds=60, device=device)
    except AssertionError as violation:
        return f"{label}: {violation}"
    return ""


def conformance(report: Report, settings: Settings) -> None:
    """The conformance kit, tensors on the device; several processes, since it makes many small calls."""
    labels = [label for label, _ in compressors()]
    if settings.tiny:
        labels = [label for label in labels if exact(label)][:3]
    found: list[str] = []
    device = str(settings.device)
    if settings.tiny:
        found = [broken(label, device, True) for label in labels]
    else:
        with ProcessPoolExecutor(5, mp_context=get_context("spawn")) as pool:
            found = list(pool.map(broken, labels, [device] * len(labels), [False] * len(labels)))
    wrong = [text for text in found if text]
    report.add("conformance kit", not wrong, compressors=len(found), broken=wrong[:4])


def simulate(feedback: Feedback, device: torch.device, steps: int) -> tuple[Tensor, list[Tensor]]:
    """Estimates of two ranks' steps, and their state after them."""
    grads = [
        [numbers("normal", (48, 60), torch.float32, 10 * rank + step) for step in range(steps)] for rank in range(2)
    ]
    first = [rank[0].to(device) for rank in grads]
    methods = [feedback.of_rank(rank) for rank in range(2)]
    local = [method.start(g) for method, g in zip(methods, first, strict=True)]
    replicated = feedback.new_replicated(first[0])
    estimates = []
    if feedback.dense_start:
        sent = [m.encode_dense(slots, g) for m, slots, g in zip(methods, local, first, strict=True)]
        estimates.append(feedback.decode_dense(replicated, (sent[0] + sent[1]) / 2, torch.empty_like(first[0])))
    for step in range(1, steps):
        payloads = [m.encode(s, rank[step].to(device)) for m, s, rank in zip(methods, local, grads, strict=True)]
        estimates.append(methods[0].decode(replicated, payloads, torch.empty_like(first[0])).clone())
    slots = [slots[name] for slots in (*local, replicated) for name in sorted(slots)]
    return torch.stack(estimates), slots


def feedbacks(report: Report, settings: Settings) -> None:
    """Every compressor with every feedback: five steps of two ranks, twice the same bits, and the CPU's numbers."""
    wrong, cases, same_bits, worst = [], 0, 0, 0.0
    for label, compressor in compressors():
        for name in FEEDBACKS:
            if settings.tiny and label != "topk int8":
                continue
            feedback = make_feedback(name, compressor, weights=[0.25, 0.75] if name == "ef21-w" else None)
            mine, again, theirs = (
                simulate(feedback, device, 5) for device in (settings.device, settings.device, torch.device("cpu"))
            )
            cases += 1
            if not all(torch.equal(a, b) for a, b in zip([mine[0], *mine[1]], [again[0], *again[1]], strict=True)):
                wrong.append(f"{label} {name}: twice other bits")
            off = error(mine[0], theirs[0])
            same_bits += torch.equal(mine[0].cpu(), theirs[0])
            if exact(label):
                worst = max(worst, off)
                if off > CLOSE:
                    wrong.append(f"{label} {name}: off by {off:.2g}")
    report.add("compressor × feedback", not wrong, cases=cases, cpu_bits_in=same_bits, worst=worst, wrong=wrong[:4])


def section(report: Report, settings: Settings) -> None:
    """Both."""
    report.attempt("compressor × feedback", lambda: feedbacks(report, settings))
    report.attempt("conformance kit", lambda: conformance(report, settings))


if __name__ == "__main__":
    run("feedbacks", section)
