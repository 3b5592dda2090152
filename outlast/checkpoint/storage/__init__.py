"""Where checkpoints are stored: a local directory or any fsspec URL."""
