"""What theory guarantees, and a simulation of n ranks in one process."""
