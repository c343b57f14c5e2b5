"""Names of parameters: the path of a leaf in its pytree, as a readable string."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax

if TYPE_CHECKING:
    from jaxtyping import PyTree

    KeyPath = tuple[Any, ...]


def path_name(path: KeyPath) -> str:
    """Return the keys of a path joined by slashes; the root is the empty string.

    `torch.nn.Module.named_parameters` joins with dots.

    Example:
        >>> import jax
        >>> leaves = jax.tree.leaves_with_path({"layers": [{"kernel": 1.0}]})
        >>> [path_name(path) for path, leaf in leaves]
        ['layers/0/kernel']
    """
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named_leaves(tree: PyTree) -> list[tuple[str, Any]]:
    """Return pairs of name and leaf, in the order of `jax.tree.leaves`; `None` is an empty subtree.

    Example:
        >>> named_leaves({"dense": {"kernel": 2.0, "bias": None}, "scale": 1.0})
        [('dense/kernel', 2.0), ('scale', 1.0)]
    """
    return [(path_name(path), leaf) for path, leaf in jax.tree.leaves_with_path(tree)]
