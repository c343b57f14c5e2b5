"""Layers for Flax NNX: a drop-in `Dropout`, and the other members of the dropout family.

In a model written with `from flax import nnx`, import

    from regjax.nnx import Dropout

and write `Dropout` for `nnx.Dropout`. Nothing else changes, and float32 results stay bitwise
identical under the conditions that `Dropout` states. Every layer calls the function of its name in
`regjax`, which documents it; the layer's attributes are that function's arguments.

Every layer also accepts its rate (or standard deviation) in the call, where it overrides the
attribute, and `nnx.view(model, rate=rate)` sets it in all layers of a model. It may be traced, so a
rate that changes with the step (see `regjax.linear_rate`) costs one compilation.

    >>> import jax, jax.numpy as jnp
    >>> from flax import nnx
    >>> from regjax.nnx import Dropout
    >>> model = nnx.Sequential(Dropout(0.1, rngs=nnx.Rngs(0)))
    >>> @nnx.jit
    ... def step(model, x, rate):
    ...     print("traced")
    ...     return nnx.view(model, rate=rate)(x)
    >>> for rate in (0.0, 0.5, 1.0):
    ...     print(step(model, jnp.ones(6), rate))
    traced
    [1. 1. 1. 1. 1. 1.]
    [2. 2. 2. 0. 2. 0.]
    [0. 0. 0. 0. 0. 0.]

All layers are in this one file, because pickled models name the module of their classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import jax

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

with needs("regjax.nnx", extra="flax", package="flax"):
    from flax import nnx

if TYPE_CHECKING:
    import numpy as np
    from jax.typing import ArrayLike
    from jaxtyping import Array, Float, Inexact, Integer, PyTree

    from regjax._random.keys import KeyLike
    from regshared.decay_rules import Rule

    Source = nnx.Rngs | nnx.RngStream | KeyLike


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


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class Layer(FlaxLayer, nnx.Module):
    """Base of all layers.

    Attributes:
        deterministic: True in evaluation; `train()` and `eval()` of a model set it.
        rng_collection: The name of the stream that the key is taken from.
        rngs: The layer's own stream, forked from the one passed to the constructor.
    """

    deterministic: bool | None = False
    rng_collection: str = "dropout"
    rngs: nnx.Rngs | nnx.RngStream | None = nnx.data(default=None)  # noqa: RUF009  # a field

    _key_name: ClassVar[str] = "rngs"

    def __post_init__(self) -> None:
        check_settings(self)
        if isinstance(self.rngs, nnx.Rngs):
            self.rngs = self.rngs[self.rng_collection].fork()
        elif isinstance(self.rngs, nnx.RngStream):
            self.rngs = self.rngs.fork()
        elif self.rngs is not None:
            raise TypeError(f"rngs must be an Rngs, an RngStream or None; got {self.rngs!r}.")

    def set_view(self, deterministic: bool | None = None) -> None:
        """Set what `nnx.view` passes.

        Args:
          deterministic: True in evaluation.
        """  # indented as `nnx.view_info` reads it
        if deterministic is not None:
            self.deterministic = deterministic

    def _flag(self, deterministic: ArrayLike | None) -> ArrayLike:
        deterministic = self.deterministic if deterministic is None else deterministic
        if deterministic is None:
            raise ValueError(
                f"deterministic must be a boolean for {type(self).__name__}; got None. Pass it to "
                "the constructor or the call, or set it for a whole model with model.train(), "
                "model.eval() or nnx.view(model, deterministic=...)."
            )
        return deterministic

    def _key(self, source: Source | None) -> KeyLike:
        rngs = self.rngs if source is None else source
        if isinstance(rngs, nnx.Rngs):
            return rngs[self.rng_collection]()
        if isinstance(rngs, nnx.RngStream):
            return rngs()
        if isinstance(rngs, jax.Array):
            return rngs
        if rngs is None:
            raise ValueError(
                f"rngs must hold a key for {type(self).__name__} in training; got None. Pass "
                "rngs=nnx.Rngs(seed) to the constructor or the call, or deterministic=True to "
                "evaluate."
            )
        raise TypeError(f"rngs must be an Rngs, an RngStream or a key; got {rngs!r}.")


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class RateLayer(Layer):
    """Base of the layers that have a dropout rate.

    Attributes:
        rate: The dropout rate, in [0, 1]; a number, or an `nnx.Variable` that holds one.
    """

    rate: ArrayLike | nnx.Variable[Any] = dataclasses.field(kw_only=False)

    def __post_init__(self) -> None:
        self._rate(None)
        super().__post_init__()

    def __call__(
        self,
        inputs: Inexact[ArrayLike, "*shape"],
        *,
        deterministic: ArrayLike | None = None,
        rngs: Source | None = None,
        rate: ArrayLike | None = None,
    ) -> Inexact[Array | np.ndarray, "*shape"]:
        """Apply dropout in training; return `inputs` itself in evaluation.

        Args:
            inputs: The array to drop.
            deterministic: True in evaluation; overrides the attribute. May be traced.
            rngs: The source of the PRNG key, or the key; overrides the layer's stream.
            rate: Overrides the attribute. May be traced.
        """
        return self._call((inputs,), self._rate(rate), deterministic, rngs)

    def set_view(self, deterministic: bool | None = None, rate: ArrayLike | None = None) -> None:
        """Set what `nnx.view` passes.

        Args:
          deterministic: True in evaluation.
          rate: The dropout rate, in [0, 1].
        """
        super().set_view(deterministic)
        if rate is not None:
            self.rate = _settable(rate)

    def _rate(self, rate: ArrayLike | None) -> ArrayLike:
        return check_probability("rate", _number(self.rate if rate is None else rate))


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class Dropout(RateLayer, nnx.Dropout):
    """Drop-in replacement for `flax.nnx.Dropout`: faster, and bitwise identical in float32.

    The same rngs give it the same key, and the same key gives it the same mask. Its state has the
    structure of NNX's own, so each can restore the other's checkpoints. It subclasses
    `flax.nnx.Dropout`, for code and filters that look for one.

    `regjax.linen.Dropout` states where the results are bitwise identical to Flax's, and how the two
    differ. In sharding, the difference here is that a mask shared along sharded dimensions is laid
    out without them.

    Attributes:
        rate: See `RateLayer`.
        broadcast_dims: Dimensions along which one mask is shared.
        deterministic: See `Layer`.
        rng_collection: See `Layer`.
        rngs: See `Layer`.
        sampler: See `regjax.dropout`; `regjax.packed_bernoulli` is faster on CPUs and, as their
            compilers estimate, for most arrays on GPUs and TPUs.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> rngs, x = nnx.Rngs(0), jnp.ones((1, 4))
        >>> model = nnx.Sequential(nnx.Linear(4, 8, rngs=rngs), Dropout(0.5, rngs=rngs))
        >>> bool((model(x) == model(x)).all())
        False
        >>> model.eval()
        >>> bool((model(x) == model(x)).all())
        True
    """

    _function = staticmethod(flax_dropout)

    broadcast_dims: Sequence[int] = ()
    sampler: Sampler = bernoulli


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class FeatureDropout(RateLayer):
    """Dropout of whole channels: see `regjax.feature_dropout`."""

    _function = staticmethod(feature_dropout)

    channel_axis: int = -1
    sampler: Sampler = bernoulli


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class AlphaDropout(RateLayer):
    """Dropout for self-normalizing networks: see `regjax.alpha_dropout`."""

    _function = staticmethod(alpha_dropout)

    broadcast_dims: Sequence[int] = ()
    sampler: Sampler = bernoulli


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class FeatureAlphaDropout(RateLayer):
    """Alpha dropout of whole channels: see `regjax.feature_alpha_dropout`."""

    _function = staticmethod(feature_alpha_dropout)

    channel_axis: int = -1
    sampler: Sampler = bernoulli


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class DropPath(RateLayer):
    """Stochastic depth, which zeroes whole residual branches: see `regjax.drop_path`."""

    _function = staticmethod(drop_path)

    mode: Literal["row", "batch"] = "row"
    scale_by_keep: bool = True
    sampler: Sampler = bernoulli


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class DropBlock(RateLayer):
    """Dropout of contiguous blocks of feature maps: see `regjax.drop_block`."""

    _function = staticmethod(drop_block)

    block_size: int = 7
    channel_axis: int = -1
    share_channels: bool = False
    gamma_scale: float = 1.0
    scale_by_keep: bool = True
    with_noise: bool = False


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class VariationalDropout(RateLayer):
    """Dropout with one mask for all timesteps of a sequence: see `regjax.variational_dropout`."""

    _function = staticmethod(variational_dropout)

    time_axis: int = 1
    sampler: Sampler = bernoulli


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class DropConnect(RateLayer):
    """Dropout of weights, not activations: see `regjax.drop_connect`.

    Call it on an array of weights, or a pytree of them, before using them.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> rngs = nnx.Rngs(0)
        >>> kernel, dropconnect = nnx.Param(jnp.ones((4, 3))), DropConnect(0.5, rngs=rngs)
        >>> jnp.ones((1, 4)) @ dropconnect(kernel[...])
        Array([[6., 2., 6.]], dtype=float32)
    """

    _function = staticmethod(drop_connect)

    rule: Rule = "default"
    sampler: Sampler = bernoulli

    def __call__(
        self,
        inputs: PyTree,
        *,
        deterministic: ArrayLike | None = None,
        rngs: Source | None = None,
        rate: ArrayLike | None = None,
    ) -> PyTree:
        """Drop weights in training; return `inputs` itself in evaluation. See `RateLayer`."""
        return self._call((inputs,), self._rate(rate), deterministic, rngs)


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class EmbeddingDropout(RateLayer):
    """Dropout of words, at every occurrence in the batch: see `regjax.embedding_dropout`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> rngs, ids = nnx.Rngs(2), jnp.array([5, 6, 5])
        >>> embed, dropout = nnx.Embed(100, 2, rngs=rngs), EmbeddingDropout(0.5, rngs=rngs)
        >>> dropout(embed(ids), ids) != 0
        Array([[False, False],
               [ True,  True],
               [False, False]], dtype=bool)
    """

    _function = staticmethod(embedding_dropout)

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]  # it takes ids
        self,
        inputs: Inexact[ArrayLike, "*ids features"],
        ids: Integer[ArrayLike, "*ids"],
        *,
        deterministic: ArrayLike | None = None,
        rngs: Source | None = None,
        rate: ArrayLike | None = None,
    ) -> Inexact[Array | np.ndarray, "*ids features"]:
        """Apply dropout to `inputs`, the embeddings of `ids`; otherwise as in `RateLayer`."""
        return self._call((inputs, ids), self._rate(rate), deterministic, rngs)


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class GaussianDropout(RateLayer):
    """Multiplicative Gaussian noise with mean 1: see `regjax.gaussian_dropout`.

    The variance is `rate / (1 - rate)`, with the rate in [0, 1).
    """

    _function = staticmethod(gaussian_dropout)

    def __post_init__(self) -> None:
        check_noise_rate(self._rate(None))
        super().__post_init__()


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class GaussianNoise(Layer):
    """Additive Gaussian noise: see `regjax.gaussian_noise`.

    `stddev` is the standard deviation; a number, or an `nnx.Variable` that holds one.
    """

    _function = staticmethod(gaussian_noise)

    stddev: ArrayLike | nnx.Variable[Any] = dataclasses.field(kw_only=False)

    keyless_rates: ClassVar[tuple[float, ...]] = (0,)

    def __post_init__(self) -> None:
        check_stddev(_number(self.stddev))
        super().__post_init__()

    def __call__(
        self,
        inputs: Float[ArrayLike, "*shape"],
        *,
        deterministic: ArrayLike | None = None,
        rngs: Source | None = None,
        stddev: ArrayLike | None = None,
    ) -> Float[Array | np.ndarray, "*shape"]:
        """Add noise in training; return `inputs` itself in evaluation. See `RateLayer`."""
        stddev = check_stddev(_number(self.stddev if stddev is None else stddev))
        return self._call((inputs,), stddev, deterministic, rngs)

    def set_view(self, deterministic: bool | None = None, stddev: ArrayLike | None = None) -> None:
        """Set what `nnx.view` passes.

        Args:
          deterministic: True in evaluation.
          stddev: The standard deviation.
        """
        super().set_view(deterministic)
        if stddev is not None:
            self.stddev = _settable(stddev)


def _number(value: ArrayLike | nnx.Variable[Any]) -> ArrayLike:
    return value.get_value() if isinstance(value, nnx.Variable) else value


def _settable(value: ArrayLike) -> Any:
    # NNX lets a number become an array only if the array is declared as data.
    return nnx.data(value) if isinstance(value, jax.Array) else value


for _name in __all__:
    explain_names_of(globals()[_name])
