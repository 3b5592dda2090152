"""PyTorch's default process group: who joins it, where, and for how long its collectives wait."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from outlast.errors import LaunchError, MissingDependency, PortInUse
from outlast.launch import Place
from outlast.session.start_keys import of_this_start

TOLD_AFTER_S = 10.0
"""Ranks that meet sooner are nothing to write about."""

_LOG = logging.getLogger("outlast")


def choose_device(device: str, place: Place, *, shared: bool = False) -> torch.device:
    """The device of this rank; ``auto`` takes the local rank's GPU where there is one.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``.
        place: of this rank.
        shared: ranks may share a GPU.

    Raises:
        MissingDependency: CUDA is requested, but torch sees no GPU, or fewer than there are local ranks.
    """
    gpus = torch.cuda.device_count()
    if device == "cpu" or (device == "auto" and gpus == 0):
        return torch.device("cpu")
    if shared and gpus:
        return torch.device("cuda", place.local_rank % gpus)
    if place.local_rank >= gpus:
        raise MissingDependency(
            f"local rank {place.local_rank} has no GPU of its own: torch {torch.__version__} sees {gpus}",
            "start fewer ranks on this node, set trainer.device = 'cpu', or share it with trainer.backend = 'gloo'",
        )
    return torch.device("cuda", place.local_rank)


def make_deterministic() -> None:
    """Use none but algorithms that give the same bits on every run; to be called before the device is used."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for
    torch.use_deterministic_algorithms(True)


def start(place: Place, device: torch.device, timeout: timedelta, backend: str = "auto") -> None:
    """Join the default process group: ``backend``, or NCCL for CUDA and gloo for CPU. Collective.

    Failure contract: raises within about ``timeout`` if a rank does not join; nothing is left behind.

    Raises:
        PortInUse: rank 0 cannot listen on the master port.
        LaunchError: the master or other ranks are not reached in time.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if backend == "auto":
        backend = "nccl" if device.type == "cuda" else "gloo"
    os.environ.update(MASTER_ADDR=place.master_addr, MASTER_PORT=str(place.master_port))
    try:
        with _told_if_slow(place, timeout):
            store = _store_of_this_start(place, timeout)
            dist.init_process_group(
                backend=backend,
                init_method="env://" if store is None else None,
                store=store,
                rank=place.rank,
                world_size=place.world_size,
                timeout=timeout,
                device_id=device if backend == "nccl" else None,
            )
    except dist.DistError as error:
        where = f"{place.master_addr}:{place.master_port}"
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            raise PortInUse(
                f"rank 0 cannot listen on {where}: the port is in use",
                "set another MASTER_PORT, or --rdzv-endpoint HOST:0",
            ) from error
        raise LaunchError(
            f"rank {place.rank} of {place.world_size} ({place.source}) could not join the process group at {where}: "
            f"{error}",
            "make sure all ranks started and every node reaches this address (outlast doctor)",
        ) from error


def _store_of_this_start(place: Place, timeout: timedelta) -> Store | None:
    """What ranks meet in where torchrun's agent has one store for all of its starts; None where it has not."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    store = TCPStore(place.master_addr, place.master_port, place.world_size, is_master=False, timeout=timeout)
    return of_this_start(store, place.rank, place.world_size, timeout.total_seconds())


@contextmanager
def _told_if_slow(place: Place, timeout: timedelta) -> Iterator[None]:
    """One line if the ranks do not meet soon: torch waits in silence."""
    timer = threading.Timer(
        TOLD_AFTER_S,
        _LOG.warning,
        [
            "rank %d of %d (%s) still waits for %s at %s:%d, up to %.0f s (trainer.timeout_s)",
            place.rank,
            place.world_size,
            place.source,
            "the other ranks" if place.rank == 0 else "rank 0",
            place.master_addr,
            place.master_port,
            timeout.total_seconds(),
        ],
    )
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def limit() -> timedelta | None:
    """After how long a collective of the default process group is given up; None where its backend does not tell."""
    group = dist.group.WORLD
    assert group is not None
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    try:
        options = group._get_backend(torch.device(device)).options
    except (RuntimeError, AttributeError):  # no backend for this device, or one without options
        return None
    return options._timeout
