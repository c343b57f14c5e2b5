"""Layers for Flax NNX: `Dropout` in place of NNX's own, and the rest of the family.

In a model written with `from flax import nnx`, import

    from regjax.nnx import Dropout

and write `Dropout` for `nnx.Dropout`: nothing else changes, and no float32 bit of what the model
computes. The layers are thin: what each does stands at the function of its name in `regjax`.

Every layer takes its amount in the call, too, where it comes before that of the constructor, and
`nnx.view(model, rate=rate)` gives one to all layers of a model. It may be traced, so that a rate
that changes with the step (`regjax.linear_rate` makes one) costs one compilation.

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
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import jax

from regjax._checks import naming
from regjax._dropout.alpha import alpha_dropout, feature_alpha_dropout
from regjax._dropout.core import check_flag, dropout
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
from regjax._random.bernoulli import Sampler, bernoulli, check_probability
from regshared.extras import needs

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
    """List what is public, for `dir` and completion."""
    return __all__


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class Layer(FlaxLayer, nnx.Module):
    """What all layers share: the mode, and where the key comes from.

    Attributes:
        deterministic: True in evaluation; `train()` and `eval()` of a model set it.
        rng_collection: the name of the stream that a key is taken from.
        rngs: the stream of the layer itself, forked from the one that the constructor was given.
    """

    deterministic: bool | None = False
    rng_collection: str = "dropout"
    rngs: nnx.Rngs | nnx.RngStream | None = nnx.data(default=None)  # noqa: RUF009  # a field

    def __post_init__(self) -> None:
        """Forks a stream."""
        check_settings(self)
        if isinstance(self.rngs, nnx.Rngs):
            self.rngs = self.rngs[self.rng_collection].fork()
        elif isinstance(self.rngs, nnx.RngStream):
            self.rngs = self.rngs.fork()
        elif self.rngs is not None:
            raise TypeError(f"rngs must be an Rngs, an RngStream or None; got {self.rngs!r}.")

    def set_view(self, deterministic: bool | None = None) -> None:
        """What `nnx.view` calls.

        Args:
          deterministic: True in evaluation.
        """  # indented as `nnx.view_info` reads it
        if deterministic is not None:
            self.deterministic = deterministic

    def _call(
        self,
        inputs: Sequence[Any],
        rate_or_stddev: ArrayLike,
        deterministic: ArrayLike | None,
        rngs: Source | None,
    ) -> Any:
        deterministic = self.deterministic if deterministic is None else deterministic
        if deterministic is None:
            raise ValueError(
                f"deterministic is missing: {type(self).__name__} is told neither to drop nor not "
                "to. Pass it to the constructor or to the call; or set it for a whole model with "
                "model.train(), model.eval() or nnx.view(model, deterministic=...)."
            )
        flag = check_flag(deterministic)
        if flag is True:
            return inputs[0]
        key = None
        if self._needs_key(rate_or_stddev):
            key = self._key(self.rngs if rngs is None else rngs)
        with naming(x="inputs", weights="inputs", key="rngs"):
            return self._drop(inputs, rate_or_stddev, key=key, deterministic=flag)

    def _key(self, rngs: Source | None) -> KeyLike:
        if isinstance(rngs, nnx.Rngs):
            return rngs[self.rng_collection]()
        if isinstance(rngs, nnx.RngStream):
            return rngs()
        if isinstance(rngs, jax.Array):
            return rngs
        if rngs is None:
            raise ValueError(
                f"rngs is missing: {type(self).__name__} in training needs a key. Pass "
                "rngs=nnx.Rngs(seed) to the constructor or to the call, or deterministic=True to "
                "evaluate."
            )
        raise TypeError(f"rngs must be an Rngs, an RngStream or a key; got {rngs!r}.")


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class RateLayer(Layer):
    """A layer whose amount is a rate.

    Attributes:
        rate: the probability that something is dropped, in [0, 1]; a number, or an `nnx.Variable`
            that holds one.
    """

    rate: ArrayLike | nnx.Variable[Any] = dataclasses.field(kw_only=False)

    def __post_init__(self) -> None:
        """Refuses a rate out of range."""
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
        """Drops in training, and returns `inputs` itself in evaluation.

        Args:
            inputs: what is dropped.
            deterministic: True in evaluation; comes before that of the layer. It may be traced.
            rngs: where the key comes from, or the key; comes before the stream of the layer.
            rate: comes before the rate of the layer. It may be traced.
        """
        return self._call((inputs,), self._rate(rate), deterministic, rngs)

    def set_view(self, deterministic: bool | None = None, rate: ArrayLike | None = None) -> None:
        """What `nnx.view` calls.

        Args:
          deterministic: True in evaluation.
          rate: the probability that something is dropped, in [0, 1].
        """
        super().set_view(deterministic)
        if rate is not None:
            self.rate = _settable(rate)

    def _rate(self, rate: ArrayLike | None) -> ArrayLike:
        return check_probability("rate", _number(self.rate if rate is None else rate))


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class Dropout(RateLayer, nnx.Dropout):
    """`flax.nnx.Dropout`, faster, and the same to the last bit of float32.

    The same rngs give it the same key, and the same key gives it the same mask. Its state is that
    of NNX's own, so that checkpoints of either are restored into the other. It is a
    `flax.nnx.Dropout` too, for code and filters that look for one.

    What is the same, and where: with x64 off and threefry keys, the defaults of JAX, every value
    and gradient of float32 under `jit`, on CPU. XLA adds up in an order that depends on the program
    around a sum, so masks of fewer than 4,096 elements are drawn by Flax's own operations, at their
    speed. A last bit may still differ where a larger array is summed along a short odd axis, as in
    `(1024, 5)`, and where the input is a constant of the program, which XLA scales ahead of time.
    Outside of `jit`, Flax's own layer rounds otherwise under `grad`; this one does not.

    What is better: half types are scaled in float32 and rounded once, where Flax divides in
    bfloat16, which shifts the mean; the mean is right at rates above 1 - 2**-12 too, where Flax
    divides by less than the share that it keeps; `rate` and `deterministic` may be traced, where
    Flax's own fails; a rate out of range is a `ValueError`, where Flax scales by a negative number;
    `deterministic` must be a boolean, where Flax takes `"False"` for True; a mask shared along
    sharded dimensions is laid out without them.

    Attributes:
        rate: the probability that an element is zeroed, in [0, 1]; a number, or an `nnx.Variable`
            that holds one.
        broadcast_dims: dimensions along which one mask is shared.
        deterministic: True in evaluation; `train()` and `eval()` of a model set it.
        rng_collection: the name of the stream that a key is taken from.
        rngs: the stream of the layer itself, forked from the one that the constructor was given.
        sampler: what draws the mask; `regjax.packed_bernoulli` draws another one, faster on GPUs
            and TPUs.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from regjax.nnx import Dropout
        >>> class MLP(nnx.Module):
        ...     def __init__(self, rngs):
        ...         self.hidden = nnx.Linear(4, 8, rngs=rngs)
        ...         self.dropout = Dropout(0.5, rngs=rngs)
        ...         self.out = nnx.Linear(8, 2, rngs=rngs)
        ...     def __call__(self, x):
        ...         return self.out(self.dropout(nnx.relu(self.hidden(x))))
        >>> model, x = MLP(nnx.Rngs(0)), jnp.ones((1, 4))
        >>> bool((model(x) == model(x)).all())
        False
        >>> model.eval()
        >>> bool((model(x) == model(x)).all())
        True
    """

    _function = staticmethod(dropout)

    broadcast_dims: Sequence[int] = ()
    sampler: Sampler = bernoulli


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class FeatureDropout(RateLayer):
    """Dropout of whole channels: `regjax.feature_dropout`.

    Attributes:
        rate: the probability that a channel is zeroed, in [0, 1].
        channel_axis: the dimension of the channels.
        sampler: what draws the mask.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from regjax.nnx import FeatureDropout
        >>> FeatureDropout(0.5, rngs=nnx.Rngs(0))(jnp.ones((1, 2, 4)))
        Array([[[2., 0., 2., 0.],
                [2., 0., 2., 0.]]], dtype=float32)
    """

    _function = staticmethod(feature_dropout)

    channel_axis: int = -1
    sampler: Sampler = bernoulli


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class AlphaDropout(RateLayer):
    """Dropout for self-normalizing networks: `regjax.alpha_dropout`.

    Attributes:
        rate: the probability that an element is dropped, in [0, 1].
        broadcast_dims: dimensions along which one mask is shared.
        sampler: what draws the mask.
    """

    _function = staticmethod(alpha_dropout)

    broadcast_dims: Sequence[int] = ()
    sampler: Sampler = bernoulli


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class FeatureAlphaDropout(RateLayer):
    """Alpha dropout of whole channels: `regjax.feature_alpha_dropout`.

    Attributes:
        rate: the probability that a channel is dropped, in [0, 1].
        channel_axis: the dimension of the channels.
        sampler: what draws the mask.
    """

    _function = staticmethod(feature_alpha_dropout)

    channel_axis: int = -1
    sampler: Sampler = bernoulli


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class DropPath(RateLayer):
    """Zeroes what a row adds on its way, or keeps all of it: `regjax.drop_path`.

    Attributes:
        rate: the probability that a path is zeroed, in [0, 1].
        mode: "row" decides for each row, "batch" once for all.
        scale_by_keep: whether a path that is kept is divided by `1 - rate`.
        sampler: what draws the decisions.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from regjax.nnx import DropPath
        >>> DropPath(0.5, rngs=nnx.Rngs(0))(jnp.ones((4, 2)))
        Array([[2., 2.],
               [0., 0.],
               [2., 2.],
               [0., 0.]], dtype=float32)
    """

    _function = staticmethod(drop_path)

    mode: Literal["row", "batch"] = "row"
    scale_by_keep: bool = True
    sampler: Sampler = bernoulli


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class DropBlock(RateLayer):
    """Dropout of blocks of feature maps: `regjax.drop_block`.

    Attributes:
        rate: the share of elements that is dropped, about, in [0, 1].
        block_size: the width of a block.
        channel_axis: the dimension of the channels.
        share_channels: whether all channels drop the same blocks.
        gamma_scale: a factor of the probability that a block starts.
        scale_by_keep: whether elements that are kept are scaled.
        with_noise: whether dropped elements become normal variates, not 0.
    """

    _function = staticmethod(drop_block)

    block_size: int = 7
    channel_axis: int = -1
    share_channels: bool = False
    gamma_scale: float = 1.0
    scale_by_keep: bool = True
    with_noise: bool = False


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class VariationalDropout(RateLayer):
    """One mask for all timesteps of a sequence: `regjax.variational_dropout`.

    Attributes:
        rate: the probability that a feature is zeroed, in [0, 1].
        time_axis: the dimension of the timesteps.
        sampler: what draws the mask.
    """

    _function = staticmethod(variational_dropout)

    time_axis: int = 1
    sampler: Sampler = bernoulli


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class DropConnect(RateLayer):
    """Dropout of weights, not of activations: `regjax.drop_connect`.

    Called on an array of weights, or a tree of them, before they are used.

    Attributes:
        rate: the probability that a weight is zeroed, in [0, 1].
        rule: which leaves of a tree are dropped.
        sampler: what draws the masks.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from regjax.nnx import DropConnect
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
        """Drops weights in training, and returns `inputs` itself in evaluation.

        Args:
            inputs: an array of weights, or a tree of them.
            deterministic: True in evaluation; comes before that of the layer. It may be traced.
            rngs: where the key comes from, or the key; comes before the stream of the layer.
            rate: comes before the rate of the layer. It may be traced.
        """
        return self._call((inputs,), self._rate(rate), deterministic, rngs)


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class EmbeddingDropout(RateLayer):
    """Dropout of words, wherever they occur in the batch: `regjax.embedding_dropout`.

    Attributes:
        rate: the probability that a word is zeroed, in [0, 1].

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from regjax.nnx import EmbeddingDropout
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
        """Drops in training, and returns `inputs`, the embeddings of `ids`, in evaluation."""
        return self._call((inputs, ids), self._rate(rate), deterministic, rngs)


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class GaussianDropout(RateLayer):
    """Multiplies each element by a normal number of mean 1: `regjax.gaussian_dropout`.

    Attributes:
        rate: what the variance `rate / (1 - rate)` is made of, in [0, 1).
    """

    _function = staticmethod(gaussian_dropout)

    def __post_init__(self) -> None:
        """Refuses a rate out of range."""
        check_noise_rate(self._rate(None))
        super().__post_init__()


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class GaussianNoise(Layer):
    """Adds a normal number to each element: `regjax.gaussian_noise`.

    Attributes:
        stddev: the standard deviation; a number, or an `nnx.Variable` that holds one.
    """

    _function = staticmethod(gaussian_noise)

    stddev: ArrayLike | nnx.Variable[Any] = dataclasses.field(kw_only=False)

    keyless_rates: ClassVar[tuple[float, ...]] = (0,)

    def __post_init__(self) -> None:
        """Refuses a negative standard deviation."""
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
        """Adds noise in training, and returns `inputs` itself in evaluation."""
        stddev = check_stddev(_number(self.stddev if stddev is None else stddev))
        return self._call((inputs,), stddev, deterministic, rngs)

    def set_view(self, deterministic: bool | None = None, stddev: ArrayLike | None = None) -> None:
        """What `nnx.view` calls.

        Args:
          deterministic: True in evaluation.
          stddev: the standard deviation.
        """
        super().set_view(deterministic)
        if stddev is not None:
            self.stddev = _settable(stddev)


def _number(value: ArrayLike | nnx.Variable[Any]) -> ArrayLike:
    return value.get_value() if isinstance(value, nnx.Variable) else value


def _settable(value: ArrayLike) -> Any:
    # What was a number at construction may become an array only if it is declared.
    return nnx.data(value) if isinstance(value, jax.Array) else value
