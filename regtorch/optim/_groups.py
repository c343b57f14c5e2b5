"""Parameter groups with a learning rate and a decay for each layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from regshared.checks import check_callable, check_coefficient, check_integer
from regtorch._decay.paths import named_leaves
from regtorch._decay.validation import resolve_mask
from regtorch.optim._hooks import check_mask

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from regtorch._decay.paths import Params
    from regtorch._decay.validation import Mask


def layerwise_groups(
    params: Params,
    layer_of: Callable[[str], int],
    *,
    lr: float,
    lr_factor: float = 1.0,
    weight_decay: float = 0.0,
    decay_factor: float = 1.0,
    depth: int | None = None,
    mask: Mask = None,
) -> list[dict[str, Any]]:
    r"""Return parameter groups whose rates shrink geometrically from the top layer down.

    $$\eta_l = \eta \, \text{lr\_factor}^{\,\text{depth} - l}, \qquad
      \lambda_l = \lambda \, \text{decay\_factor}^{\,\text{depth} - l}$$

    A scheduler multiplies the rates of all groups alike, so the ratios stay.

    Args:
        params: A module, dict or iterable of parameters, as a penalty takes.
        layer_of: From a parameter's name, such as `'layers.0.weight'`, to its layer: 0 next to the
            input (embeddings), the largest for the head.
        lr: $\eta$, the learning rate of layer `depth`.
        lr_factor: The ratio of the learning rate of each layer to that of the layer above, such as
            0.75.
        weight_decay: $\lambda$, the decay of layer `depth`.
        decay_factor: The ratio of the decay of each layer to that of the layer above.
        depth: The layer whose rates are `lr` and `weight_decay`; by default the largest result of
            `layer_of`.
        mask: Which parameters decay, as in `regtorch.l2_penalty`; the others have a decay of 0.

    Returns:
        Groups for any optimizer of `torch.optim`, with the names of the parameters in them.

    Raises:
        TypeError: `layer_of` is not a function, or does not return an int; a rate is not a number,
            or `depth` not an integer.
        ValueError: A layer is negative or above `depth`, `depth` is negative, a rate is negative,
            infinite or NaN, or the mask does not match: the message names it.

    Note (JAX):
        `regjax.optim.layerwise_scale`, for `scale_by_leaf` (learning rates) and
        `add_decay_by_leaf`; its names have slashes for dots.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
        >>> groups = layerwise_groups(
        ...     model, lambda name: int(name.split(".")[0]), lr=0.1, lr_factor=0.5
        ... )
        >>> [(group["lr"], [name for name, _ in group["params"]]) for group in groups]
        [(0.05, ['0.weight', '0.bias']), (0.1, ['1.weight', '1.bias'])]
        >>> optimizer = torch.optim.AdamW(groups)

    References:
        Clark et al., [ELECTRA](https://arxiv.org/abs/2003.10555), ICLR 2020. Bao et al.,
        [BEiT](https://arxiv.org/abs/2106.08254), ICLR 2022.
    """
    check_callable("layer_of", layer_of, "from a parameter's name to its layer")
    if depth is not None:
        check_integer("depth", depth, minimum=0)
    check_coefficient("lr", lr, fix="to ascend, pass maximize=True to the optimizer")
    check_coefficient("lr_factor", lr_factor, fix="pass 1.0 for the same in all layers")
    check_coefficient("weight_decay", weight_decay, fix="pass 0.0 for none")
    check_coefficient("decay_factor", decay_factor, fix="pass 1.0 for the same in all layers")
    leaves = named_leaves(params)
    check_mask(mask, weight_decay, leaves)
    layers = [check_layer(name, layer_of(name), depth) for name, _ in leaves]
    top = max(layers, default=0) if depth is None else depth
    groups: dict[tuple[int, bool], list[tuple[str, Tensor]]] = {}
    for leaf, layer, decays in zip(leaves, layers, resolve_mask(mask, leaves), strict=True):
        groups.setdefault((layer, decays), []).append(leaf)
    return [
        {
            "params": members,
            "lr": lr * lr_factor ** (top - layer),
            "weight_decay": weight_decay * decay_factor ** (top - layer) if decays else 0.0,
        }
        for (layer, decays), members in groups.items()
    ]


def check_layer(name: str, layer: Any, depth: int | None) -> int:
    if not isinstance(layer, int) or isinstance(layer, bool):
        raise TypeError(f"layer_of('{name}') must be an int, but it is {layer!r}")
    if layer < 0 or (depth is not None and layer > depth):
        limit = "not negative" if depth is None else f"in [0, depth={depth}]"
        raise ValueError(f"layer_of('{name}') must be {limit}, but it is {layer}")
    return layer
