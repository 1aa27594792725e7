"""What maps buy in real runs: `python -m benchmarks.runtime`."""
