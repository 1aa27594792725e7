"""Long measurements with their recorded results in `results/`. Run one with `python -m benchmarks.NAME`."""
