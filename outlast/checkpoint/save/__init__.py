"""One save, from the snapshot to the commit record."""
