"""One step again, bit by bit: whether it comes out the same, and if not, whether the fault stays, and on which rank."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from outlast.diagnostics.numerics.digests import Digests
from outlast.diagnostics.numerics.model_parts import bare, local, sharing_of
from outlast.diagnostics.numerics.peers import Peers
from outlast.errors import DiagnosticsError

Outcome = Literal["same", "transient", "unstable", "persistent", "differing"]
_RUNS = 2


@dataclass(frozen=True, slots=True)
class Replay:
    """What a replay has shown; the same on all ranks."""

    outcome: Outcome
    """``same``: all runs gave the same bits. ``transient``: the step itself gave others than its repetitions.
    ``unstable``: repetitions on a rank differ from one another. ``persistent``: a rank's repetitions agree, and other
    ranks compute other bits from the same batch. ``differing``: ranks do, and it is not clear which is wrong."""
    ranks: tuple[int, ...]
    """Those at fault; empty if that is not known."""
    parameter: str
    """The first in the model's order whose gradient differs; empty with ``same``."""
    told: str


class StepReplay:
    """Repeats a step that looks wrong. Made before the step's forward, when it copies weights, buffers, random numbers.

    ::

        replay = StepReplay(ddp, lambda rank: loss(ddp, step))
        loss(ddp, step).backward()
        found = replay.run()  # before the update or after it
        replay.close()

    Each rank's own gradients are noted as backward computes them, before they are averaged, clipped or compressed. The
    step is repeated twice on each rank by itself. With ``by_rank`` each rank also repeats the step of the rank before
    it, on that one's batch and random numbers: one that is wrong every time disagrees with both of its neighbours.
    Three ranks are needed to say which it is.

    Needs algorithms that give the same bits each time: CPUs have them, on CUDA
    ``torch.use_deterministic_algorithms(True)`` asks for them. Making one is collective, as is :meth:`run`.

    Args:
        model: as the loop calls it: in DDP, or bare.
        loss: computes the loss of the step on the batch of the rank that it is given; the step is one backward of it.
        by_rank: whether ``loss`` can compute that of another rank's batch. If not, what is wrong each time is not seen.
        timeout_s: how long a rank waits for the others.

    Raises:
        DiagnosticsError: the model is sharded, so that no rank has a gradient of its own; or algorithms are not
            deterministic.
    """

    def __init__(
        self, model: nn.Module, loss: Callable[[int], Tensor], *, by_rank: bool = False, timeout_s: float = 60.0
    ) -> None:
        self._bare = bare(model)
        self._ddp = next(
            (one for one in (model, getattr(model, "_orig_mod", None)) if isinstance(one, DistributedDataParallel)),
            None,
        )
        self._loss = loss
        self._by_rank = by_rank
        sharing = sharing_of(model)
        self._device = next(self._bare.parameters()).device
        if sharing.is_sharded:
            raise DiagnosticsError(
                "StepReplay: the model is sharded, and no rank has a gradient of its own to repeat",
                "repeat the step of a replica, in DDP or bare",
            )
        if self._device.type == "cuda" and not torch.are_deterministic_algorithms_enabled():
            raise DiagnosticsError(
                "StepReplay: on CUDA the same step may give other bits each time, as a fault would",
                "call torch.use_deterministic_algorithms(True) at the start; trainer.deterministic = true does it",
            )
        self._peers = Peers(sharing.ranks, timeout_s)
        self._ranks = sharing.ranks
        self._rank = sharing.ranks[0] if len(sharing.ranks) == 1 else torch.distributed.get_rank()
        self._parameters = {name: one for name, one in self._bare.named_parameters() if one.requires_grad}
        self._digests = Digests()
        self._random = self._random_now()
        with torch.no_grad():
            self._before = {name: one.detach().clone() for name, one in self._tensors().items()}
        self._seen: list[list[Tensor]] = [[] for _ in self._parameters]  # digests of each, as backward computes them
        self._hooks = [
            one.register_hook(partial(self._note, place))  # type: ignore[no-untyped-call]
            for place, one in enumerate(self._parameters.values())
        ]

    def run(self) -> Replay:
        """Repeat the step. Weights, buffers, gradients and random numbers are afterwards as they are now.

        Raises:
            DiagnosticsError: the step was no single backward, or has not been.
            CommError: a peer is lost.
        """
        backwards = max(map(len, self._seen), default=0)
        if backwards != 1:
            raise DiagnosticsError(
                f"StepReplay.run() after {backwards} backward passes since it was made; a step of one can be repeated",
                "make it right before the step's forward, and run it before another backward; of a step with "
                "accumulation, repeat one micro-batch",
            )
        kept = self._read()
        now = {name: one.detach().clone() for name, one in self._tensors().items()}
        gradients = {name: one.grad for name, one in self._parameters.items()}
        random = self._random_now()
        try:
            return self._judge(kept)
        finally:
            self._put(now)
            for name, one in self._parameters.items():
                one.grad = gradients[name]
            self._set_random(random)

    def close(self) -> None:
        """Let go of the copies and the group."""
        for hook in self._hooks:
            hook.remove()
        self._before.clear()
        self._peers.close()

    def _judge(self, kept: list[int]) -> Replay:
        runs = [self._once(self._rank) for _ in range(_RUNS)]
        unstable = self._where({self._rank: _first(runs[0], runs[1])})
        if unstable:
            return self._found("unstable", unstable, "repetitions of the same step differ from one another")
        changed = self._where({self._rank: _first(kept, runs[0])})
        if changed:
            words = "repetitions agree with one another, and not with the step as it was: the fault did not come again"
            return self._found("transient", changed, words)
        elsewhere = self._elsewhere(runs[0]) if self._by_rank and len(self._ranks) > 1 else {}
        if elsewhere:
            return self._of_neighbours(elsewhere)
        by = "this rank" if len(self._ranks) == 1 else "each rank, and its neighbour," if self._by_rank else "each rank"
        return Replay("same", (), "", f"all repetitions by {by} gave the same bits as the step")

    def _elsewhere(self, mine: list[int]) -> dict[int, int]:
        """Repeat the step of the rank before this one. By rank whose own result differs from its neighbour's: where."""
        here = self._ranks.index(self._rank)
        rows = self._peers.gather(_as_numbers(self._random), "random-number states")
        before = here - 1
        theirs = self._once(self._ranks[before], _as_states(rows[before], self._random))
        own = self._peers.gather(mine, "gradients of this rank")
        return self._where({self._ranks[before]: _first(own[before], theirs)})

    def _of_neighbours(self, differs: dict[int, int]) -> Replay:
        """A rank that is wrong disagrees as the owner of a batch, and as the one who repeats the batch before."""
        count = len(self._ranks)
        after = {rank: self._ranks[(place + 1) % count] for place, rank in enumerate(self._ranks)}
        wrong = [after[rank] for rank in differs if after[rank] in differs]
        others = set(differs) - {rank for rank in self._ranks if after[rank] in wrong} - set(wrong)
        parameter = min(differs.values())
        if count > 2 and len(wrong) == 1 and not others:
            return self._found(
                "persistent",
                {wrong[0]: parameter},
                "its repetitions agree, and neither neighbour computes the same from a batch: it is wrong each time",
            )
        words = (
            "of two, it is not clear which is wrong"
            if count == 2
            else f"{len(differs)} of {count} pairs of neighbours differ: several are wrong, or hardware differs"
        )
        return self._found("differing", {}, f"ranks compute other bits from the same batch; {words}", parameter)

    def _found(self, outcome: Outcome, places: dict[int, int], words: str, parameter: int | None = None) -> Replay:
        name = list(self._parameters)[min(places.values()) if parameter is None else parameter]
        ranks = tuple(sorted(places))
        who = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}: " if ranks else ""
        return Replay(outcome, ranks, name, f"{who}{words} (first in the gradient of {name})")

    def _where(self, mine: dict[int, int | None]) -> dict[int, int]:
        """What all ranks have found: by rank, the number of the first parameter that differs."""
        ((about, place),) = mine.items()
        rows = self._peers.gather([about, -1 if place is None else place], "what a replay has shown")
        return {about: place for about, place in rows if place >= 0}

    def _once(self, rank: int, random: dict[str, Tensor] | None = None) -> list[int]:
        """Digests of this rank's gradients in the step of ``rank``; nothing is averaged."""
        self._put(self._before)
        self._set_random(self._random if random is None else random)
        for place, one in enumerate(self._parameters.values()):
            one.grad = None
            self._seen[place].clear()
        with self._ddp.no_sync() if self._ddp is not None else contextlib.nullcontext():
            self._loss(rank).backward()  # type: ignore[no-untyped-call]
        return self._read()

    def _note(self, place: int, grad: Tensor) -> None:
        with torch.no_grad():
            self._seen[place].append(self._digests.on_device(local(grad)))

    def _read(self) -> list[int]:
        """Of each parameter, noted last; 0 where there was no gradient. The host waits once."""
        present = [(place, seen[-1]) for place, seen in enumerate(self._seen) if seen]
        found = [0] * len(self._seen)
        if present:
            for (place, _), digest in zip(present, torch.stack([one for _, one in present]).tolist(), strict=True):
                found[place] = digest
        return found

    def _tensors(self) -> dict[str, Tensor]:
        return dict(self._bare.named_parameters()) | dict(self._bare.named_buffers())

    def _put(self, saved: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, one in self._tensors().items():
                one.copy_(saved[name])

    def _random_now(self) -> dict[str, Tensor]:
        states = {"cpu": torch.get_rng_state()}
        if self._device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self._device)
        return states

    def _set_random(self, states: dict[str, Tensor]) -> None:
        torch.set_rng_state(states["cpu"])
        if "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"], self._device)


def _first(one: list[int], other: list[int]) -> int | None:
    return next((place for place, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), None)


def _as_numbers(states: dict[str, Tensor]) -> list[int]:
    return [byte for state in states.values() for byte in state.tolist()]


def _as_states(numbers: list[int], like: dict[str, Tensor]) -> dict[str, Tensor]:
    found, at = {}, 0
    for name, state in like.items():
        found[name] = torch.tensor(numbers[at : at + state.numel()], dtype=state.dtype)
        at += state.numel()
    return found
