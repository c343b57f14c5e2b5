"""Dropout for sequences: one mask for all timesteps."""

from __future__ import annotations

import torch
from torch import Tensor

from regshared.spellings import explain_names
from regtorch._dropout.core import SampledMask, apply_dropout, check_axis, check_inexact
from regtorch._random.bernoulli import Sampler, bernoulli
from regtorch._random.packed import mask_sampler

_ADVICE = " For a single timestep, use dropout with the same key at every step."


@explain_names
def variational_dropout(
    x: Tensor,
    rate: float | Tensor,
    *,
    key: Tensor | torch.Generator | None = None,
    deterministic: bool | Tensor = False,
    time_axis: int = 1,
    sampler: Sampler = bernoulli,
) -> Tensor:
    """Zero each feature of each row with probability `rate`, identically at every timestep.

    A new mask at every step is noise that a recurrent network accumulates over time; one mask for
    the whole sequence is a smaller network, drawn once. It is `dropout` with a mask shared along
    `time_axis`, also called locked dropout. The result and other errors are those of `dropout`.

    Inside the recurrence there is no time axis. There, call `dropout` on the state with **one key
    for all steps**, made outside the loop, as in the example; a generator would draw another key at
    every step.

    Args:
        x: Floating or complex, with a time axis, such as (batch, time, features).
        rate: See `dropout`.
        key: See `dropout`.
        deterministic: See `dropout`.
        time_axis: The dimension of time, counted from the end if negative: 1 for (batch, time,
            features), 0 for (time, batch, features), the default of `torch.nn.LSTM`.
        sampler: See `dropout`.

    Raises:
        TypeError: `time_axis` is not an integer.
        ValueError: `time_axis` is not a dimension of `x`.

    Note (PyTorch):
        The `dropout=` of `torch.nn.LSTM` differs: it draws a new mask at every timestep.

    Example:
        >>> import torch, regtorch
        >>> cell, (input_key, state_key) = torch.nn.LSTMCell(3, 4), regtorch.split(regtorch.key(0))
        >>> xs = torch.ones(7, 2, 3)  # time, batch, features
        >>> xs = regtorch.variational_dropout(xs, 0.3, key=input_key, time_axis=0)
        >>> h = c = torch.zeros(2, 4)
        >>> for x in xs:
        ...     h = regtorch.dropout(h, 0.5, key=state_key)
        ...     h, c = cell(x, (h, c))
        >>> bool((xs == xs[:1]).all()), h.shape
        (True, torch.Size([2, 4]))

    References:
        Gal and Ghahramani, "A theoretically grounded application of dropout in recurrent neural
        networks", NeurIPS 2016.
    """
    x = check_inexact(x)
    axis = check_axis("time_axis", time_axis, x.ndim, _ADVICE)
    spec = SampledMask("variational_dropout", mask_sampler(sampler), (axis,))
    return apply_dropout(spec, x, rate, key, deterministic)
