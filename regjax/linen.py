"""Layers for Flax Linen: `Dropout` in place of Linen's own, and the rest of the family.

In a model written with `from flax import linen as nn`, import

    from regjax.linen import Dropout

and write `Dropout` for `nn.Dropout`: nothing else changes, and no float32 bit of what the model
computes. The layers are thin: what each does stands at the function of its name in `regjax`.

Every layer takes its amount in the call, too, where it comes before that of the constructor. It may
be traced, so that a rate that changes with the step (`regjax.linear_rate` makes one), or from layer
to layer of a scanned stack (`regjax.depth_rates`), costs one compilation.

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
    """List what is public, for `dir` and completion."""
    return __all__


class Layer(FlaxLayer, linen.Module, kw_only=True):
    """What all layers share: the mode, and where the key comes from.

    Attributes:
        deterministic: True in evaluation; to be given here or in the call.
        rng_collection: the name of the rngs that a key is made from.
    """

    deterministic: ArrayLike | None = None
    rng_collection: str = "dropout"

    def __post_init__(self) -> None:
        """Refuses a setting of a wrong type."""
        check_settings(self)
        super().__post_init__()

    @linen.nowrap
    def _call(
        self,
        inputs: Sequence[Any],
        rate_or_stddev: ArrayLike,
        deterministic: ArrayLike | None,
        rng: KeyLike | None,
    ) -> Any:
        flag = check_flag(linen.merge_param("deterministic", self.deterministic, deterministic))
        if flag is True:
            return inputs[0]
        if rng is None and self._needs_key(rate_or_stddev):
            rng = self.make_rng(self.rng_collection)
        with naming(x="inputs", weights="inputs", key="rng"):
            return self._drop(inputs, rate_or_stddev, key=rng, deterministic=flag)


class RateLayer(Layer):
    """A layer whose amount is a rate.

    Attributes:
        rate: the probability that something is dropped, in [0, 1].
    """

    rate: float | Float[Array, ""]

    def __post_init__(self) -> None:
        """Refuses a rate out of range."""
        self._rate(None)
        super().__post_init__()

    @linen.compact  # as Linen's own: outside of a model it is refused
    def __call__(
        self,
        inputs: Inexact[ArrayLike, "*shape"],
        deterministic: ArrayLike | None = None,
        rng: KeyLike | None = None,
        *,
        rate: ArrayLike | None = None,
    ) -> Inexact[Array | np.ndarray, "*shape"]:
        """Drops in training, and returns `inputs` itself in evaluation.

        Args:
            inputs: what is dropped.
            deterministic: True in evaluation; to be given here or in the constructor. It may be
                traced.
            rng: the key; without it, one is made from `rng_collection`.
            rate: comes before the rate of the constructor. It may be traced.
        """
        return self._call((inputs,), self._rate(rate), deterministic, rng)

    @linen.nowrap
    def _rate(self, rate: ArrayLike | None) -> ArrayLike:
        return check_probability("rate", self.rate if rate is None else rate)


class Dropout(RateLayer, linen.Dropout):
    """`flax.linen.Dropout`, faster, and the same to the last bit of float32.

    The module has the same path, so that the same rngs give it the same key, and the same key gives
    it the same mask. It is a `flax.linen.Dropout` too, for code that looks for one.

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
    `deterministic` must be a boolean, where Flax takes `"False"` for True; masks are laid out over
    devices as what they mask.

    Attributes:
        rate: the probability that an element is zeroed, in [0, 1].
        broadcast_dims: dimensions along which one mask is shared.
        deterministic: True in evaluation; to be given here or in the call.
        rng_collection: the name of the rngs that a key is made from.
        sampler: what draws the mask; `regjax.packed_bernoulli` draws another one, faster on GPUs
            and TPUs.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> from regjax.linen import Dropout
        >>> class MLP(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, x, train):
        ...         x = nn.relu(nn.Dense(8)(x))
        ...         x = Dropout(0.5, deterministic=not train)(x)
        ...         return nn.Dense(2)(x)
        >>> x = jnp.ones((1, 4))
        >>> params = MLP().init(jax.random.key(0), x, train=False)
        >>> MLP().apply(params, x, train=True, rngs={"dropout": jax.random.key(1)}).shape
        (1, 2)
    """

    function = staticmethod(dropout)

    rate: float | Float[Array, ""]  # pyright: ignore[reportIncompatibleVariableOverride]
    broadcast_dims: Sequence[int] = ()
    deterministic: ArrayLike | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    rng_collection: str = "dropout"
    sampler: Sampler = bernoulli


class FeatureDropout(RateLayer, kw_only=True):
    """Dropout of whole channels: `regjax.feature_dropout`.

    Attributes:
        rate: the probability that a channel is zeroed, in [0, 1].
        channel_axis: the dimension of the channels.
        sampler: what draws the mask.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from regjax.linen import FeatureDropout
        >>> layer = FeatureDropout(0.5, deterministic=False)
        >>> layer.apply({}, jnp.ones((1, 2, 4)), rngs={"dropout": jax.random.key(5)})
        Array([[[0., 0., 2., 2.],
                [0., 0., 2., 2.]]], dtype=float32)
    """

    function = staticmethod(feature_dropout)

    channel_axis: int = -1
    sampler: Sampler = bernoulli


class AlphaDropout(RateLayer, kw_only=True):
    """Dropout for self-normalizing networks: `regjax.alpha_dropout`.

    Attributes:
        rate: the probability that an element is dropped, in [0, 1].
        broadcast_dims: dimensions along which one mask is shared.
        sampler: what draws the mask.
    """

    function = staticmethod(alpha_dropout)

    broadcast_dims: Sequence[int] = ()
    sampler: Sampler = bernoulli


class FeatureAlphaDropout(RateLayer, kw_only=True):
    """Alpha dropout of whole channels: `regjax.feature_alpha_dropout`.

    Attributes:
        rate: the probability that a channel is dropped, in [0, 1].
        channel_axis: the dimension of the channels.
        sampler: what draws the mask.
    """

    function = staticmethod(feature_alpha_dropout)

    channel_axis: int = -1
    sampler: Sampler = bernoulli


class DropPath(RateLayer, kw_only=True):
    """Zeroes what a row adds on its way, or keeps all of it: `regjax.drop_path`.

    Attributes:
        rate: the probability that a path is zeroed, in [0, 1].
        mode: "row" decides for each row, "batch" once for all.
        scale_by_keep: whether a path that is kept is divided by `1 - rate`.
        sampler: what draws the decisions.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from regjax.linen import DropPath
        >>> layer = DropPath(0.5, deterministic=False)
        >>> layer.apply({}, jnp.ones((4, 2)), rngs={"dropout": jax.random.key(0)})
        Array([[0., 0.],
               [2., 2.],
               [2., 2.],
               [0., 0.]], dtype=float32)
    """

    function = staticmethod(drop_path)

    mode: Literal["row", "batch"] = "row"
    scale_by_keep: bool = True
    sampler: Sampler = bernoulli


class DropBlock(RateLayer, kw_only=True):
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

    function = staticmethod(drop_block)

    block_size: int = 7
    channel_axis: int = -1
    share_channels: bool = False
    gamma_scale: float = 1.0
    scale_by_keep: bool = True
    with_noise: bool = False


class VariationalDropout(RateLayer, kw_only=True):
    """One mask for all timesteps of a sequence: `regjax.variational_dropout`.

    Attributes:
        rate: the probability that a feature is zeroed, in [0, 1].
        time_axis: the dimension of the timesteps.
        sampler: what draws the mask.
    """

    function = staticmethod(variational_dropout)

    time_axis: int = 1
    sampler: Sampler = bernoulli


class DropConnect(RateLayer, kw_only=True):
    """Dropout of weights, not of activations: `regjax.drop_connect`.

    Called on an array of weights, or a tree of them, before they are used.

    Attributes:
        rate: the probability that a weight is zeroed, in [0, 1].
        rule: which leaves of a tree are dropped.
        sampler: what draws the masks.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> from regjax.linen import DropConnect
        >>> class Dense(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, x, train):
        ...         kernel = self.param("kernel", nn.initializers.ones, (x.shape[-1], 3))
        ...         return x @ DropConnect(0.5, deterministic=not train)(kernel)
        >>> rngs = {"params": jax.random.key(0), "dropout": jax.random.key(0)}
        >>> Dense().init_with_output(rngs, jnp.ones((1, 4)), train=True)[0]
        Array([[6., 4., 6.]], dtype=float32)
    """

    function = staticmethod(drop_connect)

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
        """Drops weights in training, and returns `inputs` itself in evaluation.

        Args:
            inputs: an array of weights, or a tree of them.
            deterministic: True in evaluation; to be given here or in the constructor. It may be
                traced.
            rng: the key; without it, one is made from `rng_collection`.
            rate: comes before the rate of the constructor. It may be traced.
        """
        return self._call((inputs,), self._rate(rate), deterministic, rng)


class EmbeddingDropout(RateLayer):
    """Dropout of words, wherever they occur in the batch: `regjax.embedding_dropout`.

    Attributes:
        rate: the probability that a word is zeroed, in [0, 1].

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> from regjax.linen import EmbeddingDropout
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

    function = staticmethod(embedding_dropout)

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
        """Drops in training, and returns `inputs`, the embeddings of `ids`, in evaluation."""
        return self._call((inputs, ids), self._rate(rate), deterministic, rng)


class GaussianDropout(RateLayer):
    """Multiplies each element by a normal number of mean 1: `regjax.gaussian_dropout`.

    Attributes:
        rate: what the variance `rate / (1 - rate)` is made of, in [0, 1).
    """

    function = staticmethod(gaussian_dropout)

    def __post_init__(self) -> None:
        """Refuses a rate out of range."""
        check_noise_rate(self._rate(None))
        super().__post_init__()


class GaussianNoise(Layer):
    """Adds a normal number to each element: `regjax.gaussian_noise`.

    Attributes:
        stddev: the standard deviation.
    """

    function = staticmethod(gaussian_noise)

    stddev: float | Float[Array, ""]

    keyless_rates: ClassVar[tuple[float, ...]] = (0,)

    def __post_init__(self) -> None:
        """Refuses a negative standard deviation."""
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
        """Adds noise in training, and returns `inputs` itself in evaluation."""
        stddev = check_stddev(self.stddev if stddev is None else stddev)
        return self._call((inputs,), stddev, deterministic, rng)
