"""The recursions of L2, SGD, Adam and AdamW in NumPy: the third party that both wings must match.

Written from the formulas, one parameter and one step at a time; it imports neither JAX nor PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

Leaves = Mapping[str, np.ndarray]
Gradient = Callable[[Leaves, int], Leaves]
Rate = float | Callable[[int], float]


def l2_penalty(
    params: Leaves, weight_decay: float, mask: Mapping[str, bool] | None = None
) -> float:
    """Sum squares, in double.

    Args:
        params: Arrays by name.
        weight_decay: The coefficient.
        mask: Which names count; None for all.

    Returns:
        `weight_decay` times the sum of `|w|**2`.

    Examples:
        >>> l2_penalty({"w": np.array([3.0, 4.0])}, 0.5)
        12.5
    """
    wide = [np.abs(w).astype(np.float64) for name, w in params.items() if _decays(mask, name)]
    return weight_decay * float(sum(np.sum(w**2) for w in wide))


def l2_gradient(
    params: Leaves, weight_decay: float, mask: Mapping[str, bool] | None = None
) -> dict[str, np.ndarray]:
    """Differentiate `l2_penalty`, as PyTorch does where parameters are complex.

    Args:
        params: Arrays by name.
        weight_decay: The coefficient.
        mask: Which names count; None for all.

    Returns:
        `2 * weight_decay * w` where the mask allows, else zeros.

    Examples:
        >>> l2_gradient({"w": np.array([3.0, 4.0])}, 0.5)
        {'w': array([3., 4.])}
    """
    return {name: 2 * weight_decay * w * _decays(mask, name) for name, w in params.items()}


def sgd(
    params: Leaves,
    gradient: Gradient,
    *,
    lr: Rate = 1e-3,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    mask: Mapping[str, bool] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Walk as `torch.optim.SGD` documents it.

    Args:
        params: Where to start.
        gradient: From parameters and step, counted from 0, to gradients.
        lr: Learning rate, or a function from step to it.
        momentum: Factor of the buffer.
        dampening: How much of each gradient but the first is kept out of the buffer.
        weight_decay: Coupled decay.
        nesterov: Whether to look ahead.
        maximize: Whether to ascend.
        mask: Which names decay; None for all.

    Yields:
        The parameters after each step, without end.

    Examples:
        >>> walk = sgd({"w": np.array([1.0])}, lambda params, step: params, lr=0.5)
        >>> next(walk)["w"].item(), next(walk)["w"].item()
        (0.5, 0.25)
    """
    params, buffers, step = dict(params), {}, 0
    while True:
        for name, raw in gradient(params, step).items():
            w = params[name]
            g = (-raw if maximize else raw) + weight_decay * _decays(mask, name) * w
            if momentum:
                buffers[name] = momentum * buffers[name] + (1 - dampening) * g if step else g
                g = g + momentum * buffers[name] if nesterov else buffers[name]
            params[name] = w - _at(lr, step) * g
        step += 1
        yield dict(params)


def adam(
    params: Leaves,
    gradient: Gradient,
    *,
    lr: Rate = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    maximize: bool = False,
    decoupled_weight_decay: bool = False,
    mask: Mapping[str, bool] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Walk as `torch.optim.Adam` documents it.

    Args:
        params: Where to start.
        gradient: From parameters and step, counted from 0, to gradients.
        lr: Learning rate, or a function from step to it.
        betas: Decay rates of the two moments.
        eps: Added to the root.
        weight_decay: Decay, coupled unless told otherwise.
        amsgrad: Whether to divide by the largest second moment so far, uncorrected.
        maximize: Whether to ascend.
        decoupled_weight_decay: Whether the decay goes past the moments.
        mask: Which names decay; None for all.

    Yields:
        The parameters after each step, without end.

    Examples:
        >>> walk = adam({"w": np.array([1.0])}, lambda params, step: params, lr=0.5, eps=0.0)
        >>> next(walk)["w"].item()
        0.5
    """
    b1, b2 = betas
    params, step = dict(params), 0
    m = {name: np.zeros_like(w) for name, w in params.items()}
    v = {name: np.zeros_like(w) for name, w in params.items()}
    largest = {name: np.zeros_like(w) for name, w in params.items()}
    while True:
        for name, raw in gradient(params, step).items():
            w, g, eta = params[name], -raw if maximize else raw, _at(lr, step)
            decay = weight_decay * _decays(mask, name)
            if decoupled_weight_decay:
                w = w - eta * decay * w
            else:
                g = g + decay * w
            m[name] = b1 * m[name] + (1 - b1) * g
            v[name] = b2 * v[name] + (1 - b2) * g * g
            largest[name] = np.maximum(largest[name], v[name])
            second = largest[name] if amsgrad else v[name]
            corrected = m[name] / (1 - b1 ** (step + 1)), second / (1 - b2 ** (step + 1))
            params[name] = w - eta * corrected[0] / (np.sqrt(corrected[1]) + eps)
        step += 1
        yield dict(params)


def adamw(
    params: Leaves, gradient: Gradient, *, weight_decay: float = 1e-2, **options
) -> Iterator[dict[str, np.ndarray]]:
    """Walk as `torch.optim.AdamW` documents it: `adam`, decoupled, with its own default decay.

    Args:
        params: Where to start.
        gradient: From parameters and step, counted from 0, to gradients.
        weight_decay: Decoupled decay.
        **options: The other options of `adam`.

    Returns:
        An iterator over the parameters after each step, without end.

    Examples:
        >>> walk = adamw({"w": np.array([1.0])}, lambda params, step: {"w": np.zeros(1)}, lr=0.5)
        >>> next(walk)["w"].item()
        0.995
    """
    return adam(params, gradient, weight_decay=weight_decay, decoupled_weight_decay=True, **options)


def _decays(mask: Mapping[str, bool] | None, name: str) -> bool:
    return mask is None or mask[name]


def _at(rate: Rate, step: int) -> float:
    return rate(step) if callable(rate) else rate
