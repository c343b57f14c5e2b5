"""Programs that a reader can copy from; run them as `python -m examples.<name>`."""
