"""Dropout and L2 for PyTorch."""
