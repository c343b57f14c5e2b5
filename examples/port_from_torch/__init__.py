"""A PyTorch training run that continues in JAX, with a comparison of every step."""
