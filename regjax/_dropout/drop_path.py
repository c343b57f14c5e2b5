"""Stochastic depth: the residual branch of a whole row is dropped or kept as one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from regjax._dropout.core import (
    SampledMask,
    apply_dropout,
    check_inexact,
    inverse_keep_prob,
    real_dtype,
)
from regjax._random.bernoulli import Sampler, bernoulli
from regjax._random.packed import mask_sampler
from regshared.checks import check_bool, check_choice
from regshared.spellings import explain_names

if TYPE_CHECKING:
    import numpy as np
    from jax.typing import ArrayLike
    from jaxtyping import Array, Float, Inexact

    from regjax._random.keys import KeyLike


@explain_names
def drop_path(
    x: Inexact[ArrayLike, "*shape"],
    rate: ArrayLike,
    *,
    key: KeyLike | None = None,
    deterministic: ArrayLike = False,
    mode: Literal["row", "batch"] = "row",
    scale_by_keep: bool = True,
    sampler: Sampler = bernoulli,
) -> Inexact[Array, "*shape"]:
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
        >>> import jax, jax.numpy as jnp, regjax
        >>> regjax.drop_path(jnp.ones((4, 3)), 0.5, key=jax.random.key(0))[:, 0]
        Array([0., 0., 2., 2.], dtype=float32)

    References:
        Huang et al., "Deep networks with stochastic depth", ECCV 2016, which multiplies by `1 -
        rate` in evaluation instead.
    """
    x = check_inexact(x)
    scale = inverse_keep_prob if check_bool("scale_by_keep", scale_by_keep) else _one
    spec = SampledMask("drop_path", mask_sampler(sampler), _shared_dims(x.ndim, mode), scale)
    return apply_dropout(spec, x, rate, key, deterministic)


def _check_mode(mode: str) -> str:
    return check_choice("mode", mode, ("row", "batch"))


def _shared_dims(ndim: int, mode: str) -> tuple[int, ...]:
    by_row = _check_mode(mode) == "row"
    if by_row and ndim == 0:
        raise ValueError(
            'x must have a batch dimension with mode="row"; got shape (). Pass mode="batch".'
        )
    return tuple(range(by_row, ndim))


def _one(keep_prob: float | Float[Array, ""], dtype: np.dtype) -> np.floating:
    return real_dtype(dtype)(1)
