"""A run for other tools: as a trace for Perfetto, and its collectives for torch's flight recorder analyser."""
