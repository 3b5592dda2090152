"""How messages become a sum: one process group, one thread, one order."""
