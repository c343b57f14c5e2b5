"""What regjax and regtorch say alike, written once: nothing here knows JAX or PyTorch.

Private: import from `regjax` or from `regtorch`.
"""
