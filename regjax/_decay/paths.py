"""Names of parameters: the path of a leaf in its pytree, as a readable string."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax

if TYPE_CHECKING:
    from jaxtyping import PyTree

    KeyPath = tuple[Any, ...]


def path_name(path: KeyPath) -> str:
    """Return the keys of a path joined by slashes, where PyTorch has dots; empty for the root."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named_leaves(tree: PyTree) -> list[tuple[str, Any]]:
    """Return pairs of name and leaf in the order of `jax.tree.leaves`; `None` has no leaf."""
    return [(path_name(path), leaf) for path, leaf in jax.tree.leaves_with_path(tree)]
