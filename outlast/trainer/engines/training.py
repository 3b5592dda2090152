"""What engines have in common."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from outlast.checkpoint import Restored, check_like
from outlast.comm import CollectiveObserver, Reducer
from outlast.comm.direction import Adam
from outlast.errors import StateMismatch, TrainingDiverged
from outlast.session.buffers import of_rank_0
from outlast.session.scheduled_checkpoints import Collected
from outlast.trainer.batches import Batch, to_device
from outlast.trainer.config import Config
from outlast.trainer.engines.base import EAGER, UNMEASURED, State, UpdateStats
from outlast.trainer.optim import load_optimizer_state, load_scheduler_state, optimizer_state, scheduler_state
from outlast.trainer.parts import build_loss, make_optimizer, make_scheduler


class ModuleEngine:
    """An engine of a model whose parameters have gradients, in PyTorch's way; see :class:`Engine`.

    Args:
        model: wrapped already, where that changes its parameters.
        config: all settings.
        device: where ``model`` is.
        observer: records collectives.
        reducer: reduces gradients; None: a library does.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        device: torch.device,
        observer: CollectiveObserver | None,
        reducer: Reducer | None,
    ) -> None:
        self.model = model
        self.device = device
        self._observer = observer
        self._reducer = reducer
        self._clip_norm = config.clip_norm or math.inf
        self._bf16 = config.trainer.precision == "bf16"
        self._averages_updates = config.comm.target == "update"
        self._keeps_state = config.comm.compressor != "dense" or self._averages_updates
        self._optimizer = make_optimizer(model, config)
        self._scheduler = make_scheduler(self._optimizer, config)
        self._loss_of = build_loss(config)
        self._reduced = UNMEASURED

    @property
    def optimizer(self) -> Optimizer:
        """See :class:`Engine`."""
        return self._optimizer

    def forward_backward(self, step: int, batches: Sequence[Batch]) -> float:
        """See :class:`Engine`; only the last micro-batch's backward pass communicates."""
        self._optimizer.zero_grad()
        if self._reducer is not None:
            self._reducer.begin_step(step)
        total = torch.zeros((), device=self.device)
        with self._recorded():
            for index, batch in enumerate(batches, 1):
                with self._reducing(last=index == len(batches)):
                    loss = self._loss(self._called, batch) / len(batches)
                    loss.backward()  # type: ignore[no-untyped-call]
                total += loss.detach()
        if self._reducer is not None:
            self._reduced = self._reducer.end_step()
        return float(total)

    @property
    def _called(self) -> nn.Module:
        """What forward goes through in training."""
        return self.model

    def _reducing(self, *, last: bool) -> AbstractContextManager[None]:
        """A forward and backward, of which the last one of a step reduces gradients."""
        return nullcontext()

    def _recorded(self) -> AbstractContextManager[None]:
        """All of a step's forwards and backwards."""
        return nullcontext()

    def update(self, step: int) -> UpdateStats:
        """See :class:`Engine`. Collective with shards, of which the norm is that of all.

        Raises:
            TrainingDiverged: the norm is NaN or infinite; parameters and optimizer are as before.
        """
        norm = clip(step, self.model.parameters(), self._clip_norm, "update" if self._averages_updates else "gradient")
        lr = float(self._scheduler.get_last_lr()[0])
        self._optimizer.step()
        self._scheduler.step()
        return UpdateStats.of(norm, lr, self._reduced, of_updates=self._averages_updates)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> Tensor:
        """See :class:`Engine`. Collective for each batch with shards: parameters are gathered."""
        self.model.eval()
        losses = torch.stack([self._loss(self.model, batch) for batch in batches])
        self.model.train()
        return losses.mean()

    def state(self) -> Collected:
        """See :class:`Engine`. Of shards each rank saves its own: they are DTensors."""
        buffers = dict(self.model.named_buffers())
        replicated: State = {
            "model": dict(self.model.named_parameters()) | of_rank_0(buffers, self._observer),
            "optimizer": optimizer_state(self.model, self._optimizer),
            "scheduler": scheduler_state(self._scheduler),
        }
        local: State = {"buffers": buffers} if buffers else {}
        if self._reducer is not None:
            comm = self._reducer.checkpoint_parts()
            replicated |= comm.replicated
            local |= comm.local
        return Collected(replicated, local, EAGER)

    def like(self) -> State | None:
        """See :class:`Engine`."""
        return None

    def load(self, restored: Restored) -> None:
        """See :class:`Engine`. Error-feedback state of another number of ranks is redistributed; of shards, refused."""
        replicated = restored.replicated
        if "model" not in replicated:
            raise StateMismatch(
                "the checkpoint was saved under DeepSpeed",
                'resume it with trainer.engine = "deepspeed", or begin a new run',
            )
        running = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        check_like(replicated["model"], running)
        if unknown := sorted(set(replicated["optimizer"]) - set(running)):
            raise StateMismatch(
                f"the checkpoint has optimizer state for parameters that the model lacks: {', '.join(unknown)}"
            )
        load_comm(self._reducer if self._keeps_state or "comm" in replicated else None, restored)
        rank = dist.get_rank()
        own = restored.read_local(rank).get("buffers", {}) if rank < restored.world_size else {}
        with torch.no_grad():
            for name, tensor in running.items():
                tensor.copy_(own.get(name, replicated["model"][name]))
        load_optimizer_state(self.model, self._optimizer, replicated["optimizer"])
        load_scheduler_state(self._scheduler, replicated["scheduler"])

    def close(self) -> None:
        """See :class:`Engine`."""
        if self._reducer is not None:
            self._reducer.close()

    def _loss(self, model: nn.Module, batch: Batch) -> Tensor:
        batch = to_device(batch, self.device)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._bf16):
            return self._loss_of(model, batch)


def adam_direction(config: Config) -> Adam:
    """The direction whose average is the update, with ``comm.target = "update"``."""
    optim = config.optim
    return Adam(config.beta1, optim.beta2, optim.eps, optim.clip_rms)


@contextmanager
def recorded(observer: CollectiveObserver | None, label: str) -> Iterator[None]:
    """Record a forward and backward as one collective of all ranks, where a library issues some that nobody sees.

    A rank that waits in there for a peer, which never began, is told from that peer.
    """
    token = None if observer is None else observer.enter("forward_backward", 0, label)
    yield
    if observer is not None and token is not None:
        observer.complete(token)


def load_comm(reducer: Reducer | None, restored: Restored) -> None:
    """Load a reducer's state, if there is one.

    Raises:
        StateMismatch: there is none in the checkpoint.
        CommStateMismatch: see :meth:`Reducer.load_parts`.
    """
    if reducer is None:
        return
    if "comm" not in restored.replicated:
        raise StateMismatch(
            "the checkpoint was saved with dense gradients, and has no state of error feedback",
            'go on with comm.compressor = "dense", or begin a new run with run.start_from',
        )
    reducer.load_parts(restored)


def clip(step: int, parameters: Iterable[nn.Parameter], most: float, what: str) -> float:
    """The norm of all gradients, to which they are then clipped. With shards it is collective.

    Args:
        step: its number.
        parameters: that have averaged gradients.
        most: the norm to clip to; infinity clips nothing.
        what: was averaged.

    Raises:
        TrainingDiverged: it is NaN or infinite; nothing has been updated, and the gradients are as they were, so that
            it is seen which are at fault.
    """
    parameters = list(parameters)
    total = get_total_norm([one.grad for one in parameters if one.grad is not None])
    of_shards = getattr(total, "full_tensor", None)  # a DTensor's; to import the class takes most of a second
    norm = float(total if of_shards is None else of_shards())
    if not math.isfinite(norm):
        raise TrainingDiverged(
            f"step {step}: the {what} norm is {norm}; the parameters were not updated",
            "lower optim.lr, lengthen optim.warmup_steps, or resume from an earlier step with --resume STEP",
        )
    clip_grads_with_norm_(parameters, most, total)
    return norm
