"""Checks whether this machine can run outlast."""
