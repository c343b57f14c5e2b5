"""Checks of the shapes of attention, (..., length, heads, features) in both packages."""

from __future__ import annotations

from collections.abc import Sequence


def check_attention_shapes(
    query: Sequence[int], key: Sequence[int], value: Sequence[int]
) -> tuple[int, ...]:
    """Return the shape of the weights, or raise a ValueError that names the wrong argument.

    Example:
        >>> check_attention_shapes((2, 5, 4, 8), (2, 7, 4, 8), (2, 7, 4, 3))
        (2, 4, 5, 7)
    """
    query, key, value = tuple(query), tuple(key), tuple(value)
    *batch, queries, heads, depth = query
    *key_batch, keys, kv_heads, key_depth = key
    if key_batch != batch or key_depth != depth:
        raise ValueError(
            f"query and key must have the same batch and depth; got shapes {query} and {key}."
        )
    if value[:-1] != key[:-1]:
        raise ValueError(
            f"value must have key's shape {key[:-1]} before its features; got {value}."
        )
    if not kv_heads or heads % kv_heads:
        raise ValueError(f"query must have a multiple of key's {kv_heads} heads; got {heads}.")
    return (*batch, heads, queries, keys)


def check_broadcasts(name: str, shape: Sequence[int], weights: tuple[int, ...]) -> None:
    """Reject a bias or a mask that does not broadcast to the shape of the weights."""
    pairs = zip(shape[::-1], weights[::-1], strict=False)
    if len(shape) > len(weights) or any(size not in (1, full) for size, full in pairs):
        raise ValueError(
            f"{name} must broadcast to (..., heads, queries, keys) = {weights}; got {tuple(shape)}."
        )
