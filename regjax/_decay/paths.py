"""Names of parameters: where a leaf sits in its tree, as a string that a person can read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax

if TYPE_CHECKING:
    from jaxtyping import PyTree

    KeyPath = tuple[Any, ...]


def path_name(path: KeyPath) -> str:
    """Name a place in a tree; the root itself is the empty string.

    Args:
        path: Keys of dicts, sequences, attributes and named tuples, as `jax.tree_util` gives them.

    Returns:
        The keys joined by slashes. `torch.nn.Module.named_parameters` joins with dots.

    Examples:
        >>> import jax
        >>> leaves = jax.tree.leaves_with_path({"layers": [{"kernel": 1.0}]})
        >>> [path_name(path) for path, leaf in leaves]
        ['layers/0/kernel']
    """
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named_leaves(tree: PyTree) -> list[tuple[str, Any]]:
    """List the leaves of a tree with their names, in the order of `jax.tree.leaves`.

    Args:
        tree: Any tree; `None` is an empty subtree.

    Returns:
        Pairs of name and leaf: what `torch.nn.Module.named_parameters` is to a module.

    Examples:
        >>> named_leaves({"dense": {"kernel": 2.0, "bias": None}, "scale": 1.0})
        [('dense/kernel', 2.0), ('scale', 1.0)]
    """
    return [(path_name(path), leaf) for path, leaf in jax.tree.leaves_with_path(tree)]
