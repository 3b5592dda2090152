"""What every rank keeps in shared memory, its collectives and its heartbeat, and which rank blocks the others."""

from outlast.diagnostics.live.heartbeat import PHASES, Beat, Heartbeat, Phase, read_heartbeat
from outlast.diagnostics.live.recorder import Collective, Recorder, Ring, read_ring
from outlast.diagnostics.live.shm import clear, heartbeat_path, remove_if_empty, ring_path, shm_directory
from outlast.diagnostics.live.stall import Culprit, Observation, StallRules, StallVerdict, judge, observe, process_state

__all__ = [
    "PHASES",
    "Beat",
    "Collective",
    "Culprit",
    "Heartbeat",
    "Observation",
    "Phase",
    "Recorder",
    "Ring",
    "StallRules",
    "StallVerdict",
    "clear",
    "heartbeat_path",
    "judge",
    "observe",
    "process_state",
    "read_heartbeat",
    "read_ring",
    "remove_if_empty",
    "ring_path",
    "shm_directory",
]
