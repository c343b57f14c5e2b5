"""What regjax and regtorch say alike, written once: nothing here knows JAX or PyTorch.

Private: import from `regjax` or from `regtorch`.
"""

__version__ = "0.2.0"  # of the distribution
