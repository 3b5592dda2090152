"""What theory guarantees, and a simulation of n ranks in one process."""

from outlast.comm.analysis import simulate as simulate
from outlast.comm.analysis import theory as theory
