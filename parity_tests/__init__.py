"""Proof that regjax and regtorch agree."""
