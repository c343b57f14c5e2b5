"""Uncertainty of predictions for corrupted digits, by Monte Carlo dropout."""
