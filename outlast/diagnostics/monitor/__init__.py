"""What a node does to its ranks: throttled cgroups, busy neighbours, swap, slow disks, stopped processes, clocks."""

from outlast.diagnostics.monitor.conditions import NodeCondition
from outlast.diagnostics.monitor.memory import find_memory_cgroup
from outlast.diagnostics.monitor.monitor import NodeMonitor, NodeMonitored

__all__ = ["NodeCondition", "NodeMonitor", "NodeMonitored", "find_memory_cgroup"]
