"""The host memory that a save passes through."""
