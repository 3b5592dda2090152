"""Looking at checkpoints, comparing and pruning them without a training run."""
