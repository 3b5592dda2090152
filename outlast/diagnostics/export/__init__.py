"""A run's events, told to the programs in which people watch their jobs: Prometheus, OpenTelemetry and trackers."""
