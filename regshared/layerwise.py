"""The distance of each parameter's layer from the top, for rates that shrink from there down."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from regshared.checks import check_callable, check_integer


def distances_from_top(
    names: Iterable[str], layer_of: Callable[[str], int], depth: int | None
) -> list[int]:
    """Return for each parameter the number of layers from its own up to layer `depth`.

    Args:
        names: The names of the parameters.
        layer_of: A function from a name to a layer, 0 next to the input.
        depth: The top layer; the highest layer of all parameters if None.

    Raises:
        TypeError: `layer_of` is not a function, or a layer or `depth` is not an integer.
        ValueError: A layer is negative or above `depth`, or `depth` is negative.
    """
    check_callable("layer_of", layer_of, "from a parameter's name to its layer")
    if depth is not None:
        check_integer("depth", depth, minimum=0)
    layers = [
        check_integer(f"layer_of({name!r})", layer_of(name), minimum=0, maximum=depth)
        for name in names
    ]
    if not layers:
        return []
    top = max(layers) if depth is None else depth
    return [top - layer for layer in layers]
