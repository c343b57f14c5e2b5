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

if TYPE_CHECKING:
    import numpy as np
    from jax.typing import ArrayLike
    from jaxtyping import Array, Float, Inexact

    from regjax._random.keys import KeyLike


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
    """Zeroes each row of a batch with probability `rate` and divides the others by `1 - rate`.

    `x` is what a residual branch adds: `h + drop_path(branch(h), rate)`. A row whose branch is
    dropped skips that layer, so that in training the network is shorter for it. It is `dropout`
    whose mask is shared along every dimension but the batch, dimension 0: row n draws from the
    index n. `depth_rates` gives the rates of a stack of layers.

    Args:
        x: floating or complex, with the batch first.
        rate: the probability that a row is zeroed, in [0, 1]; a number or a traced scalar.
        key: the random key; see `dropout`.
        deterministic: True in evaluation: `x` itself.
        mode: "row" decides for each row, "batch" once for all of them.
        scale_by_keep: False leaves what is kept as it is. Then the mean changes with the rate, and
            evaluation sees branches that are stronger than in training.
        sampler: what draws the mask.

    Returns:
        An array of the shape, dtype and sharding of `x`.

    Raises:
        TypeError: as `dropout`.
        ValueError: as `dropout`; `mode` is neither of the two; or `x` has no dimension, and so no
            rows.

    PyTorch:
        `timm.layers.drop_path(x, rate, training, scale_by_keep)` and
        `torchvision.ops.stochastic_depth(x, p=rate, mode=mode, training=training)`.
        `regtorch.drop_path` with the same key gives the same result bit for bit.

    Example:
        >>> import jax, jax.numpy as jnp, regjax
        >>> x = jnp.ones((4, 3))
        >>> regjax.drop_path(x, 0.5, key=jax.random.key(0))
        Array([[0., 0., 0.],
               [0., 0., 0.],
               [2., 2., 2.],
               [2., 2., 2.]], dtype=float32)

    Source: Huang, Sun, Liu, Sedra, Weinberger, "Deep networks with stochastic depth", ECCV 2016,
    which multiplies by `1 - rate` in evaluation instead.
    """
    x = check_inexact(x)
    scale = inverse_keep_prob if check_bool("scale_by_keep", scale_by_keep) else _one
    spec = SampledMask("drop_path", mask_sampler(sampler), _shared_dims(x.ndim, mode), scale)
    return apply_dropout(spec, x, rate, key, deterministic)


def _check_mode(mode: str) -> str:
    """Returns the mode if it is one.

    Raises:
        ValueError: it is none.
    """
    return check_choice("mode", mode, ("row", "batch"))


def _shared_dims(ndim: int, mode: str) -> tuple[int, ...]:
    by_row = _check_mode(mode) == "row"
    if by_row and ndim == 0:
        raise ValueError(
            'x has no dimension, and so no rows. Give it a batch dimension, or pass mode="batch".'
        )
    return tuple(range(by_row, ndim))


def _one(keep_prob: float | Float[Array, ""], dtype: np.dtype) -> np.floating:
    return real_dtype(dtype)(1)
