"""What every process leaves in shared memory: its collectives and its heartbeat."""
