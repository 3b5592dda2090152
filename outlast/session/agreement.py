"""What the ranks of a run agree on between steps: whether a notice came, and whether all of them go on."""

from __future__ import annotations

import secrets
from dataclasses import replace

import torch
import torch.distributed as dist

from outlast.checkpoint.peers.collectives import Agreement
from outlast.diagnostics import Recorder
from outlast.errors import CommError, EndedEarly
from outlast.launch import Notice, Place
from outlast.session import process_group

_NONE = -(1 << 62)


class StepAgreement:
    """One small all-reduce a step, which the step's own work hides.

    All ranks call the same methods in the same order: :meth:`ask` when a step begins, :meth:`answer` when it has ended,
    and in the end :meth:`leave`. Whether a rank goes on is part of each question, so that a rank that leaves its loop
    before the others learns that at once, and they from it, instead of waiting in a collective that never comes.

    Failure contract: when a peer is lost, :meth:`answer` and :meth:`leave` raise CommError, and :meth:`share` what gloo
    raises, at once if its process has ended, else within the timeout of the default process group.

    Args:
        rank: of this process.
        world_size: with 1 there is no group, and all calls are local.
        notice: None: notices are not looked for.
    """

    def __init__(self, rank: int, world_size: int, notice: Notice | None) -> None:
        self._rank = rank
        self._notice = notice
        self._group = None
        if world_size > 1:  # a group of its own, which the collectives of a loop cannot disturb
            self._group = dist.new_group(backend="gloo", timeout=process_group.limit())
        self._all = Agreement(self._group, rank, world_size)
        self._asked: tuple[dist.Work, torch.Tensor] | None = None
        self.notice_came = False
        """The newest answer; once true it stays so."""
        self.recorder: Recorder | None = None
        """Learns of the waits for answers, where a loop enters its collectives itself."""

    @property
    def notice(self) -> str:
        """Which notice this rank knows of, such as ``SIGTERM``; empty if of none."""
        return "" if self._notice is None else self._notice.name

    def share(self, number: int) -> int:
        """Rank 0's number, on every rank."""
        return self._all.broadcast_int(number)

    def token(self) -> str:
        """Random text, the same on all ranks."""
        return f"{self.share(secrets.randbits(62)):016x}"

    def maximum(self, number: int) -> int:
        """The largest number of all ranks."""
        return self._all.maximum(number)

    def of_this_start(self, place: Place) -> Place:
        """A rank's place with the number of this start, which all ranks have in common."""
        # torchrun counts restarts per node; a node whose own ranks never failed would not resume.
        return replace(place, generation=self.maximum(place.generation))

    def all_equal(self, number: int) -> bool:
        """Whether all ranks have the same number."""
        return self.maximum(number) == -self.maximum(-number)

    def came(self) -> bool:
        """Whether a notice came to any rank, for now; see :meth:`answer`."""
        self.ask()
        return self.answer()

    def ask(self) -> None:
        """A step begins on this rank, or has come further. The newest answer is there when the step has ended."""
        if self._asked is not None:
            self._answer(leaving_after=None)
        self._ask(leaving_after=None)

    def answer(self) -> bool:
        """Whether a notice had come to any rank when the question was asked; waits for the last rank to ask.

        Raises:
            EndedEarly: a rank has left its loop, while this one goes on.
        """
        self._answer(leaving_after=None)
        return self.notice_came

    def leave(self, done_step: int) -> bool:
        """This rank takes no more steps; waits for the others to say the same. Returns whether a notice came.

        Raises:
            EndedEarly: others go on, or have done other steps.
        """
        if self._asked is not None:  # left inside a step, as the others may have
            self._answer(leaving_after=None)
        self._ask(leaving_after=done_step)
        self._answer(leaving_after=done_step)
        return self.notice_came

    def _ask(self, leaving_after: int | None) -> None:
        noticed = self.notice_came or (self._notice is not None and bool(self._notice.name))
        left = (self._rank + 1, leaving_after, -leaving_after) if leaving_after is not None else (0, _NONE, _NONE)
        box = torch.tensor([noticed, leaving_after is None, *left], dtype=torch.int64, device=self._all.device)
        if self._group is None:
            self.notice_came = noticed
            return
        self._asked = dist.all_reduce(box, op=dist.ReduceOp.MAX, group=self._group, async_op=True), box

    def _answer(self, leaving_after: int | None) -> None:
        if self._asked is None:
            return
        work, box = self._asked
        self._asked = None
        token = None if self.recorder is None else self.recorder.enter("all_reduce", box.nbytes, "notice")
        try:
            work.wait()
            noticed, staying, leaver, last, first = (int(number) for number in box.tolist())  # with NCCL it ends here
        except RuntimeError as error:
            what = "all_reduce of a notice, and of who goes on"
            raise CommError.of_lost_peer(what, self._rank, dist.get_world_size(self._group), error) from error
        if self.recorder is not None and token is not None:
            self.recorder.complete(token)
        self.notice_came = bool(noticed)
        fix = (
            "every rank must take the same steps: decide to stop early from numbers that all ranks have, such as an "
            "all-reduced loss, and make all ranks' data equally long"
        )
        if leaver and staying:
            if leaving_after is None:
                raise EndedEarly(
                    f"rank {leaver - 1} has left session.steps() after step {last}, before the others", fix
                )
            raise EndedEarly(
                f"rank {self._rank} has left session.steps() after step {leaving_after}, while others go on", fix
            )
        if leaver and last != -first:
            raise EndedEarly(f"ranks have left session.steps() after different steps: {-first} to {last}", fix)
