"""Overfitting, seen and cured: the same five runs in JAX and in PyTorch.

`python -m examples.overfit --help` lists the options. `train_jax.py` and `train_torch.py` are meant
to be read side by side; the other files hold what the two share.
"""
