"""Stochastic depth: the residual branch of a whole row is dropped or kept as one."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from regshared.checks import check_bool, check_choice
from regtorch._dropout.core import SampledMask, apply_dropout, check_inexact, inverse_keep_prob
from regtorch._random.bernoulli import Sampler, bernoulli
from regtorch._random.packed import mask_sampler


def drop_path(
    x: Tensor,
    rate: float | Tensor,
    *,
    key: Tensor | torch.Generator | None = None,
    deterministic: bool | Tensor = False,
    mode: Literal["row", "batch"] = "row",
    scale_by_keep: bool = True,
    sampler: Sampler = bernoulli,
) -> Tensor:
    """Zeroes each row of a batch with probability `rate` and divides the others by `1 - rate`.

    `x` is what a residual branch adds: `h + drop_path(branch(h), rate)`. A row whose branch is
    dropped skips that layer, so that in training the network is shorter for it. It is `dropout`
    whose mask is shared along every dimension but the batch, dimension 0: row n draws from the
    index n. `depth_rates` gives the rates of a stack of layers.

    Args:
        x: floating or complex, with the batch first.
        rate: the probability that a row is zeroed, in [0, 1]; a number or a 0-d tensor.
        key: the random key, or a `torch.Generator` from which one is drawn; see `dropout`.
        deterministic: True in evaluation: `x` itself.
        mode: "row" decides for each row, "batch" once for all of them.
        scale_by_keep: False leaves what is kept as it is. Then the mean changes with the rate, and
            evaluation sees branches that are stronger than in training.
        sampler: what draws the mask.

    Returns:
        A tensor of the shape, dtype and device of `x`.

    Raises:
        TypeError: as `dropout`.
        ValueError: as `dropout`; `mode` is neither of the two; or `x` has no dimension, and so no
            rows.

    PyTorch:
        `timm.layers.drop_path(x, rate, training, scale_by_keep)` and
        `torchvision.ops.stochastic_depth(x, p=rate, mode=mode, training=training)`.

    JAX:
        `regjax.drop_path` with the same key gives the same result bit for bit.

    Example:
        >>> import torch, regtorch
        >>> regtorch.drop_path(torch.ones(4, 3), 0.5, key=regtorch.key(0))
        tensor([[0., 0., 0.],
                [0., 0., 0.],
                [2., 2., 2.],
                [2., 2., 2.]])

    Source: Huang, Sun, Liu, Sedra, Weinberger, "Deep networks with stochastic depth", ECCV 2016,
    which multiplies by `1 - rate` in evaluation instead.
    """
    x = check_inexact(x)
    scale = inverse_keep_prob if check_bool("scale_by_keep", scale_by_keep) else _one
    spec = SampledMask("drop_path", mask_sampler(sampler), _shared_dims(x.ndim, mode), scale)
    return apply_dropout(spec, x, rate, key, deterministic)


def check_mode(mode: str) -> str:
    """Returns the mode if it is one.

    Raises:
        ValueError: it is none.
    """
    return check_choice("mode", mode, ("row", "batch"))


def _shared_dims(ndim: int, mode: str) -> tuple[int, ...]:
    by_row = check_mode(mode) == "row"
    if by_row and ndim == 0:
        raise ValueError(
            'x has no dimension, and so no rows. Give it a batch dimension, or pass mode="batch".'
        )
    return tuple(range(by_row, ndim))


def _one(keep_prob: float | Tensor, dtype: torch.dtype) -> float:
    return 1.0
