"""Wrong calls: `python -m tests.sweep`."""
