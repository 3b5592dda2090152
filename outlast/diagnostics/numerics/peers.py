"""A few numbers of each rank, on all ranks that train one model."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from outlast.diagnostics.live.recorder import Recorder
from outlast.errors import CommError


class Peers:
    """A gloo group of its own, so that it meets no collective of training. Making one is collective over ``ranks``.

    Args:
        ranks: of the default process group, in order; fewer than two, or no process group, and all calls are local.
        timeout_s: how long a rank waits for the others.
        recorder: learns of each collective, where nothing else sees them.
    """

    def __init__(self, ranks: Sequence[int], timeout_s: float, recorder: Recorder | None = None) -> None:
        self.ranks = tuple(ranks)
        self._recorder = recorder
        self._group: dist.ProcessGroup | None = None
        if len(self.ranks) > 1:
            all_of_them = len(self.ranks) == dist.get_world_size()
            self._group = dist.new_group(
                list(self.ranks),
                backend="gloo",
                timeout=timedelta(seconds=timeout_s),
                use_local_synchronization=not all_of_them,
            )

    def gather(self, values: Sequence[int], what: str) -> list[list[int]]:
        """The values (63 bits each) of each rank, in the order of ``ranks``; all give as many. Collective.

        Raises:
            CommError: a peer is lost, or does not come within the limit.
        """
        if self._group is None:
            return [list(values)]
        mine = torch.tensor(list(values), dtype=torch.int64)
        found = [torch.empty_like(mine) for _ in self.ranks]
        token = None if self._recorder is None else self._recorder.enter("all_gather", mine.nbytes, what)
        try:
            dist.all_gather(found, mine, group=self._group)
        except RuntimeError as error:
            raise CommError.of_lost_peer(f"all_gather of {what}", dist.get_rank(), len(self.ranks), error) from error
        if self._recorder is not None and token is not None:
            self._recorder.complete(token)
        return [one.tolist() for one in found]

    def close(self) -> None:
        """Give the group back."""
        if self._group is not None and dist.is_initialized():
            dist.destroy_process_group(self._group)
        self._group = None
