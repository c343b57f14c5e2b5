"""Functions for Haiku: `dropout` in place of Haiku's own, and the rest of the family.

In a model written with `import haiku as hk`, import

    from regjax.haiku import dropout

and write `dropout` for `hk.dropout`: nothing else changes, and no float32 bit of what the model
computes. Every function takes its arguments in Haiku's order, `(rng, rate, x, …)`, and passes them
on to the function of its name in `regjax`, where it is described.

As in Haiku, evaluation is a rate of 0. A rate that changes while training costs one compilation
where it is traced:

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
from regjax._dropout.core import check_inexact, keep_mask, keep_prob_of
from regjax._layers import COMPARING, wrapped_dims
from regjax._random.bernoulli import Sampler, bernoulli, check_probability, exact_keep_prob
from regjax._random.events import observer
from regjax._random.keys import check_key, key_words

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
    """List what is public, for `dir` and completion."""
    return __all__


@naming(key="rng")
def dropout(
    rng: KeyLike | None,
    rate: ArrayLike,
    x: Inexact[ArrayLike, "*shape"],
    broadcast_dims: Sequence[int] = (),
    *,
    sampler: Sampler = bernoulli,
) -> Inexact[Array, "*shape"]:
    """`haiku.dropout`, faster: the same mask from the same key.

    It zeroes each element with probability `rate` and divides the others by `1 - rate`.

    In float32 the result is that of Haiku bit for bit, and so are gradients under `jit`: with
    `vmap`, `scan` and `checkpoint`, whether `rate` is a number or traced. (Tried on CPUs, under
    JAX's default configuration. Gradients taken outside of `jit` may differ in the last bit, and
    so may those of `broadcast_dims` inside a `scan`.) Half types differ, since Haiku divides in
    them; ours are scaled in float32 and rounded once.

    Where Haiku errs, this does not: the mean is right at rates above 1 - 2**-12 too, where Haiku
    divides by less than the share that it keeps; a dropped NaN is 0 also with `broadcast_dims`; a
    traced rate of 1 gives zeros and not NaN, and one out of range NaN and not plausible numbers; a
    NaN for a rate is refused, and so are integers, which Haiku turns into floats. A rate of lower
    precision, such as `np.float16(0.1)`, which draws other masks in Haiku, is rounded to float32
    here.

    Args:
        rng: the random key; `hk.next_rng_key()` inside a transformed function. Not looked at where
            `rate` is the number 0.
        rate: the probability that an element is zeroed, in [0, 1); a number or a traced scalar. 0
            in evaluation, which returns `x` itself.
        x: floating or complex, of any shape.
        broadcast_dims: dimensions along which one mask is shared, counted from the end if negative.
        sampler: what draws the mask: `regjax.bernoulli`, `regjax.packed_bernoulli`, or a function
            with their arguments. The one addition.

    Returns:
        An array of the shape and dtype of `x`.

    Raises:
        TypeError: `x` is of an integer or boolean dtype, or `rng` is not a key.
        ValueError: `rate` is a number outside of [0, 1), as in Haiku; `broadcast_dims` are not
            dimensions of `x`; or `rng` is a batch of keys.

    Example:
        >>> import haiku as hk, jax, jax.numpy as jnp
        >>> from regjax.haiku import dropout
        >>> def network(x, is_training):
        ...     x = jax.nn.relu(hk.Linear(8)(x))
        ...     return dropout(hk.next_rng_key(), 0.1 if is_training else 0.0, x)
        >>> network = hk.transform(network)
        >>> params = network.init(jax.random.key(0), jnp.ones((2, 4)), True)
        >>> network.apply(params, jax.random.key(1), jnp.ones((2, 4)), True).shape
        (2, 8)
        >>> dropout(jax.random.key(0), 0.5, jnp.arange(1.0, 7.0))
        Array([ 0.,  0.,  6.,  8.,  0., 12.], dtype=float32)
    """
    rate = check_probability("rate", rate)
    is_traced = isinstance(rate, jax.Array)
    if not is_traced and rate == 1:
        raise ValueError(f"rate must lie in [0, 1); got {rate}.")
    x = check_inexact(x)
    dims = wrapped_dims(broadcast_dims, x.ndim, of="x", error=ValueError)
    if not is_traced and rate == 0:
        return x
    key = check_key(rng)
    if x.dtype != jnp.float32 or sampler is not bernoulli:
        return regjax.dropout(x, rate, key=key, broadcast_dims=dims, sampler=sampler)
    if observers := observer():
        watched = _masked_at_tracer if is_traced else _masked_at_number
        dropped, keep = watched(x, key, rate, dims)
        observers.draw("dropout", key_words(key), rate, keep, x)
        return dropped
    return (_at_tracer if is_traced else _at_number)(x, key, rate, dims)


@naming(key="rng")
def feature_dropout(
    rng: KeyLike | None,
    rate: ArrayLike,
    x: Inexact[ArrayLike, "*shape"],
    channel_axis: int = -1,
    *,
    sampler: Sampler = bernoulli,
) -> Inexact[Array, "*shape"]:
    """`regjax.feature_dropout` in Haiku's order: zeroes whole channels of each row.

    Args:
        rng: the random key; not looked at where `rate` is the number 0 or 1.
        rate: the probability that a channel is zeroed, in [0, 1]; a number or a traced scalar.
        x: floating or complex, with the batch first.
        channel_axis: the dimension of the channels: the last, as Haiku's convolutions have them.
        sampler: what draws the mask.

    Returns:
        An array of the shape and dtype of `x`.

    Raises:
        TypeError: as `regjax.feature_dropout`.
        ValueError: as `regjax.feature_dropout`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from regjax.haiku import feature_dropout
        >>> feature_dropout(jax.random.key(0), 0.5, jnp.ones((2, 3, 3, 4)))[:, 0, 0, :]
        Array([[0., 0., 2., 2.],
               [0., 2., 2., 0.]], dtype=float32)
    """
    return regjax.feature_dropout(x, rate, key=rng, channel_axis=channel_axis, sampler=sampler)


@naming(key="rng")
def alpha_dropout(
    rng: KeyLike | None,
    rate: ArrayLike,
    x: Float[ArrayLike, "*shape"],
    broadcast_dims: Sequence[int] = (),
    *,
    sampler: Sampler = bernoulli,
) -> Float[Array, "*shape"]:
    """`regjax.alpha_dropout` in Haiku's order: keeps mean 0 and variance 1.

    Args:
        rng: the random key; not looked at where `rate` is the number 0 or 1.
        rate: the probability that an element is dropped, in [0, 1]; a number or a traced scalar.
        x: real floating, of any shape.
        broadcast_dims: dimensions along which one mask is shared, counted from the end if negative.
        sampler: what draws the mask.

    Returns:
        An array of the shape and dtype of `x`.

    Raises:
        TypeError: as `regjax.alpha_dropout`.
        ValueError: as `regjax.alpha_dropout`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from regjax.haiku import alpha_dropout
        >>> alpha_dropout(jax.random.key(0), 0.5, jnp.zeros(4))
        Array([-0.77919394, -0.77919394,  0.7791939 ,  0.7791939 ], dtype=float32)
    """
    dims = wrapped_dims(broadcast_dims, check_array("x", x).ndim, of="x", error=ValueError)
    return regjax.alpha_dropout(x, rate, key=rng, broadcast_dims=dims, sampler=sampler)


@naming(key="rng")
def feature_alpha_dropout(
    rng: KeyLike | None,
    rate: ArrayLike,
    x: Float[ArrayLike, "*shape"],
    channel_axis: int = -1,
    *,
    sampler: Sampler = bernoulli,
) -> Float[Array, "*shape"]:
    """`regjax.feature_alpha_dropout` in Haiku's order: alpha dropout of whole channels.

    Args:
        rng: the random key; not looked at where `rate` is the number 0 or 1.
        rate: the probability that a channel is dropped, in [0, 1]; a number or a traced scalar.
        x: real floating, with the batch first.
        channel_axis: the dimension of the channels: the last, as Haiku's convolutions have them.
        sampler: what draws the mask.

    Returns:
        An array of the shape and dtype of `x`.

    Raises:
        TypeError: as `regjax.feature_alpha_dropout`.
        ValueError: as `regjax.feature_alpha_dropout`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from regjax.haiku import feature_alpha_dropout
        >>> feature_alpha_dropout(jax.random.key(0), 0.5, jnp.zeros((1, 3, 4)))[0, 0]
        Array([-0.77919394, -0.77919394,  0.7791939 ,  0.7791939 ], dtype=float32)
    """
    return regjax.feature_alpha_dropout(
        x, rate, key=rng, channel_axis=channel_axis, sampler=sampler
    )


@naming(key="rng")
def drop_path(
    rng: KeyLike | None,
    rate: ArrayLike,
    x: Inexact[ArrayLike, "*shape"],
    mode: Literal["row", "batch"] = "row",
    *,
    scale_by_keep: bool = True,
    sampler: Sampler = bernoulli,
) -> Inexact[Array, "*shape"]:
    """`regjax.drop_path` in Haiku's order: zeroes what a row adds on its way, or keeps all of it.

    Args:
        rng: the random key; not looked at where `rate` is the number 0 or 1.
        rate: the probability that a path is zeroed, in [0, 1]; a number or a traced scalar.
        x: floating or complex, with the batch first.
        mode: "row" for one decision for each row, "batch" for one in all.
        scale_by_keep: whether a path that is kept is divided by `1 - rate`.
        sampler: what draws the decisions.

    Returns:
        An array of the shape and dtype of `x`.

    Raises:
        TypeError: as `regjax.drop_path`.
        ValueError: as `regjax.drop_path`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from regjax.haiku import drop_path
        >>> drop_path(jax.random.key(0), 0.5, jnp.ones((4, 2)))
        Array([[0., 0.],
               [0., 0.],
               [2., 2.],
               [2., 2.]], dtype=float32)
    """
    return regjax.drop_path(
        x, rate, key=rng, mode=mode, scale_by_keep=scale_by_keep, sampler=sampler
    )


@naming(key="rng")
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
    """`regjax.drop_block` in Haiku's order: zeroes blocks of neighbouring elements.

    Args:
        rng: the random key; not looked at where `rate` is the number 0 or 1.
        rate: about the share of elements that is zeroed, in [0, 1]; a number or a traced scalar.
        x: floating or complex, with the batch first.
        block_size: how many elements a block has along each spatial dimension.
        channel_axis: the dimension of the channels: the last, as Haiku's convolutions have them.
        share_channels: whether all channels of a row have one mask.
        gamma_scale: a factor of the probability that a block starts.
        scale_by_keep: whether elements that are kept are scaled.
        with_noise: whether dropped elements become normal variates, not 0.

    Returns:
        An array of the shape and dtype of `x`.

    Raises:
        TypeError: as `regjax.drop_block`.
        ValueError: as `regjax.drop_block`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from regjax.haiku import drop_block
        >>> y = drop_block(jax.random.key(1), 0.3, jnp.ones((1, 5, 8, 1)), block_size=3)
        >>> (y[0, :, :, 0] > 0).astype(int)
        Array([[1, 1, 1, 1, 1, 1, 1, 1],
               [0, 0, 0, 1, 1, 1, 1, 1],
               [0, 0, 0, 1, 1, 1, 1, 1],
               [0, 0, 0, 1, 1, 1, 1, 1],
               [1, 1, 1, 1, 1, 1, 1, 1]], dtype=int32)
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
def variational_dropout(
    rng: KeyLike | None,
    rate: ArrayLike,
    x: Inexact[ArrayLike, "*shape"],
    time_axis: int = 1,
    *,
    sampler: Sampler = bernoulli,
) -> Inexact[Array, "*shape"]:
    """`regjax.variational_dropout` in Haiku's order: one mask for all timesteps.

    Args:
        rng: the random key; not looked at where `rate` is the number 0 or 1.
        rate: the probability that an element is zeroed, in [0, 1]; a number or a traced scalar.
        x: floating or complex, with a time axis.
        time_axis: the dimension of time: 1 of (batch, time, features); 0 of (time, batch,
            features), as `hk.dynamic_unroll` has it by default.
        sampler: what draws the mask.

    Returns:
        An array of the shape and dtype of `x`.

    Raises:
        TypeError: as `regjax.variational_dropout`.
        ValueError: as `regjax.variational_dropout`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from regjax.haiku import variational_dropout
        >>> variational_dropout(jax.random.key(0), 0.5, jnp.ones((1, 2, 6)))
        Array([[[0., 0., 2., 2., 0., 2.],
                [0., 0., 2., 2., 0., 2.]]], dtype=float32)
    """
    return regjax.variational_dropout(x, rate, key=rng, time_axis=time_axis, sampler=sampler)


@naming(key="rng")
def embedding_dropout(
    rng: KeyLike | None,
    rate: ArrayLike,
    x: Inexact[ArrayLike, "*ids features"],
    ids: Integer[ArrayLike, "*ids"],
) -> Inexact[Array, "*ids features"]:
    """`regjax.embedding_dropout` in Haiku's order: zeroes words, wherever they occur.

    Args:
        rng: the random key; not looked at where `rate` is the number 0 or 1.
        rate: the probability that a word is zeroed, in [0, 1]; a number or a traced scalar.
        x: the embeddings of the words, one feature vector for each id.
        ids: the words.

    Returns:
        An array of the shape and dtype of `x`.

    Raises:
        TypeError: as `regjax.embedding_dropout`.
        ValueError: as `regjax.embedding_dropout`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from regjax.haiku import embedding_dropout
        >>> ids, table = jnp.array([0, 2, 0, 3]), jnp.ones((4, 2))
        >>> embedding_dropout(jax.random.key(0), 0.5, table[ids], ids)[:, 0]
        Array([0., 2., 0., 2.], dtype=float32)
    """
    return regjax.embedding_dropout(x, ids, rate, key=rng)


@naming(key="rng")
def drop_connect(
    rng: KeyLike | None,
    rate: ArrayLike,
    weights: PyTree,
    rule: Rule = "default",
    *,
    sampler: Sampler = bernoulli,
) -> PyTree:
    """`regjax.drop_connect` in Haiku's order: dropout of weights.

    Args:
        rng: the random key; not looked at where `rate` is the number 0 or 1.
        rate: the probability that a weight is zeroed, in [0, 1]; a number or a traced scalar.
        weights: one array, or parameters as Haiku keeps them.
        rule: which parameters are dropped.
        sampler: what draws the masks.

    Returns:
        What `weights` is.

    Raises:
        TypeError: as `regjax.drop_connect`.
        ValueError: as `regjax.drop_connect`.

    Example:
        >>> import haiku as hk, jax, jax.numpy as jnp
        >>> from regjax.haiku import drop_connect
        >>> key, x = jax.random.key(0), jnp.ones((2, 4))
        >>> network = hk.without_apply_rng(hk.transform(lambda x: hk.Linear(3)(x)))
        >>> params = network.init(key, x)
        >>> dropped = drop_connect(key, 0.5, params)
        >>> (dropped["linear"]["w"] != 0).astype(int)
        Array([[0, 0, 1],
               [0, 1, 1],
               [0, 1, 1],
               [1, 1, 0]], dtype=int32)
        >>> network.apply(dropped, x).shape
        (2, 3)
    """
    return regjax.drop_connect(weights, rate, key=rng, rule=rule, sampler=sampler)


@naming(key="rng")
def gaussian_dropout(
    rng: KeyLike | None, rate: ArrayLike, x: Float[ArrayLike, "*shape"]
) -> Float[Array, "*shape"]:
    """`regjax.gaussian_dropout` in Haiku's order: multiplies by normal numbers of mean 1.

    Args:
        rng: the random key; not looked at where `rate` is the number 0.
        rate: what the variance `rate / (1 - rate)` is made of; a number or a traced scalar.
        x: floating, of any shape.

    Returns:
        An array of the shape and dtype of `x`.

    Raises:
        TypeError: as `regjax.gaussian_dropout`.
        ValueError: as `regjax.gaussian_dropout`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from regjax.haiku import gaussian_dropout
        >>> gaussian_dropout(jax.random.key(0), 0.5, jnp.ones(3))
        Array([2.622642  , 3.0252647 , 0.56640565], dtype=float32)
    """
    return regjax.gaussian_dropout(x, rate, key=rng)


@naming(key="rng")
def gaussian_noise(
    rng: KeyLike | None, stddev: ArrayLike, x: Float[ArrayLike, "*shape"]
) -> Float[Array, "*shape"]:
    """`regjax.gaussian_noise` in Haiku's order: adds normal numbers.

    Args:
        rng: the random key; not looked at where `stddev` is the number 0.
        stddev: the standard deviation; a number or a traced scalar.
        x: floating, of any shape.

    Returns:
        An array of the shape and dtype of `x`.

    Raises:
        TypeError: as `regjax.gaussian_noise`.
        ValueError: as `regjax.gaussian_noise`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from regjax.haiku import gaussian_noise
        >>> gaussian_noise(jax.random.key(0), 0.5, jnp.zeros(3))
        Array([ 0.811321  ,  1.0126324 , -0.21679717], dtype=float32)
    """
    return regjax.gaussian_noise(x, stddev, key=rng)


def _as_theirs(
    x: Float[Array, "*shape"], key: KeyLike, rate: float | Float[Array, ""], dims: tuple[int, ...]
) -> Float[Array, "*shape"]:
    """`dropout` in the operations of Haiku, where XLA rounds those otherwise than ours."""

    def masked(x: Float[Array, "*shape"], key: KeyLike) -> Float[Array, "*shape"]:
        return _apply_mask(x, key, rate, dims)[0]

    return jax.checkpoint(masked, prevent_cse=False)(x, key)  # as in `regjax.dropout`


def _apply_mask(
    x: Float[Array, "*shape"], key: KeyLike, rate: float | Float[Array, ""], dims: tuple[int, ...]
) -> tuple[Float[Array, "*shape"], Bool[Array, "*mask"]]:
    """Return the result, and the mask."""
    q = exact_keep_prob(keep_prob_of(rate, x.dtype))
    if isinstance(q, jax.Array):
        # Below every number in [0, 1), -1 keeps nothing; a division by 0 would make NaN.
        q = jnp.where((q >= 0) & (q <= 1), jnp.where(q > 0, q, -1), jnp.nan)
    keep = keep_mask(x, key, q, dims, COMPARING)
    every = jnp.broadcast_to(keep, x.shape)
    return every.astype(x.dtype) * _finite(x, every) / q, keep


_at_number = jax.jit(_as_theirs, static_argnums=(2, 3))
_at_tracer = jax.jit(_as_theirs, static_argnums=3)
_masked_at_number = jax.jit(_apply_mask, static_argnums=(2, 3))
_masked_at_tracer = jax.jit(_apply_mask, static_argnums=3)


@jax.custom_jvp
def _finite(x: Float[Array, "*shape"], keep: Bool[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`x`, and 0 for what is dropped and not finite, which the product would turn into NaN."""
    return jnp.where(keep | jnp.isfinite(x), x, 0)


@_finite.defjvp
def _finite_jvp(primals, tangents):
    # The identity: the derivative of a selection would keep `x` for the backward pass.
    return _finite(*primals), tangents[0]
