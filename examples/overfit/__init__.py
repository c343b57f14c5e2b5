"""Overfitting and its remedies: the same five training runs in JAX and in PyTorch.

`python -m examples.overfit --help` lists the options. Read `train_jax.py` and `train_torch.py` side
by side; the other files contain their shared code.
"""
