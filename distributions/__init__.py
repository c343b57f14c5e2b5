"""Packaging: `python -m distributions` builds and tests the distributions that are published."""
