"""Engines: what stands between the training loop and the library that replicates or shards the model."""
