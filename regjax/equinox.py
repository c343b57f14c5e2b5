"""Layers for Equinox: a drop-in `Dropout`, and the other members of the dropout family.

In a model written with `import equinox as eqx`, import

    from regjax.equinox import Dropout

and write `Dropout` for `eqx.nn.Dropout`. Nothing else changes: a jitted model computes the same
float32 bits, with the exceptions that `Dropout` lists. Every layer calls the function of its name
in `regjax`, which documents it; the layer's attributes are that function's arguments.

As everywhere in Equinox, a layer is called on one example, with channels first (`channel_axis=0`)
and no batch dimension, and mapped over a batch with `jax.vmap` and one key per example. Where a
function draws one decision per row of a batch, its layer draws one per call.

Every layer has `p`, the dropout rate in [0, 1] (or `stddev`), and `inference`, True in evaluation.
Both are leaves of the model: `equinox.nn.inference_mode` switches all layers at once, and
`equinox.tree_at` changes a rate. A Python number recompiles when it changes; an array does not:

    >>> import equinox as eqx, jax, jax.numpy as jnp
    >>> from regjax.equinox import Dropout
    >>> @eqx.filter_jit
    ... def call(layer, x, key):
    ...     print("traced")
    ...     return layer(x, key=key)
    >>> layer, x, key = Dropout(), jnp.ones(6), jax.random.key(0)
    >>> for p in (0.0, 0.5, 0.75):
    ...     layer = eqx.tree_at(lambda layer: layer.p, layer, jnp.asarray(p))
    ...     print(call(layer, x, key))
    traced
    [1. 1. 1. 1. 1. 1.]
    [0. 0. 2. 2. 0. 2.]
    [0. 0. 0. 0. 0. 4.]

Every layer raises a `RuntimeError` when called in training without a key, as Equinox's does, and
otherwise the errors of its function.

All layers are in this one file, because pickled models name the module of their classes.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from regjax._checks import check_array, naming
from regjax._dropout.alpha import alpha, alpha_dropout, check_alpha_input
from regjax._dropout.core import (
    SampledMask,
    apply_dropout,
    check_axis,
    check_flag,
    check_inexact,
    dropout,
)
from regjax._dropout.drop_block import drop_block
from regjax._dropout.drop_connect import drop_connect
from regjax._dropout.drop_path import drop_path
from regjax._dropout.embedding import embedding_dropout
from regjax._dropout.gaussian import check_stddev, gaussian_dropout, gaussian_noise
from regjax._dropout.variational import variational_dropout
from regjax._layers import FunctionLayer, check_settings
from regjax._peers import COMPARING, DividedMask
from regjax._random.bernoulli import Sampler, bernoulli, check_probability
from regjax._random.packed import mask_sampler
from regshared.extras import needs
from regshared.spellings import explain_names_of

with needs("regjax.equinox", extra="equinox", package="equinox"):
    import equinox as eqx

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Array, Bool, Float, Inexact, Integer, PyTree

    from regjax._random.keys import KeyLike
    from regshared.decay_rules import Rule

__all__ = [
    "AlphaDropout",
    "DropBlock",
    "DropConnect",
    "DropPath",
    "Dropout",
    "EmbeddingDropout",
    "FeatureAlphaDropout",
    "FeatureDropout",
    "GaussianDropout",
    "GaussianNoise",
    "Layer",
    "RateLayer",
    "VariationalDropout",
]


def __dir__() -> list[str]:
    """List the public names."""
    return __all__


# Bound once: users may assign our class to `eqx.nn.Dropout`, which must not become its own base.
# Any, because Equinox annotates p without arrays.
_EquinoxDropout: Any = eqx.nn.Dropout


class Layer(FunctionLayer, eqx.Module):
    """Base of all layers."""

    def __check_init__(self) -> None:
        check_settings(self)

    # Any: each layer has `inference`, but after its rate, so it cannot be a field of this class.
    def _call(
        self: Any,
        inputs: Sequence[Any],
        rate_or_stddev: ArrayLike,
        key: KeyLike | None,
        inference: ArrayLike | None,
    ) -> Any:
        evaluates: ArrayLike = self.inference if inference is None else inference
        try:
            flag = check_flag(evaluates)
        except TypeError:
            raise TypeError(f"inference must be a boolean; got {evaluates!r}.") from None
        if flag is True or (isinstance(rate_or_stddev, int | float) and rate_or_stddev == 0):
            return inputs[0]
        name = type(self).__name__
        if key is None:
            raise RuntimeError(
                f"key must be a random key for {name} in training; got None. Pass "
                "key=jax.random.key(seed), or evaluate with equinox.nn.inference_mode(model)."
            )
        with jax.named_scope(f"regjax.equinox.{name}"), naming(weights="x"):
            return self._drop(inputs, rate_or_stddev, key=key, deterministic=flag)


class RateLayer(Layer):
    """Base of the layers that have a dropout rate.

    Attributes:
        p: The dropout rate, in [0, 1]; a number or an array.
        inference: True in evaluation, which returns the input itself.
    """

    p: float | Float[Array, ""] = 0.5
    inference: bool = False

    def __check_init__(self) -> None:
        check_probability("p", self.p)

    def __call__(
        self,
        x: Inexact[Array, "*shape"],
        *,
        key: KeyLike | None = None,
        inference: ArrayLike | None = None,
    ) -> Inexact[Array, "*shape"]:
        """Apply dropout in training; return `x` itself in evaluation.

        Args:
            x: One example, without a batch dimension.
            key: The PRNG key; required in training, unless `p` is the number 0.
            inference: Overrides the attribute unless None. May be traced.
        """
        return self._call((x,), self.p, key, inference)


class Dropout(RateLayer, _EquinoxDropout):  # pyright: ignore[reportIncompatibleVariableOverride]  # p may be an array
    """Drop-in replacement for `equinox.nn.Dropout`: faster, with the same mask from the same key.

    In training it zeroes each element with probability `p` and divides the others by `1 - p`. It
    subclasses `equinox.nn.Dropout`, for code that looks for one, and has its leaves, so a file of
    `equinox.tree_serialise_leaves` fits either.

    In float32, values and gradients are bitwise identical to Equinox's: eager and under `jit`,
    `vmap`, `scan` and `checkpoint`, whether `p` is a number, an array, or traced (tested on CPUs
    under JAX's default configuration). The last bits may differ in three cases:

    - XLA may fuse the mask with surrounding operations and contract their products and sums
      differently: since JAX 0.12 the gradients of a small convolutional network differ by one
      rounding, 3e-7 of the largest.
    - Before JAX 0.10 an eager call differs, because JAX rounds an eager division differently from
      one under `jit`.
    - An eager call on a single element may differ.

    Half types differ: Equinox divides in them; this layer scales in float32 and rounds once.

    It also fixes these cases: the mean is correct above `p` = 1 - 2**-12, where Equinox divides by
    less than it keeps; gradients at `p` = 1 are 0, not NaN; `inference` may be traced; integer
    inputs are an error; and a `p` outside [0, 1] is an error, or gives NaN if it is traced.

    Attributes:
        p: See `RateLayer`.
        inference: See `RateLayer`.
        sampler: See `regjax.dropout`. Equinox has no such attribute.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp
        >>> key = jax.random.key(0)
        >>> model = eqx.nn.Sequential([eqx.nn.Linear(4, 8, key=key), Dropout(0.1)])
        >>> jax.vmap(model)(jnp.ones((2, 4)), key=jax.random.split(key, 2)).shape
        (2, 8)

        Replace the layers of a model built elsewhere, such as the dropout inside attention:

        >>> def replace(node):
        ...     is_dropout = isinstance(node, eqx.nn.Dropout)
        ...     return Dropout(node.p, node.inference) if is_dropout else node
        >>> attention = eqx.nn.MultiheadAttention(2, 8, dropout_p=0.1, key=key)
        >>> attention = jax.tree.map(replace, attention, is_leaf=lambda x: replace(x) is not x)
        >>> type(attention.dropout).__module__
        'regjax.equinox'
    """

    sampler: Sampler = eqx.field(default=bernoulli, static=True, kw_only=True)

    def __init__(
        self,
        p: float | Float[Array, ""] = 0.5,
        inference: bool = False,
        *,
        deterministic: bool | None = None,
        sampler: Sampler = bernoulli,
    ) -> None:
        _EquinoxDropout.__init__(self, p, inference, deterministic=deterministic)
        self.sampler = sampler

    def __call__(
        self,
        x: Inexact[Array, "*shape"],
        *,
        key: KeyLike | None = None,
        inference: ArrayLike | None = None,
        deterministic: ArrayLike | None = None,
    ) -> Inexact[Array, "*shape"]:
        """Apply dropout in training; see `RateLayer`. `deterministic` is a deprecated name."""
        if deterministic is not None:
            warnings.warn(
                "Dropout()(deterministic=...) is deprecated. Pass inference=... instead.",
                stacklevel=2,
            )
            inference = deterministic
        return self._call((x,), self.p, key, inference)

    def _drop(self, inputs: Sequence[Any], p: ArrayLike, /, **options: Any) -> Any:
        """Apply `regjax.dropout` with the roundings of Equinox."""
        x = check_inexact(inputs[0])
        sampler = COMPARING if self.sampler is bernoulli else self.sampler
        if isinstance(p, Tracer):
            if x.dtype == jnp.float32 and self.sampler is bernoulli:
                return apply_dropout(DividedMask(_divide), x, p, **options)
        elif isinstance(lax.stop_gradient(p), jax.Array):
            # Equinox computes `1 - p` in float32 where this is an array: always under jit, and
            # outside jit in some versions of JAX. Otherwise it computes in Python's doubles.
            p = float(jnp.result_type(float).type(p))
        return dropout(x, p, sampler=sampler, **options)


class FeatureDropout(RateLayer):
    """Dropout of whole channels of one example: see `regjax.feature_dropout`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> images = jnp.ones((2, 4, 3, 3))  # batch, channels, height, width
        >>> keys = jax.random.split(jax.random.key(0), 2)
        >>> jax.vmap(lambda x, key: FeatureDropout(0.5)(x, key=key))(images, keys)[:, :, 0, 0]
        Array([[0., 2., 2., 2.],
               [2., 2., 0., 2.]], dtype=float32)
    """

    channel_axis: int = eqx.field(default=0, static=True, kw_only=True)
    sampler: Sampler = eqx.field(default=bernoulli, static=True, kw_only=True)

    def _drop(self, inputs: Sequence[Any], p: ArrayLike, /, **options: Any) -> Any:
        """Apply dropout with one mask for all dimensions but the channels; there are no rows."""
        (x,) = inputs
        dims = _all_but(self.channel_axis, check_array("x", x).ndim)
        spec = SampledMask("feature_dropout", mask_sampler(self.sampler), dims)
        return apply_dropout(spec, check_inexact(x), p, **options)


class AlphaDropout(RateLayer):
    """Dropout for self-normalizing networks: see `regjax.alpha_dropout`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> AlphaDropout(0.5)(jnp.zeros(4), key=jax.random.key(0))
        Array([-0.77919394, -0.77919394,  0.7791939 ,  0.7791939 ], dtype=float32)
    """

    _function = staticmethod(alpha_dropout)

    sampler: Sampler = eqx.field(default=bernoulli, static=True, kw_only=True)


class FeatureAlphaDropout(RateLayer):
    """Alpha dropout of whole channels of one example: see `regjax.feature_alpha_dropout`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> FeatureAlphaDropout(0.5)(jnp.zeros((4, 3)), key=jax.random.key(0))[:, 0]
        Array([-0.77919394, -0.77919394,  0.7791939 ,  0.7791939 ], dtype=float32)
    """

    channel_axis: int = eqx.field(default=0, static=True, kw_only=True)
    sampler: Sampler = eqx.field(default=bernoulli, static=True, kw_only=True)

    def _drop(self, inputs: Sequence[Any], p: ArrayLike, /, **options: Any) -> Any:
        """Apply alpha dropout with one mask for all dimensions but the channels."""
        (x,) = inputs
        dims = _all_but(self.channel_axis, check_array("x", x).ndim)
        spec = alpha("feature_alpha_dropout", self.sampler, dims)
        return apply_dropout(spec, check_alpha_input(x), p, **options)


class DropPath(RateLayer):
    """Stochastic depth, which zeroes the residual branch of one example: see `regjax.drop_path`.

    Each call draws one decision. Mapped over a batch with one key per example, that is one per row.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> keys = jax.random.split(jax.random.key(0), 4)
        >>> jax.vmap(lambda x, key: DropPath(0.5)(x, key=key))(jnp.ones((4, 2)), keys)
        Array([[0., 0.],
               [2., 2.],
               [0., 0.],
               [2., 2.]], dtype=float32)
    """

    _function = staticmethod(functools.partial(drop_path, mode="batch"))

    scale_by_keep: bool = eqx.field(default=True, static=True, kw_only=True)
    sampler: Sampler = eqx.field(default=bernoulli, static=True, kw_only=True)


class DropBlock(RateLayer):
    """Dropout of contiguous blocks of one example: see `regjax.drop_block`.

    The scale of each example is computed from its own mask, independently of other examples.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> layer = DropBlock(0.3, block_size=3)
        >>> images, keys = jnp.ones((2, 1, 5, 8)), jax.random.split(jax.random.key(1), 2)
        >>> jax.vmap(lambda x, key: layer(x, key=key))(images, keys).shape
        (2, 1, 5, 8)
    """

    block_size: int = eqx.field(default=7, static=True, kw_only=True)
    channel_axis: int = eqx.field(default=0, static=True, kw_only=True)
    share_channels: bool = eqx.field(default=False, static=True, kw_only=True)
    gamma_scale: float = eqx.field(default=1.0, static=True, kw_only=True)
    scale_by_keep: bool = eqx.field(default=True, static=True, kw_only=True)
    with_noise: bool = eqx.field(default=False, static=True, kw_only=True)

    def _drop(self, inputs: Sequence[Any], p: ArrayLike, /, **options: Any) -> Any:
        """Apply `regjax.drop_block` to a batch of one."""
        axis = self.channel_axis + (self.channel_axis >= 0)
        settings = {
            "block_size": self.block_size,
            "share_channels": self.share_channels,
            "gamma_scale": self.gamma_scale,
            "scale_by_keep": self.scale_by_keep,
            "with_noise": self.with_noise,
        }
        x = check_array("x", inputs[0])
        return drop_block(x[None], p, channel_axis=axis, **settings, **options)[0]


class VariationalDropout(RateLayer):
    """Dropout with one mask for all timesteps of one sequence: see `regjax.variational_dropout`.

    By default, `time_axis` is 0, for (time, features).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> VariationalDropout(0.5)(jnp.ones((2, 6)), key=jax.random.key(0))
        Array([[0., 0., 2., 2., 0., 2.],
               [0., 0., 2., 2., 0., 2.]], dtype=float32)
    """

    _function = staticmethod(variational_dropout)

    time_axis: int = eqx.field(default=0, static=True, kw_only=True)
    sampler: Sampler = eqx.field(default=bernoulli, static=True, kw_only=True)


class DropConnect(RateLayer):
    """Dropout of weights, an array or the kernels of a layer: see `regjax.drop_connect`.

    Call it on the holder of the weights; it returns the same pytree with some weights zeroed.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp
        >>> key = jax.random.key(0)
        >>> dropped = DropConnect(0.5)(eqx.nn.Linear(4, 3, key=key), key=key)
        >>> (dropped.weight != 0).astype(int)
        Array([[1, 1, 0, 0],
               [0, 0, 0, 1],
               [0, 0, 0, 1]], dtype=int32)
        >>> dropped(jnp.ones(4)).shape
        (3,)
    """

    _function = staticmethod(drop_connect)

    rule: Rule = eqx.field(default="default", static=True, kw_only=True)
    sampler: Sampler = eqx.field(default=bernoulli, static=True, kw_only=True)

    def __call__(
        self, x: PyTree, *, key: KeyLike | None = None, inference: ArrayLike | None = None
    ) -> PyTree:
        """Drop weights in training; return `x` itself in evaluation. See `RateLayer`."""
        return self._call((x,), self.p, key, inference)


class EmbeddingDropout(RateLayer):
    """Dropout of words, at every occurrence in one example: see `regjax.embedding_dropout`.

    With one key for all examples of a batch, a word is zeroed in all of them or in none; with one
    key per example, the examples are independent.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> ids, table = jnp.array([0, 2, 0, 3]), jnp.ones((4, 2))
        >>> EmbeddingDropout(0.5)(table[ids], ids, key=jax.random.key(0))[:, 0]
        Array([0., 2., 0., 2.], dtype=float32)
    """

    _function = staticmethod(embedding_dropout)

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]  # it takes ids
        self,
        x: Inexact[Array, "*ids features"],
        ids: Integer[Array, "*ids"],
        *,
        key: KeyLike | None = None,
        inference: ArrayLike | None = None,
    ) -> Inexact[Array, "*ids features"]:
        """Apply dropout to `x`, the embeddings of `ids` in one example; see `RateLayer`."""
        return self._call((x, ids), self.p, key, inference)


class GaussianDropout(RateLayer):
    """Multiplicative Gaussian noise with mean 1 and variance `p / (1 - p)`, with `p` in [0, 1).

    See `regjax.gaussian_dropout`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> GaussianDropout(0.5)(jnp.ones(3), key=jax.random.key(0))
        Array([2.622642  , 3.0252647 , 0.56640565], dtype=float32)
    """

    _function = staticmethod(gaussian_dropout)


class GaussianNoise(Layer):
    """Additive Gaussian noise with standard deviation `stddev`: see `regjax.gaussian_noise`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> GaussianNoise(0.5)(jnp.zeros(3), key=jax.random.key(0))
        Array([ 0.811321  ,  1.0126324 , -0.21679717], dtype=float32)
    """

    _function = staticmethod(gaussian_noise)

    stddev: float | Float[Array, ""]
    inference: bool = False

    def __check_init__(self) -> None:
        check_stddev(self.stddev)

    def __call__(
        self,
        x: Float[Array, "*shape"],
        *,
        key: KeyLike | None = None,
        inference: ArrayLike | None = None,
    ) -> Float[Array, "*shape"]:
        """Add noise in training; return `x` itself in evaluation. See `RateLayer`."""
        return self._call((x,), self.stddev, key, inference)


def _divide(
    keep: Bool[Array, "*shape"], x: Float[Array, "*shape"], keep_prob: Float[Array, ""]
) -> Float[Array, "*shape"]:
    """Divide the kept elements, as Equinox does at a traced rate."""
    dropped = jnp.where(jnp.isnan(keep_prob), jnp.nan, 0.0)
    return jnp.where(keep, x / keep_prob, dropped)


def _all_but(channel_axis: int, ndim: int) -> tuple[int, ...]:
    """Return all dimensions but the channels."""
    axis = check_axis("channel_axis", channel_axis, ndim)
    return tuple(dim for dim in range(ndim) if dim != axis)


for _name in __all__:
    explain_names_of(globals()[_name])
