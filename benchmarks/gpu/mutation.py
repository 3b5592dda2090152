"""A tensor that is changed while it is being copied is found, whoever changes it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.gpu.harness import Report, Settings, run, sync
from outlast.checkpoint import CheckpointConfig, Checkpointer
from outlast.errors import SnapshotMutated


def updates(weights: list[Tensor], settings: Settings) -> dict[str, Callable[[], object]]:
    """Ways to step AdamW; all of them leave ``weights`` other than they were."""
    made: dict[str, Callable[[], object]] = {}
    for kind in ("fused", "foreach"):
        made[kind] = torch.optim.AdamW(weights, lr=1e-3, **{kind: True}).step  # type: ignore[arg-type]
    if settings.cuda:
        compiled = torch.optim.AdamW(
            weights, lr=torch.tensor(1e-3, device=settings.device), capturable=True, foreach=True
        )
        made["compiled"] = torch.compile(compiled.step)
        graphed = torch.optim.AdamW(weights, lr=1e-3, capturable=True, fused=True)
        graphed.step()
        sync(settings.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            graphed.step()
        made["CUDA graph"] = graph.replay
    return made


def found_when_changed_too_early(report: Report, settings: Settings) -> None:
    """Each kind of update right after save(), before wait_copied(); and none where nothing was changed."""
    side = settings.size(8000, 64)
    weights = [torch.randn((side, side), device=settings.device, requires_grad=True) for _ in range(4)]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    kinds = {"nothing": lambda: None, **updates(weights, settings)}
    for update in kinds.values():
        update()
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        checkpointer = Checkpointer(
            folder,
            CheckpointConfig(keep_last=1),
            rank=0,
            world_size=1,
            attempt_id="mutation",
            on_event=lambda event: None,
        )
        state = {"weights": {str(number): weight for number, weight in enumerate(weights)}}
        for step, (kind, update) in enumerate(kinds.items()):
            sync(settings.device)
            checkpointer.save(step, replicated=state, local={})
            update()
            try:
                checkpointer.wait_copied()
                found[kind] = "not found"
            except SnapshotMutated as error:
                found[kind] = error.what
            while checkpointer.running:
                sync(settings.device)
        checkpointer.abort()
    wrong = [kind for kind, said in found.items() if (said == "not found") != (kind == "nothing")]
    report.add(
        "changed too early",
        not wrong,
        wrong=wrong,
        found=sorted(set(found) - {"nothing"} - set(wrong)),
        said=found.get("fused", ""),
    )


if __name__ == "__main__":
    run("mutation", found_when_changed_too_early)
