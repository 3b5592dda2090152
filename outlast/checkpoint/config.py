"""Settings of checkpointing, the section ``[checkpoint]`` of a config file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from outlast.config import require


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """How often checkpoints are saved, where, and how many are kept."""

    every_steps: int | Literal["auto"] = 10
    """Optimizer steps from one checkpoint to the next; the last step of a run is always saved. ``auto``: Daly's
    optimum, from the measured cost of saves and from the failures seen."""

    rank_mtbf_h: float = 8000.0
    """With ``auto``: hours after which one rank is expected to fail, until the run's own failures say better; with n
    ranks, some rank fails n times as often. 8000 is what Meta's clusters showed (Kokolis et al., HPCA 2025: one failure
    in 7.9 h of 1,024 GPUs); Llama 3's pre-training had 50,000 (419 unplanned stops in 54 days of 16,384 GPUs)."""

    interval_limit_s: float = 3600.0
    """With ``auto``: at most this many seconds of training between checkpoints, however rare failures are."""

    keep_last: int = 3
    """Committed checkpoints that are kept; older ones are removed after each commit. 0 keeps all. The newest committed
    checkpoint is never removed."""

    aside_keep_last: int = 3
    """Folders of steps set aside (damaged, or left behind by going back to an earlier step) that are kept, those of the
    highest steps; others are removed after a commit, once a step newer than theirs is committed. 0 keeps all."""

    url: str | None = None
    """Where checkpoints are saved: a path or any fsspec URL (``s3://bucket/run``); none takes ``checkpoints/`` in the
    run's directory."""

    commit_timeout_s: float = 300.0
    """Seconds the coordinator waits for the votes of the other ranks, and they for the coordinator to open the save.
    After that, the save is given up and reported, and training goes on. Choose more than the longest time by which one
    rank's storage may lag behind another's. A storage that has answered nothing for this long is not waited for
    either: the save is given up and reported, and so are later ones until it answers."""

    exit_wait_s: float = 60.0
    """A process that ends without closing its ``Checkpointer`` waits so long for its last save to be committed, and no
    longer than 10 s if an exception ends it. Then the save is given up."""

    lease_s: float = 60.0
    """One job at a time saves in a place: it holds a lease there, and renews it six times in this many seconds. If its
    node dies, another job waits this long before it takes the place. A job that a launcher restarts, or whose
    predecessor died on the same machine, does not wait."""

    old_steps: Literal["refuse", "set_aside", "keep"] = "refuse"
    """What a run that restores nothing does in a place that has committed steps: ``refuse`` to save there, move them to
    a folder of their own (``set_aside``), or ``keep`` them as if they were its own, e.g. because it has loaded one of
    them by other means."""

    io_threads: int = 4
    """Threads per rank that checksum, write and fsync files (and read and verify them at restore)."""

    host_memory_mb: float = 0.0
    """Memory per rank, in MB, through which a save is copied; 0 takes what the rank's share of the state needs. With
    less, the state streams through it: the copy proceeds as files are written, and an update that comes before the end
    of the copy waits (``blocked_s`` in the event)."""

    chunk_mb: float = 32.0
    """Tensors are cut into chunks of at most this size, one file each, and ranks share replicated state by chunks."""

    pack_below_kb: float = 16.0
    """Tensors smaller than this are packed into arrays of bytes, of up to ``chunk_mb``; 0 gives each its own array."""

    compare_replicas: Literal["sampled", "whole", "off"] = "sampled"
    """How replicated state is compared before a step is committed. Each piece of it is digested by the rank that writes
    it and by one other: ``sampled``, 4 kB of each MiB, other ones with each step, and whole what is smaller; or the
    ``whole`` of it. Where they differ, the save fails, and names tensor and ranks. Values are compared on all ranks."""

    memory_every_steps: int = 0
    """Optimizer steps from one checkpoint in host memory to the next; 0: none. These checkpoints are in shared memory
    (``/dev/shm``) and outlive the processes; a restart on the same nodes takes them first."""

    memory_keep_last: int = 2
    """Committed checkpoints that are kept in memory. A rank has one more slot than that for its part of the state, up
    to two more while storage and partner are behind, and two more with a partner."""

    partner_every_steps: int = 0
    """Optimizer steps from one copy of a node's memory in the next node's memory to the next; 0: none. A multiple of
    ``memory_every_steps``. With such copies, the loss of a node costs only the steps since the last one."""

    local_dir: str | None = None
    """A folder on each node's own disk, for the copies of ``local_every_steps``."""

    local_every_steps: int = 0
    """Optimizer steps from one copy of a node's memory on its own disk to the next; 0: none. A multiple of
    ``memory_every_steps``. They outlive the machine's memory, but not the machine."""

    local_keep_last: int = 2
    """Copies that are kept on a node's own disk, at least 2; the newest that all nodes have is kept, too."""

    interface: str | None = None
    """With a memory tier of several ranks: the network interface on whose address each rank listens for the others,
    e.g. ``eth1``; the same name on all nodes, IPv4 before IPv6. None takes a node's address on the route to
    ``MASTER_ADDR``; if that is a loopback address, as on the first node if its name resolves to 127.0.1.1, the one on
    the route to another node."""

    def __post_init__(self) -> None:
        counted = isinstance(self.every_steps, int) and self.every_steps >= 1
        auto = self.every_steps == "auto"
        require(counted or auto, "checkpoint.every_steps", self.every_steps, 'every_steps >= 1, or "auto"')
        require(self.rank_mtbf_h > 0, "checkpoint.rank_mtbf_h", self.rank_mtbf_h, "hours > 0")
        require(self.interval_limit_s > 0, "checkpoint.interval_limit_s", self.interval_limit_s, "seconds > 0")
        require(self.keep_last >= 0, "checkpoint.keep_last", self.keep_last, "keep_last >= 0 (0 keeps all)")
        require(
            self.aside_keep_last >= 0, "checkpoint.aside_keep_last", self.aside_keep_last, "0 or more (0 keeps all)"
        )
        require(self.commit_timeout_s > 0, "checkpoint.commit_timeout_s", self.commit_timeout_s, "seconds > 0")
        require(self.exit_wait_s >= 0, "checkpoint.exit_wait_s", self.exit_wait_s, "0 or more seconds")
        require(1 <= self.lease_s <= 600, "checkpoint.lease_s", self.lease_s, "1 to 600 seconds")
        known = ("refuse", "set_aside", "keep")
        require(self.old_steps in known, "checkpoint.old_steps", self.old_steps, ", ".join(known))
        require(1 <= self.io_threads <= 64, "checkpoint.io_threads", self.io_threads, "1 to 64")
        require(self.host_memory_mb >= 0, "checkpoint.host_memory_mb", self.host_memory_mb, "MB >= 0 (0: as needed)")
        require(self.chunk_mb > 0, "checkpoint.chunk_mb", self.chunk_mb, "MB > 0")
        require(self.pack_below_kb >= 0, "checkpoint.pack_below_kb", self.pack_below_kb, "kB >= 0 (0: never)")
        modes = ("sampled", "whole", "off")
        require(
            self.compare_replicas in modes, "checkpoint.compare_replicas", self.compare_replicas, " or ".join(modes)
        )
        least = 4 * self.chunk_mb
        require(
            not self.host_memory_mb or self.host_memory_mb >= least,
            "checkpoint.host_memory_mb",
            self.host_memory_mb,
            f"0, or at least 4 chunks: {least:g} with checkpoint.chunk_mb = {self.chunk_mb:g}",
        )
        require(self.memory_every_steps >= 0, "checkpoint.memory_every_steps", self.memory_every_steps, "0 or more")
        require(
            self.interface != "", "checkpoint.interface", self.interface, "the name of a network interface, or none"
        )
        require(self.memory_keep_last >= 1, "checkpoint.memory_keep_last", self.memory_keep_last, "1 or more")
        every = self.memory_every_steps
        fed = {"partner_every_steps": self.partner_every_steps, "local_every_steps": self.local_every_steps}
        for name, steps in fed.items():
            require(
                not steps or (steps > 0 and every > 0 and steps % every == 0),
                f"checkpoint.{name}",
                steps,
                f"0, or a multiple of checkpoint.memory_every_steps ({every}), which must be on",
            )
        require(self.local_keep_last >= 1, "checkpoint.local_keep_last", self.local_keep_last, "1 or more")
        require(
            bool(self.local_dir) or not self.local_every_steps,
            "checkpoint.local_dir",
            self.local_dir,
            f"a folder, with checkpoint.local_every_steps = {self.local_every_steps}",
        )
