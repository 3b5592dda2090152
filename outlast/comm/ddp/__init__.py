"""DDP and bare training loops."""
