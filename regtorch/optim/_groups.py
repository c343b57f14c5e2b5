"""Parameter groups with a learning rate and a decay for each layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from regshared.checks import check_coefficient
from regshared.layerwise import distances_from_top
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

    A scheduler multiplies the rates of all groups alike, so that the ratios stay.

    Args:
        params: A module, dict or iterable of parameters; see `regtorch.l2_penalty`.
        layer_of: Maps a parameter's name, such as `'layers.0.weight'`, to its layer: 0 next to the
            input (embeddings), the largest for the head.
        lr: $\eta$, the learning rate of layer `depth`.
        lr_factor: The ratio of a layer's learning rate to that of the layer above, such as 0.75.
        weight_decay: $\lambda$, the decay of layer `depth`.
        decay_factor: The ratio of a layer's decay to that of the layer above.
        depth: The layer with the rates `lr` and `weight_decay`; by default the largest layer.
        mask: Which parameters decay; see `regtorch.l2_penalty`. The others have a decay of 0.

    Returns:
        Groups for any optimizer of `torch.optim`, with the names of their parameters.

    Raises:
        TypeError: `layer_of` is not a function, or does not return an int; a rate is not a number,
            or `depth` not an integer.
        ValueError: A layer is negative or above `depth`, `depth` is negative, a rate is negative,
            infinite or NaN, or the mask does not fit; the message names it.

    Note (JAX):
        `regjax.optim.layerwise_scale`, for `scale_by_leaf` (learning rates) and
        `add_decay_by_leaf`; its names have slashes for dots.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
        >>> groups = layerwise_groups(model, lambda name: int(name[0]), lr=0.1, lr_factor=0.5)
        >>> [(group["lr"], [name for name, _ in group["params"]]) for group in groups]
        [(0.05, ['0.weight', '0.bias']), (0.1, ['1.weight', '1.bias'])]
        >>> optimizer = torch.optim.AdamW(groups)

    References:
        Clark et al. (ELECTRA), [ICLR 2020](https://arxiv.org/abs/2003.10555). Bao et al. (BEiT),
        [ICLR 2022](https://arxiv.org/abs/2106.08254).
    """
    check_coefficient("lr", lr, fix="Pass maximize=True to the optimizer to ascend.")
    check_coefficient("lr_factor", lr_factor, fix="Pass 1.0 for the same in all layers.")
    check_coefficient("weight_decay", weight_decay, fix="Pass 0.0 for none.")
    check_coefficient("decay_factor", decay_factor, fix="Pass 1.0 for the same in all layers.")
    leaves = named_leaves(params)
    check_mask(mask, weight_decay, leaves)
    distances = distances_from_top([name for name, _ in leaves], layer_of, depth)
    groups: dict[tuple[int, bool], list[tuple[str, Tensor]]] = {}
    for leaf, distance, decays in zip(leaves, distances, resolve_mask(mask, leaves), strict=True):
        groups.setdefault((distance, decays), []).append(leaf)
    return [
        {
            "params": members,
            "lr": lr * lr_factor**distance,
            "weight_decay": weight_decay * decay_factor**distance if decays else 0.0,
        }
        for (distance, decays), members in groups.items()
    ]
