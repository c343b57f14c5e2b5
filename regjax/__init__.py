"""Dropout and L2 for JAX."""
