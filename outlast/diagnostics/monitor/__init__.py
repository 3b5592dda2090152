"""What a node does to its ranks: throttled cgroups, busy neighbours, swap, slow disks, stopped processes, clocks."""

from outlast.diagnostics.monitor.collector import Collector
from outlast.diagnostics.monitor.conditions import NodeCondition
from outlast.diagnostics.monitor.facts import facts_of
from outlast.diagnostics.monitor.memory import find_memory_cgroup
from outlast.diagnostics.monitor.monitor import NodeMonitor, NodeMonitored
from outlast.diagnostics.monitor.node_times import LeastDelay, NodeClock
from outlast.diagnostics.monitor.reports import Accused, NodeReport, ago

__all__ = [
    "Accused",
    "Collector",
    "LeastDelay",
    "NodeClock",
    "NodeCondition",
    "NodeMonitor",
    "NodeMonitored",
    "NodeReport",
    "ago",
    "facts_of",
    "find_memory_cgroup",
]
