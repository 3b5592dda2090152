"""What PyTorch's own tests put DDP, FSDP and FSDP2 through, in one program of two ranks: writes what each came to.

For each situation a digest of all parameters, gradients, buffers and losses of this rank, or the
error that it ends with.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.algorithms.join import Join
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

STEPS = 4
SITUATIONS: dict[str, Callable[[], list[Any]]] = {}


def situation(function: Callable[[], list[Any]]) -> Callable[[], list[Any]]:
    SITUATIONS[function.__name__] = function
    return function


class Net(nn.Module):
    """Two branches, of which a forward may leave one out, and a buffer that a forward changes."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.first, self.second, self.other = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(16, 8)
        self.norm: nn.Module = nn.BatchNorm1d(16) if norm else nn.Identity()
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor, branch: str = "both", again: bool = False) -> Tensor:
        hidden = self.drop(self.norm(self.first(x).relu()))
        if again:
            return checkpoint(self.second, hidden, use_reentrant=False) + self.other(hidden)
        out = [] if branch == "other" else [self.second(hidden)]
        return torch.stack([*out, *([] if branch == "second" else [self.other(hidden)])]).sum(0)


def batch(step: int, size: int = 4) -> Tensor:
    return torch.randn(size, 8, generator=torch.Generator().manual_seed(100 * step + dist.get_rank()))


def train(model: nn.Module, steps: int = STEPS, clip: bool = False, **how: Any) -> list[Any]:
    torch.manual_seed(1 + dist.get_rank())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(steps):
        loss = model(batch(step), **how).square().mean()
        loss.backward()
        if clip:
            losses.append(nn.utils.clip_grad_norm_(model.parameters(), 0.1))
        optimizer.step()
        losses.append(loss)
        if step + 1 < steps:
            optimizer.zero_grad()
    return [losses, model]


@situation
def ddp() -> list[Any]:
    return train(DistributedDataParallel(Net(norm=True)), clip=True)


@situation
def ddp_unused_parameters() -> list[Any]:
    return train(DistributedDataParallel(Net(), find_unused_parameters=True), branch="second")


@situation
def ddp_other_branch_on_each_rank() -> list[Any]:
    branch = "second" if dist.get_rank() else "other"
    return train(DistributedDataParallel(Net(), find_unused_parameters=True), branch=branch)


@situation
def ddp_unused_parameters_that_nobody_announced() -> list[Any]:
    return train(DistributedDataParallel(Net()), branch="second")


@situation
def ddp_static_graph_with_recomputation() -> list[Any]:
    return train(DistributedDataParallel(Net(), static_graph=True, gradient_as_bucket_view=True), again=True)


@situation
def ddp_many_buckets_in_fp16() -> list[Any]:
    model = DistributedDataParallel(Net(), bucket_cap_mb=0.0001)  # type: ignore[arg-type]
    model.register_comm_hook(None, default_hooks.fp16_compress_hook)
    return train(model)


@situation
def ddp_power_sgd() -> list[Any]:
    model = DistributedDataParallel(Net())
    state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=2)
    model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    return train(model)


@situation
def ddp_accumulation() -> list[Any]:
    model = DistributedDataParallel(Net())
    with model.no_sync():
        model(batch(9)).square().mean().backward()
    return train(model)


@situation
def ddp_uneven_inputs() -> list[Any]:
    model = DistributedDataParallel(Net())
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-2)
    torch.manual_seed(1)
    with Join([model, optimizer]):
        for step in range(3 + 2 * dist.get_rank()):
            model(batch(step)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return [model]


@situation
def ddp_sparse_gradients() -> list[Any]:
    torch.manual_seed(3)
    model = DistributedDataParallel(nn.EmbeddingBag(10, 4, sparse=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        model(torch.tensor([[step, dist.get_rank()]])).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [model]


@situation
def ddp_two_forwards_and_two_models() -> list[Any]:
    one, other = DistributedDataParallel(Net()), DistributedDataParallel(Net())
    one.train(), other.train()
    torch.manual_seed(5)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (one, other)]
    for step in range(STEPS):
        (one(other(batch(step))).square().mean() + other(batch(step + 50)).square().mean()).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return [one, other]


@situation
def ddp_compiled() -> list[Any]:
    model = torch.compile(DistributedDataParallel(nn.Linear(8, 8)), backend="eager")
    return train(model)


@situation
def ddp_a_hook_of_ones_own() -> list[Any]:
    def halved(state: object, bucket: Any) -> Any:
        work = dist.all_reduce(bucket.buffer().div_(4), async_op=True)
        return work.get_future().then(lambda done: done.value()[0])

    halved.__annotations__.clear()  # torch compares them with classes, and these are text
    model = DistributedDataParallel(Net())
    model.register_comm_hook(None, halved)
    return train(model)


@situation
def fsdp() -> list[Any]:
    return train(FullyShardedDataParallel(Net(), use_orig_params=True, device_id=torch.device("cpu")))


@situation
def fsdp_gradients_sharded_alone() -> list[Any]:
    model = FullyShardedDataParallel(
        Net(), sharding_strategy=ShardingStrategy.SHARD_GRAD_OP, device_id=torch.device("cpu")
    )
    found = train(model)
    with FullyShardedDataParallel.summon_full_params(model):
        return [*found, [parameter.detach().clone() for parameter in model.parameters()]]


def sharded(model: Net, **how: Any) -> Any:
    mesh = init_device_mesh("cpu", (2,))
    for layer in (model.first, model.second, model.other):
        fully_shard(layer, mesh=mesh, **how)
    return fully_shard(model, mesh=mesh, **how)


@situation
def fsdp2() -> list[Any]:
    return train(sharded(Net()), clip=True)


@situation
def fsdp2_that_stays_gathered() -> list[Any]:
    return train(sharded(Net(), reshard_after_forward=False))


@situation
def fsdp2_in_bf16() -> list[Any]:
    return train(sharded(Net(), mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32)))


@situation
def fsdp2_offloaded() -> list[Any]:
    return train(sharded(Net(), offload_policy=CPUOffloadPolicy(pin_memory=False)))


@situation
def fsdp2_accumulation_with_recomputation() -> list[Any]:
    model = sharded(Net())
    model.set_requires_gradient_sync(False)
    model(batch(9), again=True).square().mean().backward()
    model.set_requires_gradient_sync(True)
    return train(model, again=True)


@situation
def fsdp2_replicated() -> list[Any]:
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    return train(fully_shard(Net(), mesh=mesh))


@situation
def fsdp2_a_part_trained() -> list[Any]:
    model = Net()
    model.first.requires_grad_(False)
    return train(sharded(model))


@situation
def fsdp2_compiled() -> list[Any]:
    return train(torch.compile(sharded(Net()), backend="eager"))


@situation
def tensor_parallel() -> list[Any]:
    model = Net()
    plan = {"first": ColwiseParallel(), "second": RowwiseParallel(), "other": RowwiseParallel()}
    model.drop = nn.Dropout(0.0)
    return train(parallelize_module(model, init_device_mesh("cpu", (2,)), plan))


@situation
def calls_of_ones_own() -> list[Any]:
    rank, mine = dist.get_rank(), batch(0)
    pair = dist.new_group([0, 1])
    gathered = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(gathered, mine, group=pair)
    objects: list[Any] = [None, None]
    dist.all_gather_object(objects, {"rank": rank})
    got = torch.empty_like(mine)
    works = dist.batch_isend_irecv([dist.P2POp(dist.isend, mine, 1 - rank), dist.P2POp(dist.irecv, got, 1 - rank)])
    for work in works:
        work.wait()
    later = dist.all_reduce(mine, async_op=True)
    later.wait()
    dist.barrier()
    return [gathered, str(objects), got, mine]


def digest(found: Any) -> str:
    state = hashlib.sha256()

    def take(value: Any) -> None:
        if isinstance(value, nn.Module):
            for name, one in [*value.named_parameters(), *value.named_buffers()]:
                state.update(name.encode())
                take(one)
                take(getattr(one, "grad", None))
        elif isinstance(value, DTensor):
            take(value.to_local())
        elif isinstance(value, Tensor):
            dense = value.detach().to_dense() if value.is_sparse else value.detach()
            state.update(dense.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, list):
            for one in value:
                take(one)
        else:
            state.update(str(value).encode())

    take(found)
    return state.hexdigest()[:16]


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {}
    for name, function in SITUATIONS.items():
        try:
            said = digest(function())
        except (RuntimeError, ValueError, AssertionError, NotImplementedError, AttributeError, TypeError) as error:
            said = f"{type(error).__name__} {str(error).splitlines()[0][:60]}"
        found[name] = said
        dist.barrier()
    (Path(sys.argv[1]) / f"rank_{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
