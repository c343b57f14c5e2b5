"""The code that regjax and regtorch share, which depends on neither JAX nor PyTorch.

Private: import from `regjax` or from `regtorch`.
"""

__version__ = "0.2.0"  # of the distribution
