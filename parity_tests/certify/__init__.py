"""A certificate that a JAX program trains as an untouched PyTorch script does, from its seed."""
