"""Stochastic depth: the residual branch of a whole row is dropped or kept as one."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from regshared.checks import check_bool, check_choice
from regshared.spellings import explain_names
from regtorch._dropout.core import SampledMask, apply_dropout, check_inexact, inverse_keep_prob
from regtorch._random.bernoulli import Sampler, bernoulli
from regtorch._random.packed import mask_sampler


@explain_names
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
    """Zero each row of a batch with probability `rate` and divide the others by `1 - rate`.

    `x` is the output of a residual branch: `h + drop_path(branch(h), rate)`. A row whose branch is
    dropped skips that layer, so that its network is shorter in training. It is `dropout` with a
    mask shared along every dimension but the batch, dimension 0: row n draws from the index n.
    `depth_rates` returns the rates of a stack of layers. The result and other errors are those of
    `dropout`.

    Args:
        x: Floating or complex, with the batch first.
        rate: See `dropout`.
        key: See `dropout`.
        deterministic: See `dropout`.
        mode: "row" decides for each row, "batch" once for all rows.
        scale_by_keep: False leaves kept rows unscaled. The mean then depends on the rate, and
            evaluation sees stronger branches than training.
        sampler: See `dropout`.

    Raises:
        ValueError: `mode` is neither of the two, or `x` is 0-d and has no rows.

    Note (PyTorch):
        `timm.layers.drop_path(x, rate, training, scale_by_keep)` and
        `torchvision.ops.stochastic_depth(x, p=rate, mode=mode, training=training)`.

    Example:
        >>> import torch, regtorch
        >>> regtorch.drop_path(torch.ones(4, 3), 0.5, key=regtorch.key(0))[:, 0]
        tensor([0., 0., 2., 2.])

    References:
        Huang et al., "Deep networks with stochastic depth", ECCV 2016, which multiplies by `1 -
        rate` in evaluation instead.
    """
    x = check_inexact(x)
    scale = inverse_keep_prob if check_bool("scale_by_keep", scale_by_keep) else _one
    spec = SampledMask("drop_path", mask_sampler(sampler), _shared_dims(x.ndim, mode), scale)
    return apply_dropout(spec, x, rate, key, deterministic)


def check_mode(mode: str) -> str:
    return check_choice("mode", mode, ("row", "batch"))


def _shared_dims(ndim: int, mode: str) -> tuple[int, ...]:
    by_row = check_mode(mode) == "row"
    if by_row and ndim == 0:
        raise ValueError(
            'x must have a batch dimension with mode="row"; got shape (). Pass mode="batch".'
        )
    return tuple(range(by_row, ndim))


def _one(keep_prob: float | Tensor, dtype: torch.dtype) -> float:
    return 1.0
