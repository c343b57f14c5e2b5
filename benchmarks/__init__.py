"""Programs that print and plot the figures README quotes: `python -m benchmarks.NAME`."""
