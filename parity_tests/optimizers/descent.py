"""SGD: its recursion in NumPy, and the cases to compare it in."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from parity_tests.optimizers.case import Case, Gradient, Leaves, Rate, at, decays, no_bias


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
    mask: Callable[[str], bool] | None = None,
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
        mask: From a name to whether it decays; None for all.

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
            g = (-raw if maximize else raw) + weight_decay * decays(mask, name) * w
            if momentum:
                buffers[name] = momentum * buffers[name] + (1 - dampening) * g if step else g
                g = g + momentum * buffers[name] if nesterov else buffers[name]
            params[name] = w - at(lr, step) * g
        step += 1
        yield dict(params)


CASES = (
    Case("sgd", "SGD", {"lr": 0.1}),
    Case("sgd-decay", "SGD", {"lr": 0.1, "weight_decay": 0.1}),
    Case("sgd-momentum", "SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    Case("sgd-dampening", "SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.4}),
    Case("sgd-dampening-only", "SGD", {"lr": 0.1, "dampening": 0.4, "weight_decay": 0.1}),
    Case(
        "sgd-nesterov",
        "SGD",
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    ),
    Case("sgd-maximize", "SGD", {"lr": 0.1, "weight_decay": 0.1, "maximize": True}),
    Case("sgd-schedule", "SGD", {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.1}, half_life=30),
    Case("sgd-mask", "SGD", {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.1}, mask=no_bias),
)
