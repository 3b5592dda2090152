"""The collectives of a restore, and of the ranks' meeting: over one process group, with text sent as bytes."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist

from outlast.errors import CheckpointError


def check_ranks(world_size: int, group: dist.ProcessGroup | None, caller: str) -> None:
    """Refuse a process that is alone in its own eyes, but one of several ranks in its launcher's.

    Args:
        world_size: that it would have.
        group: its process group, if it was given one.
        caller: what was called, for the message.

    Raises:
        CheckpointError: ``RANK`` and ``WORLD_SIZE`` say that there are others, and there is no process group.
    """
    rank, ranks = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    others = rank.isdecimal() and ranks.isdecimal() and int(ranks) > 1
    if world_size == 1 and others and group is None and not dist.is_initialized():
        raise CheckpointError(
            f"RANK={rank} and WORLD_SIZE={ranks} say that this is one of {ranks} ranks, but there is no process group: "
            "each of them would save as if it were alone",
            f"call torch.distributed.init_process_group() before {caller}(); for a process on its own, unset RANK and "
            "WORLD_SIZE",
        )


class Agreement:
    """Collectives over all ranks; with one rank they do nothing.

    Every method is collective: all ranks of the group call the same methods in the same order. All block until the
    result is there, so that buffers may be reused on return. If a rank is lost, they raise what the group's backend
    raises (after its timeout, at the latest).

    Args:
        group: None takes the default group.
        rank: in the job; must equal the rank in the group.
        world_size: of the job.

    Raises:
        CheckpointError: several ranks without a process group, or a group of another size.
    """

    def __init__(self, group: dist.ProcessGroup | None, rank: int, world_size: int) -> None:
        self._group = group
        self._rank = rank
        self._world_size = world_size
        self.device = torch.device("cpu")
        """Where the group's backend takes tensors."""
        if world_size == 1:
            return
        if group is None and not dist.is_initialized():
            raise CheckpointError(
                f"{world_size} ranks cannot agree on a checkpoint without a process group",
                "call torch.distributed.init_process_group first",
            )
        if (dist.get_rank(group), dist.get_world_size(group)) != (rank, world_size):
            raise CheckpointError(
                f"this is rank {rank} of {world_size}, but rank {dist.get_rank(group)} of {dist.get_world_size(group)} "
                "in the process group"
            )
        if dist.get_backend(group) == "nccl":
            self.device = torch.device("cuda", torch.cuda.current_device())

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self._world_size

    def broadcast_int(self, value: int) -> int:
        """Rank 0's value, on all ranks."""
        if self._world_size == 1:
            return value
        box = torch.tensor([value], dtype=torch.int64, device=self.device)
        dist.broadcast(box, group=self._group, group_src=0)
        return int(box.item())

    def broadcast_text(self, text: str) -> str:
        """Rank 0's text, on all ranks."""
        if self._world_size == 1:
            return text
        data = text.encode()
        nbytes = self.broadcast_int(len(data))
        box = torch.zeros(nbytes, dtype=torch.uint8)
        if self._rank == 0 and data:
            box.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        box = box.to(self.device)
        dist.broadcast(box, group=self._group, group_src=0)
        return box.cpu().numpy().tobytes().decode()

    def maximum(self, value: int) -> int:
        """The largest value of all ranks, on all ranks."""
        if self._world_size == 1:
            return value
        box = torch.tensor([value], dtype=torch.int64, device=self.device)
        dist.all_reduce(box, op=dist.ReduceOp.MAX, group=self._group)
        return int(box.item())

    def all_gather_text(self, text: str) -> list[str]:
        """Every rank's text, by rank. Where all are empty (the common case), this is one all-reduce."""
        if self._world_size == 1:
            return [text]
        data = text.encode()
        length = self.maximum(len(data))
        if length == 0:
            return [""] * self._world_size
        own = torch.zeros(length, dtype=torch.uint8)
        own[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else own[:0]
        every = [torch.empty(length, dtype=torch.uint8, device=self.device) for _ in range(self._world_size)]
        dist.all_gather(every, own.to(self.device), group=self._group)
        return [item.cpu().numpy().tobytes().rstrip(b"\0").decode() for item in every]

    def transfer(
        self, data: torch.Tensor | None, nbytes: int, sender: int, receivers: Sequence[int]
    ) -> torch.Tensor | None:
        """Send bytes from one rank to some others.

        Args:
            data: (nbytes,) uint8 on the sender; None elsewhere.
            nbytes: how many.
            sender: the rank that has them.
            receivers: the ranks that need them, without the sender.

        Returns:
            The bytes, on the CPU: on the receivers, and perhaps on other ranks; else None.
        """
        # A broadcast's root sends about log2(ranks) times, and all ranks get the bytes: no gain for a few receivers.
        few = len(receivers) == 1 or len(receivers) <= min(self._world_size - 2, (self._world_size - 1).bit_length())
        if not few:
            box = self._box(data, nbytes)
            dist.broadcast(box, group=self._group, group_src=sender)
            return box.cpu()
        if self._rank == sender:
            box = self._box(data, nbytes)
            for receiver in receivers:
                dist.send(box, group=self._group, group_dst=receiver)
        elif self._rank in receivers:
            box = self._box(None, nbytes)
            dist.recv(box, group=self._group, group_src=sender)
            return box.cpu()
        return None

    def _box(self, data: torch.Tensor | None, nbytes: int) -> torch.Tensor:
        return data.to(self.device) if data is not None else torch.empty(nbytes, dtype=torch.uint8, device=self.device)
