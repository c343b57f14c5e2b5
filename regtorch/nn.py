"""Modules over the functions: the settings live in the module, the work in the function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from regtorch._alpha import alpha_dropout, feature_alpha_dropout
from regtorch._dropout import dropout
from regtorch._features import feature_dropout
from regtorch._masks import check_probability


class _Layer(nn.Module):
    """What the family shares: the settings, and where the key comes from."""

    def __init__(self, rate: float = 0.5, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.rate = check_probability("rate", rate)
        self.generator = generator

    def forward(self, x: Tensor, *, key: Tensor | torch.Generator | None = None) -> Tensor:
        """Drops in training, nothing in evaluation; `key` comes before the generator."""
        key = self.generator if key is None else key
        return self.drop(x, self.rate, key=key, deterministic=not self.training, **self.options())

    @classmethod
    def drop(cls, x: Tensor, rate: float | Tensor, **options: Any) -> Tensor:
        """The function that the layer calls, after its own rule for the shape of `x`."""
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        """What it passes to the function besides the rate, the key and the mode."""
        return {}

    def extra_repr(self) -> str:
        """What stands between the parentheses of the printed module."""
        return f"rate={self.rate}"


class Dropout(_Layer):
    """`torch.nn.Dropout` whose masks come from an explicit key or generator.

    In training it zeroes each element with probability `rate` and divides the others by `1 - rate`;
    after `eval()` it returns its input itself. See `regtorch.dropout`.

    Attributes:
        rate: the probability that an element is zeroed; `p` in `torch.nn.Dropout`.
        broadcast_dims: dimensions along which one mask is shared.
        generator: where a call without a key draws one from. A key cannot live here: the same key
            at every step would be the same mask at every step.

    PyTorch:
        `torch.nn.Dropout(p=rate)`, which draws from the global generator.

    JAX:
        `regjax.dropout(x, rate, key=key, deterministic=not training)` gives the same result bit for
        bit.

    Example:
        >>> import torch, regtorch
        >>> layer = regtorch.nn.Dropout(0.5)
        >>> layer(torch.arange(1.0, 7.0), key=regtorch.key(0))
        tensor([ 0.,  0.,  6.,  8.,  0., 12.])
        >>> layer.eval()(torch.arange(1.0, 7.0))
        tensor([1., 2., 3., 4., 5., 6.])
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(4, 8),
        ...     regtorch.nn.Dropout(0.1, generator=torch.Generator().manual_seed(0)),
        ... )
        >>> model(torch.ones(2, 4)).shape
        torch.Size([2, 8])
    """

    def __init__(
        self,
        rate: float = 0.5,
        *,
        broadcast_dims: Sequence[int] = (),
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(rate, generator=generator)
        self.broadcast_dims = tuple(broadcast_dims)

    @classmethod
    def drop(cls, x: Tensor, rate: float | Tensor, **options: Any) -> Tensor:
        """`regtorch.dropout`."""
        return dropout(x, rate, **options)

    def options(self) -> dict[str, Any]:
        """The dimensions that share a mask."""
        return {"broadcast_dims": self.broadcast_dims}

    def extra_repr(self) -> str:
        """What stands between the parentheses of the printed module."""
        shared = f", broadcast_dims={self.broadcast_dims}" if self.broadcast_dims else ""
        return super().extra_repr() + shared


class _FeatureDropout(_Layer):
    """Dropout of whole channels, of inputs that have as many dimensions as the layer knows."""

    # Number of dimensions of the input -> which of them is the channel's. 0: there is no batch.
    channel_axes: ClassVar[dict[int, int]]

    @classmethod
    def drop(cls, x: Tensor, rate: float | Tensor, **options: Any) -> Tensor:
        """`regtorch.feature_dropout`, the channel's dimension taken from the number of them."""
        if x.ndim not in cls.channel_axes:
            known = " or ".join(f"{ndim}-D" for ndim in cls.channel_axes)
            raise RuntimeError(
                f"x must be {known} for {cls.__name__}; got a {x.ndim}-D input of shape "
                f"{tuple(x.shape)}. Use Dropout for elements, or regtorch.feature_dropout with a "
                "channel_axis."
            )
        return feature_dropout(x, rate, channel_axis=cls.channel_axes[x.ndim], **options)


class Dropout1d(_FeatureDropout):
    """`torch.nn.Dropout1d` whose masks come from an explicit key or generator.

    In training it zeroes each channel of (N, C, L), or of (C, L), with probability `rate` and
    divides the others by `1 - rate`. See `regtorch.feature_dropout`.

    Attributes:
        rate: the probability that a channel is zeroed; `p` in PyTorch.
        generator: where a call without a key draws one from.

    Raises:
        RuntimeError: when called on an input that is not 2-D or 3-D, as PyTorch does.

    Example:
        >>> import torch, regtorch
        >>> layer = regtorch.nn.Dropout1d(0.5)
        >>> layer(torch.ones(4, 2), key=regtorch.key(0))
        tensor([[0., 0.],
                [0., 0.],
                [2., 2.],
                [2., 2.]])
    """

    channel_axes: ClassVar[dict[int, int]] = {2: 0, 3: 1}


class Dropout2d(_FeatureDropout):
    """`torch.nn.Dropout2d` whose masks come from an explicit key or generator.

    In training it zeroes each channel of (N, C, H, W) with probability `rate` and divides the
    others by `1 - rate`. See `regtorch.feature_dropout`. A 3-D input is (N, C, L) and not
    (C, H, W): PyTorch takes it so, with a warning.

    Attributes:
        rate: the probability that a channel is zeroed; `p` in PyTorch.
        generator: where a call without a key draws one from.

    Raises:
        RuntimeError: when called on an input that is not 3-D or 4-D; PyTorch warns that it will.

    Example:
        >>> import torch, regtorch
        >>> layer = regtorch.nn.Dropout2d(0.5)
        >>> layer(torch.ones(1, 4, 3, 3), key=regtorch.key(0))[0, :, 0, 0]
        tensor([0., 0., 2., 2.])
    """

    channel_axes: ClassVar[dict[int, int]] = {3: 1, 4: 1}


class Dropout3d(_FeatureDropout):
    """`torch.nn.Dropout3d` whose masks come from an explicit key or generator.

    In training it zeroes each channel of (N, C, D, H, W), or of (C, D, H, W), with probability
    `rate` and divides the others by `1 - rate`. See `regtorch.feature_dropout`.

    Attributes:
        rate: the probability that a channel is zeroed; `p` in PyTorch.
        generator: where a call without a key draws one from.

    Raises:
        RuntimeError: when called on an input that is not 4-D or 5-D; PyTorch warns that it will.

    Example:
        >>> import torch, regtorch
        >>> layer = regtorch.nn.Dropout3d(0.5)
        >>> layer(torch.ones(4, 1, 1, 1), key=regtorch.key(0)).flatten()
        tensor([0., 0., 2., 2.])
    """

    channel_axes: ClassVar[dict[int, int]] = {4: 0, 5: 1}


class AlphaDropout(_Layer):
    """`torch.nn.AlphaDropout` whose masks come from an explicit key or generator.

    In training it keeps mean 0 and variance 1. See `regtorch.alpha_dropout`.

    Attributes:
        rate: the probability that an element is dropped; `p` in PyTorch.
        generator: where a call without a key draws one from.

    Example:
        >>> import torch, regtorch
        >>> regtorch.nn.AlphaDropout(0.5)(torch.zeros(3), key=regtorch.key(0))
        tensor([-0.7792, -0.7792,  0.7792])
    """

    @classmethod
    def drop(cls, x: Tensor, rate: float | Tensor, **options: Any) -> Tensor:
        """`regtorch.alpha_dropout`."""
        return alpha_dropout(x, rate, **options)


class FeatureAlphaDropout(_Layer):
    """`torch.nn.FeatureAlphaDropout` whose masks come from an explicit key or generator.

    Alpha dropout of each channel of (N, C, ...) as one. See `regtorch.feature_alpha_dropout`.

    Attributes:
        rate: the probability that a channel is dropped; `p` in PyTorch.
        generator: where a call without a key draws one from.

    Raises:
        ValueError: when called on an input of fewer than 2 dimensions.

    Example:
        >>> import torch, regtorch
        >>> layer = regtorch.nn.FeatureAlphaDropout(0.5)
        >>> layer(torch.zeros(1, 3, 2), key=regtorch.key(0))[0, :, 0]
        tensor([-0.7792, -0.7792,  0.7792])
    """

    @classmethod
    def drop(cls, x: Tensor, rate: float | Tensor, **options: Any) -> Tensor:
        """`regtorch.feature_alpha_dropout`."""
        return feature_alpha_dropout(x, rate, **options)
