"""Layers for Flax Linen: a drop-in `Dropout`, and the other members of the dropout family.

In a model written with `from flax import linen as nn`, import

    from regjax.linen import Dropout

and write `Dropout` for `nn.Dropout`. Nothing else changes, and float32 results stay bitwise
identical under the conditions that `Dropout` states. Every layer calls the function of its name in
`regjax`, which documents it; the layer's attributes are that function's arguments.

Every layer also accepts its rate (or standard deviation) in the call, where it overrides the
attribute. It may be traced, so a rate that changes with the step (see `regjax.linear_rate`), or
from layer to layer of a scanned stack (see `regjax.depth_rates`), costs one compilation.

    >>> import jax, jax.numpy as jnp
    >>> from flax import linen as nn
    >>> from regjax.linen import Dropout
    >>> class Model(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x, rate):
    ...         return Dropout(0.1, deterministic=False)(x, rate=rate)
    >>> @jax.jit
    ... def step(x, rate, key):
    ...     print("traced")
    ...     return Model().apply({}, x, rate, rngs={"dropout": key})
    >>> for rate in (0.0, 0.5, 1.0):
    ...     print(step(jnp.ones(6), rate, jax.random.key(0)))
    traced
    [1. 1. 1. 1. 1. 1.]
    [0. 2. 2. 0. 2. 2.]
    [0. 0. 0. 0. 0. 0.]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from regjax._dropout.alpha import alpha_dropout, feature_alpha_dropout
from regjax._dropout.drop_block import drop_block
from regjax._dropout.drop_connect import drop_connect
from regjax._dropout.drop_path import drop_path
from regjax._dropout.embedding import embedding_dropout
from regjax._dropout.features import feature_dropout
from regjax._dropout.gaussian import (
    check_noise_rate,
    check_stddev,
    gaussian_dropout,
    gaussian_noise,
)
from regjax._dropout.variational import variational_dropout
from regjax._layers import FlaxLayer, check_settings
from regjax._peers import flax_dropout
from regjax._random.bernoulli import Sampler, bernoulli, check_probability
from regshared.extras import needs
from regshared.spellings import explain_names_of

with needs("regjax.linen", extra="flax", package="flax"):
    from flax import linen

if TYPE_CHECKING:
    import numpy as np
    from jax.typing import ArrayLike
    from jaxtyping import Array, Float, Inexact, Integer, PyTree

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


class Layer(FlaxLayer, linen.Module, kw_only=True):
    """Base of all layers.

    Attributes:
        deterministic: True in evaluation; required here or in the call.
        rng_collection: The name of the rngs that the key is made from.
    """

    deterministic: ArrayLike | None = None
    rng_collection: str = "dropout"

    _key_name: ClassVar[str] = "rng"

    def __post_init__(self) -> None:
        check_settings(self)
        super().__post_init__()

    @linen.nowrap
    def _flag(self, deterministic: ArrayLike | None) -> Any:
        return linen.merge_param("deterministic", self.deterministic, deterministic)

    @linen.nowrap
    def _key(self, source: KeyLike | None) -> KeyLike:
        return self.make_rng(self.rng_collection) if source is None else source


class RateLayer(Layer):
    """Base of the layers that have a dropout rate.

    Attributes:
        rate: The dropout rate, in [0, 1].
    """

    rate: float | Float[Array, ""]

    def __post_init__(self) -> None:
        self._rate(None)
        super().__post_init__()

    @linen.compact  # as in Linen's own: an error outside a model
    def __call__(
        self,
        inputs: Inexact[ArrayLike, "*shape"],
        deterministic: ArrayLike | None = None,
        rng: KeyLike | None = None,
        *,
        rate: ArrayLike | None = None,
    ) -> Inexact[Array | np.ndarray, "*shape"]:
        """Apply dropout in training; return `inputs` itself in evaluation.

        Args:
            inputs: The array to drop.
            deterministic: True in evaluation; required here or in the constructor. May be traced.
            rng: The PRNG key; by default made from `rng_collection`.
            rate: Overrides the attribute. May be traced.
        """
        return self._call((inputs,), self._rate(rate), deterministic, rng)

    @linen.nowrap
    def _rate(self, rate: ArrayLike | None) -> ArrayLike:
        return check_probability("rate", self.rate if rate is None else rate)


class Dropout(RateLayer, linen.Dropout):
    """Drop-in replacement for `flax.linen.Dropout`: faster, and bitwise identical in float32.

    The module has the same path, so the same rngs give it the same key, and the same key gives it
    the same mask. It subclasses `flax.linen.Dropout`, for code that looks for one.

    Values and gradients are bitwise identical in float32 under `jit` on CPU, with JAX's defaults
    (x64 off, threefry keys). XLA adds in an order that depends on the program around a sum, so
    masks of fewer than 4,096 elements are drawn by Flax's own operations, at their speed. The last
    bit may still differ where a larger array is summed along a short odd axis, as in `(1024, 5)`,
    and where the input is a constant of the program, which XLA scales ahead of time. Outside `jit`,
    Flax's layer rounds differently under `grad`; this one does not.

    Differences from Flax:

    - Half types are scaled in float32 and rounded once; Flax divides in bfloat16, which shifts the
      mean.
    - The mean is correct above rate 1 - 2**-12 too, where Flax divides by less than it keeps.
    - `rate` and `deterministic` may be traced; in Flax this fails.
    - A rate out of range is a `ValueError`; Flax scales by a negative number.
    - `deterministic` must be a boolean; Flax takes `"False"` for True.
    - Masks are sharded like the array that they mask.

    Attributes:
        rate: The dropout rate, in [0, 1].
        broadcast_dims: Dimensions along which one mask is shared.
        deterministic: See `Layer`.
        rng_collection: See `Layer`.
        sampler: See `regjax.dropout`; `regjax.packed_bernoulli` is faster on CPUs and, as their
            compilers estimate, for most arrays on GPUs and TPUs.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> model = nn.Sequential([nn.Dense(8), Dropout(0.5, deterministic=False)])
        >>> rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
        >>> model.init_with_output(rngs, jnp.ones((1, 4)))[0].shape
        (1, 8)
    """

    _function = staticmethod(flax_dropout)

    # The rate and the flag may be arrays, which the fields of Flax's layer exclude.
    rate: float | Float[Array, ""]  # pyright: ignore[reportIncompatibleVariableOverride]
    broadcast_dims: Sequence[int] = ()
    deterministic: ArrayLike | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    rng_collection: str = "dropout"
    sampler: Sampler = bernoulli


class FeatureDropout(RateLayer, kw_only=True):
    """Dropout of whole channels: see `regjax.feature_dropout`."""

    _function = staticmethod(feature_dropout)

    channel_axis: int = -1
    sampler: Sampler = bernoulli


class AlphaDropout(RateLayer, kw_only=True):
    """Dropout for self-normalizing networks: see `regjax.alpha_dropout`."""

    _function = staticmethod(alpha_dropout)

    broadcast_dims: Sequence[int] = ()
    sampler: Sampler = bernoulli


class FeatureAlphaDropout(RateLayer, kw_only=True):
    """Alpha dropout of whole channels: see `regjax.feature_alpha_dropout`."""

    _function = staticmethod(feature_alpha_dropout)

    channel_axis: int = -1
    sampler: Sampler = bernoulli


class DropPath(RateLayer, kw_only=True):
    """Stochastic depth, which zeroes whole residual branches: see `regjax.drop_path`."""

    _function = staticmethod(drop_path)

    mode: Literal["row", "batch"] = "row"
    scale_by_keep: bool = True
    sampler: Sampler = bernoulli


class DropBlock(RateLayer, kw_only=True):
    """Dropout of contiguous blocks of feature maps: see `regjax.drop_block`."""

    _function = staticmethod(drop_block)

    block_size: int = 7
    channel_axis: int = -1
    share_channels: bool = False
    gamma_scale: float = 1.0
    scale_by_keep: bool = True
    with_noise: bool = False


class VariationalDropout(RateLayer, kw_only=True):
    """Dropout with one mask for all timesteps of a sequence: see `regjax.variational_dropout`."""

    _function = staticmethod(variational_dropout)

    time_axis: int = 1
    sampler: Sampler = bernoulli


class DropConnect(RateLayer, kw_only=True):
    """Dropout of weights, not activations: see `regjax.drop_connect`.

    Call it on an array of weights, or a pytree of them, before using them.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> class Dense(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, x, train):
        ...         kernel = self.param("kernel", nn.initializers.ones, (x.shape[-1], 3))
        ...         return x @ DropConnect(0.5, deterministic=not train)(kernel)
        >>> rngs = {"params": jax.random.key(0), "dropout": jax.random.key(0)}
        >>> Dense().init_with_output(rngs, jnp.ones((1, 4)), train=True)[0]
        Array([[6., 4., 6.]], dtype=float32)
    """

    _function = staticmethod(drop_connect)

    rule: Rule = "default"
    sampler: Sampler = bernoulli

    @linen.compact
    def __call__(
        self,
        inputs: PyTree,
        deterministic: ArrayLike | None = None,
        rng: KeyLike | None = None,
        *,
        rate: ArrayLike | None = None,
    ) -> PyTree:
        """Drop weights in training; return `inputs` itself in evaluation. See `RateLayer`."""
        return self._call((inputs,), self._rate(rate), deterministic, rng)


class EmbeddingDropout(RateLayer):
    """Dropout of words, at every occurrence in the batch: see `regjax.embedding_dropout`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> class Words(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, ids, train):
        ...         x = nn.Embed(100, 2)(ids)
        ...         return EmbeddingDropout(0.5, deterministic=not train)(x, ids)
        >>> ids = jnp.array([5, 6, 5])
        >>> rngs = {"params": jax.random.key(0), "dropout": jax.random.key(5)}
        >>> Words().init_with_output(rngs, ids, train=True)[0] != 0
        Array([[False, False],
               [ True,  True],
               [False, False]], dtype=bool)
    """

    _function = staticmethod(embedding_dropout)

    @linen.compact
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]  # it takes ids
        self,
        inputs: Inexact[ArrayLike, "*ids features"],
        ids: Integer[ArrayLike, "*ids"],
        deterministic: ArrayLike | None = None,
        rng: KeyLike | None = None,
        *,
        rate: ArrayLike | None = None,
    ) -> Inexact[Array | np.ndarray, "*ids features"]:
        """Apply dropout to `inputs`, the embeddings of `ids`; otherwise as in `RateLayer`."""
        return self._call((inputs, ids), self._rate(rate), deterministic, rng)


class GaussianDropout(RateLayer):
    """Multiplicative Gaussian noise with mean 1: see `regjax.gaussian_dropout`.

    The variance is `rate / (1 - rate)`, with the rate in [0, 1).
    """

    _function = staticmethod(gaussian_dropout)

    def __post_init__(self) -> None:
        check_noise_rate(self._rate(None))
        super().__post_init__()


class GaussianNoise(Layer):
    """Additive Gaussian noise with standard deviation `stddev`: see `regjax.gaussian_noise`."""

    _function = staticmethod(gaussian_noise)

    stddev: float | Float[Array, ""]

    keyless_rates: ClassVar[tuple[float, ...]] = (0,)

    def __post_init__(self) -> None:
        check_stddev(self.stddev)
        super().__post_init__()

    @linen.compact
    def __call__(
        self,
        inputs: Float[ArrayLike, "*shape"],
        deterministic: ArrayLike | None = None,
        rng: KeyLike | None = None,
        *,
        stddev: ArrayLike | None = None,
    ) -> Float[Array | np.ndarray, "*shape"]:
        """Add noise in training; return `inputs` itself in evaluation. See `RateLayer`."""
        stddev = check_stddev(self.stddev if stddev is None else stddev)
        return self._call((inputs,), stddev, deterministic, rng)


for _name in __all__:
    explain_names_of(globals()[_name])
