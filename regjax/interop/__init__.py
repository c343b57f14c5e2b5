"""A PyTorch recipe, read off the torch objects that it is made of; torch itself is not imported."""

from regjax.interop._leaves import Leaf as Leaf
