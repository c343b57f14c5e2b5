"""Modules of dropout of whole channels."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from regtorch._checks import check_tensor
from regtorch._dropout.features import feature_dropout
from regtorch.nn._layer import Layer


class FeatureLayer(Layer):
    """Dropout of whole channels, for inputs with the numbers of dimensions of the class."""

    # From the ndim of the input to its channel axis, which is 0 without a batch.
    channel_axes: ClassVar[dict[int, int]]

    @classmethod
    def drop(cls, x: Tensor, rate: float | Tensor, **options: Any) -> Tensor:
        if check_tensor("x", x).ndim not in cls.channel_axes:
            known = " or ".join(f"{ndim}-D" for ndim in cls.channel_axes)
            raise RuntimeError(
                f"x must be {known} for {cls.__name__}; got a {x.ndim}-D input of shape "
                f"{tuple(x.shape)}. Use Dropout for elements, or regtorch.feature_dropout with a "
                "channel_axis."
            )
        return feature_dropout(x, rate, channel_axis=cls.channel_axes[x.ndim], **options)


class Dropout1d(FeatureLayer):
    """`torch.nn.Dropout1d` with masks from an explicit key or generator.

    It zeroes channels of (N, C, L), or of (C, L); `rate` is `p` in PyTorch. See
    `regtorch.feature_dropout`. A call on an input that is not 2-D or 3-D raises a RuntimeError, as
    PyTorch does.

    Example:
        >>> import torch, regtorch
        >>> regtorch.nn.Dropout1d(0.5)(torch.ones(4, 2), key=regtorch.key(0))[:, 0]
        tensor([0., 0., 2., 2.])
    """

    channel_axes: ClassVar[dict[int, int]] = {2: 0, 3: 1}


class Dropout2d(FeatureLayer):
    """`torch.nn.Dropout2d` with masks from an explicit key or generator: see `Dropout1d`.

    It zeroes channels of (N, C, H, W). A 3-D input is (N, C, L) and not (C, H, W), as in PyTorch,
    which warns. Other inputs raise a RuntimeError; PyTorch warns that it will.

    Example:
        >>> import torch, regtorch
        >>> regtorch.nn.Dropout2d(0.5)(torch.ones(1, 4, 3, 3), key=regtorch.key(0))[0, :, 0, 0]
        tensor([0., 0., 2., 2.])
    """

    channel_axes: ClassVar[dict[int, int]] = {3: 1, 4: 1}


class Dropout3d(FeatureLayer):
    """`torch.nn.Dropout3d` with masks from an explicit key or generator: see `Dropout1d`.

    It zeroes channels of (N, C, D, H, W), or of (C, D, H, W). Other inputs raise a RuntimeError;
    PyTorch warns that it will.

    Example:
        >>> import torch, regtorch
        >>> regtorch.nn.Dropout3d(0.5)(torch.ones(4, 1, 1, 1), key=regtorch.key(0)).flatten()
        tensor([0., 0., 2., 2.])
    """

    channel_axes: ClassVar[dict[int, int]] = {4: 0, 5: 1}
