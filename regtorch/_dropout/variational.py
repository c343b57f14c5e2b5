"""Dropout for sequences: one mask for all timesteps."""

from __future__ import annotations

import torch
from torch import Tensor

from regtorch._dropout.core import SampledMask, apply_dropout, check_axis, check_inexact
from regtorch._random.bernoulli import Sampler, bernoulli
from regtorch._random.packed import mask_sampler

_ADVICE = " Of a single timestep, use dropout, with the same key at every step."


def variational_dropout(
    x: Tensor,
    rate: float | Tensor,
    *,
    key: Tensor | torch.Generator | None = None,
    deterministic: bool | Tensor = False,
    time_axis: int = 1,
    sampler: Sampler = bernoulli,
) -> Tensor:
    """Zeroes each feature of each row with probability `rate`, at every timestep alike.

    A new mask at every step is noise that a recurrent network adds up over time; one mask for the
    whole sequence is a smaller network, drawn once. It is `dropout` whose mask is shared along
    `time_axis`, also called locked dropout.

    Inside the recurrence there is no time axis to share a mask along. There, call `dropout` on the
    state with **one key for all steps**, made outside the loop: the same key is the same mask. The
    second example does so.

    Args:
        x: floating or complex, with a time axis, such as (batch, time, features).
        rate: the probability that an element is zeroed, in [0, 1]; a number or a 0-d tensor.
        key: the random key, or a `torch.Generator` from which one is drawn; see `dropout`.
        deterministic: True in evaluation: `x` itself.
        time_axis: the dimension of time, counted from the end if negative: 1 of (batch, time,
            features), 0 of (time, batch, features), which `torch.nn.LSTM` takes by default, and of
            (time, features).
        sampler: what draws the mask.

    Returns:
        A tensor of the shape, dtype and device of `x`.

    Raises:
        TypeError: as `dropout`, or `time_axis` is not an integer.
        ValueError: as `dropout`, or `time_axis` is not a dimension of `x`.

    PyTorch:
        The `dropout=` of `torch.nn.LSTM` is another thing: it draws anew at every timestep.

    JAX:
        `regjax.variational_dropout` with the same key gives the same result bit for bit.

    Example:
        >>> import torch, regtorch
        >>> x = torch.ones(2, 3, 4)  # batch, time, features
        >>> y = regtorch.variational_dropout(x, 0.5, key=regtorch.key(0))
        >>> y[:, 0]
        tensor([[0., 0., 2., 2.],
                [0., 2., 2., 0.]])
        >>> bool((y == y[:, :1]).all())
        True

        A network whose input and whose state are dropped, each with one mask for all steps:

        >>> cell = torch.nn.LSTMCell(3, 4)
        >>> def network(xs, key, deterministic=False):
        ...     of_input, of_state = regtorch.split(key)
        ...     xs = regtorch.variational_dropout(
        ...         xs, 0.3, key=of_input, deterministic=deterministic, time_axis=0
        ...     )
        ...     h = c = xs.new_zeros(xs.shape[1], 4)
        ...     states = []
        ...     for x in xs:
        ...         h = regtorch.dropout(h, 0.5, key=of_state, deterministic=deterministic)
        ...         h, c = cell(x, (h, c))
        ...         states.append(h)
        ...     return torch.stack(states)
        >>> network(torch.ones(7, 2, 3), regtorch.key(0)).shape  # time, batch, features
        torch.Size([7, 2, 4])

        Not with a generator in the place of the key, from which every step would draw another.

    Source: Gal, Ghahramani, "A theoretically grounded application of dropout in recurrent neural
    networks", NeurIPS 2016.
    """
    x = check_inexact(x)
    axis = check_axis("time_axis", time_axis, x.ndim, _ADVICE)
    spec = SampledMask("variational_dropout", mask_sampler(sampler), (axis,))
    return apply_dropout(spec, x, rate, key, deterministic)
