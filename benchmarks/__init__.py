"""Programs that measure the figures in README: `python -m benchmarks.NAME`."""
