"""Who owns a place: one job at a time saves into a URL, or uses a run's directory."""

from outlast.checkpoint.ownership.holder import JOB, Holder
from outlast.checkpoint.ownership.lease import Lease, find_holder

__all__ = ["JOB", "Holder", "Lease", "find_holder"]
