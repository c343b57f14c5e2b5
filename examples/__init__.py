"""Example programs: `python -m examples.NAME`."""
