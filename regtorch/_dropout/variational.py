"""Dropout for sequences: one mask for all timesteps."""

from __future__ import annotations

import torch
from torch import Tensor

from regtorch._dropout.core import SampledMask, apply_dropout, check_axis, check_inexact
from regtorch._random.bernoulli import Sampler, bernoulli
from regtorch._random.packed import mask_sampler

_ADVICE = " For a single timestep, use dropout with the same key at every step."


def variational_dropout(
    x: Tensor,
    rate: float | Tensor,
    *,
    key: Tensor | torch.Generator | None = None,
    deterministic: bool | Tensor = False,
    time_axis: int = 1,
    sampler: Sampler = bernoulli,
) -> Tensor:
    """Zero each feature of each row with probability `rate`, at every timestep alike.

    A new mask at every step is noise that a recurrent network accumulates over time; one mask for
    the whole sequence amounts to one smaller network. It is `dropout` with a mask shared along
    `time_axis`, also called locked dropout.

    Inside the recurrence there is no time axis. There, call `dropout` on the state with **one key
    for all steps**, made outside the loop, as in the second example: the same key draws the same
    mask. A generator would draw another key at every step. The result has the shape, dtype and
    device of `x`; the other errors are those of `dropout`.

    Args:
        x: Floating or complex, with a time axis, such as (batch, time, features).
        rate: See `dropout`.
        key: See `dropout`.
        deterministic: See `dropout`.
        time_axis: The dimension of time, counted from the end if negative: 1 for (batch, time,
            features), 0 for (time, batch, features), the default of `torch.nn.LSTM`, and for (time,
            features).
        sampler: See `dropout`.

    Raises:
        TypeError: `time_axis` is not an integer.
        ValueError: `time_axis` is not a dimension of `x`.

    Note (PyTorch):
        The `dropout=` of `torch.nn.LSTM` differs: it draws a new mask at every timestep.

    Example:
        >>> import torch, regtorch
        >>> x = torch.ones(2, 3, 4)  # batch, time, features
        >>> y = regtorch.variational_dropout(x, 0.5, key=regtorch.key(0))
        >>> y[:, 0], bool((y == y[:, :1]).all())
        (tensor([[0., 0., 2., 2.],
                [0., 2., 2., 0.]]), True)
        >>> cell = torch.nn.LSTMCell(3, 4)
        >>> def network(xs, key, deterministic=False):
        ...     input_key, state_key = regtorch.split(key)
        ...     xs = regtorch.variational_dropout(
        ...         xs, 0.3, key=input_key, deterministic=deterministic, time_axis=0
        ...     )
        ...     h = c = xs.new_zeros(xs.shape[1], 4)
        ...     for x in xs:
        ...         h = regtorch.dropout(h, 0.5, key=state_key, deterministic=deterministic)
        ...         h, c = cell(x, (h, c))
        ...     return h
        >>> network(torch.ones(7, 2, 3), regtorch.key(0)).shape  # time, batch, features
        torch.Size([2, 4])

    References:
        Gal, Ghahramani, "A theoretically grounded application of dropout in recurrent neural
        networks", NeurIPS 2016.
    """
    x = check_inexact(x)
    axis = check_axis("time_axis", time_axis, x.ndim, _ADVICE)
    spec = SampledMask("variational_dropout", mask_sampler(sampler), (axis,))
    return apply_dropout(spec, x, rate, key, deterministic)
