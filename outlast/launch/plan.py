"""What the launcher would do, and what it adds to its ranks' environment."""

from __future__ import annotations

import os
import shlex

from outlast.launch.failures import WATCHED
from outlast.launch.flags import HANDLED_SIGNALS
from outlast.launch.ports import LOOPBACKS
from outlast.launch.rendezvous import Rendezvous, resolve
from outlast.launch.spec import LaunchSpec
from outlast.launch.standby.process import check_wanted
from outlast.launch.torch_options import local_ranks, torch_options

ELASTIC_SIGNALS = "TORCHELASTIC_SIGNALS_TO_HANDLE"
"""torchelastic's variable for the signals that it takes."""
COLLECTIVES_KEPT = 2000
"""By torch's flight recorder in each rank of a program; torch's own default for NCCL."""


def dry_run(spec: LaunchSpec) -> str:
    """Describe what :func:`launch` would do: the command, the environment it would add, and the rendezvous.

    Raises:
        ConfigError: as ``launch``.
    """
    rendezvous = resolve(spec.flags)
    check_wanted(spec)
    ranks = local_ranks(spec.flags.nproc_per_node)
    torch_options(spec.flags)
    least, most = rendezvous.min_nodes, rendezvous.max_nodes
    nodes = str(least) if least == most else f"{least} to {most}"
    added = worker_environment(spec, ranks, rendezvous)
    config = spec.effective()
    lines = [
        f"command     {shlex.join(spec.command)}",
        f"ranks       {ranks} on this node; nodes: {nodes}",
        f"rendezvous  {rendezvous.backend} at {rendezvous.endpoint} ({rendezvous.why}), id {rendezvous.run_id}",
        *(f"            {key}={value}" for key, value in sorted(rendezvous.conf.items())),
        f"environment {' '.join(f'{key}={value}' for key, value in sorted(added.items())) or '(unchanged)'}",
        "            plus torchrun's RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT, "
        "TORCHELASTIC_*",
        f"restarts    up to {config.max_restarts} after a failure"
        + (
            f" or a hang (no progress for {config.hang_floor_s:g} s and {config.hang_factor:g} median steps; "
            f"{config.startup_limit_s:g} s during set-up)"
            if config.watch
            else "; hangs are not detected"
        ),
        f"notice      {config.notice_grace_s:g} s to save a checkpoint and to end"
        if spec.obeys_notice
        else "notice      ends the ranks",
        f"directory   {spec.run_dir}",
    ]
    return "\n".join(lines)


def worker_environment(spec: LaunchSpec, ranks: int, rendezvous: Rendezvous) -> dict[str, str]:
    """Variables that the launcher adds to the ranks' environment unless they are set."""
    added = {"PYTHONUNBUFFERED": "1", WATCHED: "1"}
    if spec.flags.signals_to_handle != HANDLED_SIGNALS:
        added[ELASTIC_SIGNALS] = spec.flags.signals_to_handle
    if rendezvous.max_nodes == 1 and rendezvous.local_addr in LOOPBACKS:
        added["GLOO_SOCKET_IFNAME"] = "lo"  # else gloo listens where the host's name leads
    if spec.is_program:
        from outlast.diagnostics.live.flight import buffer_variable  # reading a command line imports no numpy

        added[buffer_variable()] = str(COLLECTIVES_KEPT)
    if ranks > 1:
        added["OMP_NUM_THREADS"] = "1"  # as torchrun does
    return {key: value for key, value in added.items() if key not in os.environ}
