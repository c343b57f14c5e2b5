"""Functions for Haiku: a drop-in `dropout`, and the other members of the dropout family.

In a model written with `import haiku as hk`, import

    from regjax.haiku import dropout

and write `dropout` for `hk.dropout`. Nothing else changes, and float32 results stay bitwise
identical under the conditions that `dropout` states. Every function takes its arguments in Haiku's
order, `(rng, rate, x, …)`, and calls the function of its name in `regjax`, which documents the
arguments, the results and the errors. `rng` is the key, and is not used where `rate` is the number
0 or 1.

As in Haiku, pass a rate of 0 for evaluation. A rate that changes during training costs one
compilation if it is traced:

    >>> import haiku as hk, jax, jax.numpy as jnp
    >>> from regjax.haiku import dropout
    >>> def network(x, rate):
    ...     print("traced")
    ...     return dropout(hk.next_rng_key(), rate, x)
    >>> network = hk.transform(network)
    >>> apply = jax.jit(network.apply)
    >>> for rate in (0.0, 0.5, 0.75):
    ...     print(apply({}, jax.random.key(0), jnp.ones(6), rate))
    traced
    [1. 1. 1. 1. 1. 1.]
    [2. 2. 0. 2. 2. 2.]
    [4. 4. 0. 0. 4. 4.]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp

import regjax
from regjax._checks import check_array, naming
from regjax._dropout.core import apply_dropout, check_inexact, is_number
from regjax._layers import wrapped_dims
from regjax._peers import DividedMask
from regjax._random.bernoulli import Sampler, bernoulli, check_probability
from regjax._random.keys import check_key
from regshared.spellings import explain_names

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Array, Bool, Float, Inexact, Integer, PyTree

    from regjax._random.keys import KeyLike
    from regshared.decay_rules import Rule


__all__ = [
    "alpha_dropout",
    "drop_block",
    "drop_connect",
    "drop_path",
    "dropout",
    "embedding_dropout",
    "feature_alpha_dropout",
    "feature_dropout",
    "gaussian_dropout",
    "gaussian_noise",
    "variational_dropout",
]


def __dir__() -> list[str]:
    """List the public names."""
    return __all__


@naming(key="rng")
@explain_names
def dropout(
    rng: KeyLike | None,
    rate: ArrayLike,
    x: Inexact[ArrayLike, "*shape"],
    broadcast_dims: Sequence[int] = (),
    *,
    sampler: Sampler = bernoulli,
) -> Inexact[Array, "*shape"]:
    """Drop-in replacement for `haiku.dropout`: faster, with the same mask from the same key.

    Zero each element with probability `rate` and divide the others by `1 - rate`.

    In float32 the result is bitwise identical to Haiku's, and so are gradients under `jit`: with
    `vmap`, `scan` and `checkpoint`, whether `rate` is a number or traced (tested on CPUs under
    JAX's default configuration). Gradients taken outside `jit` may differ in the last bit, and so
    may those with `broadcast_dims` inside a `scan`. Half types differ: Haiku divides in them; this
    function scales in float32 and rounds once.

    Differences from Haiku:

    - The mean is correct at rates above 1 - 2**-12, where Haiku divides by less than it keeps.
    - A dropped NaN is 0 with `broadcast_dims` too.
    - A traced rate of 1 gives zeros, not NaN; one out of range gives NaN, not plausible numbers.
    - A rate that is NaN is an error, and so are integer inputs, which Haiku casts to floats.
    - A rate of lower precision is rounded to float32; in Haiku it draws other masks.

    Args:
        rng: The PRNG key; `hk.next_rng_key()` inside a transformed function. Not used where `rate`
            is the number 0.
        rate: The dropout rate, in [0, 1); a number or a traced scalar. 0 in evaluation, which
            returns `x` itself.
        x: A floating or complex array of any shape.
        broadcast_dims: Dimensions along which one mask is shared, counted from the end if negative.
        sampler: See `regjax.dropout`. Haiku has no such argument.

    Returns:
        An array of the shape and dtype of `x`.

    Raises:
        TypeError: `x` is an integer or boolean array, or `rng` is not a key.
        ValueError: `rate` is a number outside [0, 1), as in Haiku; `broadcast_dims` are not
            dimensions of `x`; or `rng` is a batch of keys.

    Example:
        >>> import haiku as hk, jax, jax.numpy as jnp
        >>> def network(x, is_training):
        ...     x = jax.nn.relu(hk.Linear(8)(x))
        ...     return dropout(hk.next_rng_key(), 0.1 if is_training else 0.0, x)
        >>> network = hk.transform(network)
        >>> params = network.init(jax.random.key(0), jnp.ones((2, 4)), True)
        >>> network.apply(params, jax.random.key(1), jnp.ones((2, 4)), True).shape
        (2, 8)
    """
    rate = check_probability("rate", rate)
    if is_number(rate, 1):
        raise ValueError(f"rate must lie in [0, 1); got {rate}.")
    x = check_inexact(x)
    dims = wrapped_dims(broadcast_dims, x.ndim, of="x", error=ValueError)
    if is_number(rate, 0):
        return x
    key = check_key(rng)
    if x.dtype == jnp.float32 and sampler is bernoulli:
        return apply_dropout(DividedMask(_divide, dims), x, rate, key, deterministic=False)
    return regjax.dropout(x, rate, key=key, broadcast_dims=dims, sampler=sampler)


@naming(key="rng")
@explain_names
def feature_dropout(
    rng: KeyLike | None,
    rate: ArrayLike,
    x: Inexact[ArrayLike, "*shape"],
    channel_axis: int = -1,
    *,
    sampler: Sampler = bernoulli,
) -> Inexact[Array, "*shape"]:
    """Zero whole channels of each row: see `regjax.feature_dropout`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> feature_dropout(jax.random.key(0), 0.5, jnp.ones((2, 3, 3, 4)))[:, 0, 0, :]
        Array([[0., 0., 2., 2.],
               [0., 2., 2., 0.]], dtype=float32)
    """
    return regjax.feature_dropout(x, rate, key=rng, channel_axis=channel_axis, sampler=sampler)


@naming(key="rng")
@explain_names
def alpha_dropout(
    rng: KeyLike | None,
    rate: ArrayLike,
    x: Float[ArrayLike, "*shape"],
    broadcast_dims: Sequence[int] = (),
    *,
    sampler: Sampler = bernoulli,
) -> Float[Array, "*shape"]:
    """Apply dropout that preserves mean 0 and variance 1: see `regjax.alpha_dropout`.

    `broadcast_dims` count from the end if negative, as in `dropout`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> alpha_dropout(jax.random.key(0), 0.5, jnp.zeros(4))
        Array([-0.77919394, -0.77919394,  0.7791939 ,  0.7791939 ], dtype=float32)
    """
    dims = wrapped_dims(broadcast_dims, check_array("x", x).ndim, of="x", error=ValueError)
    return regjax.alpha_dropout(x, rate, key=rng, broadcast_dims=dims, sampler=sampler)


@naming(key="rng")
@explain_names
def feature_alpha_dropout(
    rng: KeyLike | None,
    rate: ArrayLike,
    x: Float[ArrayLike, "*shape"],
    channel_axis: int = -1,
    *,
    sampler: Sampler = bernoulli,
) -> Float[Array, "*shape"]:
    """Apply alpha dropout to whole channels: see `regjax.feature_alpha_dropout`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> feature_alpha_dropout(jax.random.key(0), 0.5, jnp.zeros((1, 3, 4)))[0, 0]
        Array([-0.77919394, -0.77919394,  0.7791939 ,  0.7791939 ], dtype=float32)
    """
    return regjax.feature_alpha_dropout(
        x, rate, key=rng, channel_axis=channel_axis, sampler=sampler
    )


@naming(key="rng")
@explain_names
def drop_path(
    rng: KeyLike | None,
    rate: ArrayLike,
    x: Inexact[ArrayLike, "*shape"],
    mode: Literal["row", "batch"] = "row",
    *,
    scale_by_keep: bool = True,
    sampler: Sampler = bernoulli,
) -> Inexact[Array, "*shape"]:
    """Zero whole residual branches (stochastic depth): see `regjax.drop_path`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> drop_path(jax.random.key(0), 0.5, jnp.ones((4, 2)))[:, 0]
        Array([0., 0., 2., 2.], dtype=float32)
    """
    return regjax.drop_path(
        x, rate, key=rng, mode=mode, scale_by_keep=scale_by_keep, sampler=sampler
    )


@naming(key="rng")
@explain_names
def drop_block(
    rng: KeyLike | None,
    rate: ArrayLike,
    x: Inexact[ArrayLike, "*shape"],
    block_size: int = 7,
    channel_axis: int = -1,
    *,
    share_channels: bool = False,
    gamma_scale: float = 1.0,
    scale_by_keep: bool = True,
    with_noise: bool = False,
) -> Inexact[Array, "*shape"]:
    """Zero contiguous blocks of feature maps: see `regjax.drop_block`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> y = drop_block(jax.random.key(1), 0.3, jnp.ones((1, 5, 8, 1)), block_size=3)
        >>> (y[0, 2, :, 0] > 0).astype(int)
        Array([0, 0, 0, 1, 1, 1, 1, 1], dtype=int32)
    """
    return regjax.drop_block(
        x,
        rate,
        key=rng,
        block_size=block_size,
        channel_axis=channel_axis,
        share_channels=share_channels,
        gamma_scale=gamma_scale,
        scale_by_keep=scale_by_keep,
        with_noise=with_noise,
    )


@naming(key="rng")
@explain_names
def variational_dropout(
    rng: KeyLike | None,
    rate: ArrayLike,
    x: Inexact[ArrayLike, "*shape"],
    time_axis: int = 1,
    *,
    sampler: Sampler = bernoulli,
) -> Inexact[Array, "*shape"]:
    """Apply dropout with one mask for all timesteps: see `regjax.variational_dropout`.

    `time_axis` is 1 for (batch, time, features), and 0 for (time, batch, features), the default
    layout of `hk.dynamic_unroll`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> variational_dropout(jax.random.key(0), 0.5, jnp.ones((1, 2, 6)))
        Array([[[0., 0., 2., 2., 0., 2.],
                [0., 0., 2., 2., 0., 2.]]], dtype=float32)
    """
    return regjax.variational_dropout(x, rate, key=rng, time_axis=time_axis, sampler=sampler)


@naming(key="rng")
@explain_names
def embedding_dropout(
    rng: KeyLike | None,
    rate: ArrayLike,
    x: Inexact[ArrayLike, "*ids features"],
    ids: Integer[ArrayLike, "*ids"],
) -> Inexact[Array, "*ids features"]:
    """Zero words at every occurrence in `ids`: see `regjax.embedding_dropout`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> ids, table = jnp.array([0, 2, 0, 3]), jnp.ones((4, 2))
        >>> embedding_dropout(jax.random.key(0), 0.5, table[ids], ids)[:, 0]
        Array([0., 2., 0., 2.], dtype=float32)
    """
    return regjax.embedding_dropout(x, ids, rate, key=rng)


@naming(key="rng")
@explain_names
def drop_connect(
    rng: KeyLike | None,
    rate: ArrayLike,
    weights: PyTree,
    rule: Rule = "default",
    *,
    sampler: Sampler = bernoulli,
) -> PyTree:
    """Zero weights, not activations: see `regjax.drop_connect`.

    `weights` is one array, or parameters in Haiku's format.

    Example:
        >>> import haiku as hk, jax, jax.numpy as jnp
        >>> key, x = jax.random.key(0), jnp.ones((2, 4))
        >>> network = hk.without_apply_rng(hk.transform(lambda x: hk.Linear(3)(x)))
        >>> dropped = drop_connect(key, 0.5, network.init(key, x))
        >>> network.apply(dropped, x).shape
        (2, 3)
    """
    return regjax.drop_connect(weights, rate, key=rng, rule=rule, sampler=sampler)


@naming(key="rng")
@explain_names
def gaussian_dropout(
    rng: KeyLike | None, rate: ArrayLike, x: Float[ArrayLike, "*shape"]
) -> Float[Array, "*shape"]:
    """Multiply by Gaussian noise with mean 1 and variance `rate / (1 - rate)`.

    See `regjax.gaussian_dropout`. `rng` is not used where `rate` is the number 0.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> gaussian_dropout(jax.random.key(0), 0.5, jnp.ones(3))
        Array([2.622642  , 3.0252647 , 0.56640565], dtype=float32)
    """
    return regjax.gaussian_dropout(x, rate, key=rng)


@naming(key="rng")
@explain_names
def gaussian_noise(
    rng: KeyLike | None, stddev: ArrayLike, x: Float[ArrayLike, "*shape"]
) -> Float[Array, "*shape"]:
    """Add Gaussian noise: see `regjax.gaussian_noise`.

    `rng` is not used where `stddev` is the number 0.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> gaussian_noise(jax.random.key(0), 0.5, jnp.zeros(3))
        Array([ 0.811321  ,  1.0126324 , -0.21679717], dtype=float32)
    """
    return regjax.gaussian_noise(x, stddev, key=rng)


def _divide(
    keep: Bool[Array, "*mask"], x: Float[Array, "*shape"], keep_prob: float | Float[Array, ""]
) -> Float[Array, "*shape"]:
    """Multiply by the mask and divide, as Haiku does."""
    every = jnp.broadcast_to(keep, x.shape)
    return every.astype(x.dtype) * _finite(x, every) / keep_prob


@jax.custom_jvp
def _finite(x: Float[Array, "*shape"], keep: Bool[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Return `x` with 0 for dropped non-finite elements, which the product would turn into NaN."""
    return jnp.where(keep | jnp.isfinite(x), x, 0)


@_finite.defjvp
def _finite_jvp(primals, tangents):
    # The identity, because the derivative of a select would store `x` for the backward pass.
    return _finite(*primals), tangents[0]
