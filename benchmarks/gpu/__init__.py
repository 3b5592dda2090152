"""What one GPU can prove of outlast, and how fast it is there: ``python -m benchmarks.gpu --out DIR``."""
