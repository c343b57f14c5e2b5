"""Dropout for sequences: one mask for all timesteps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regjax._dropout.core import SampledMask, apply_dropout, check_axis, check_inexact
from regjax._random.bernoulli import Sampler, bernoulli
from regjax._random.packed import mask_sampler
from regshared.spellings import explain_names

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Array, Inexact

    from regjax._random.keys import KeyLike


_ADVICE = " For a single timestep, use dropout with the same key at every step."


@explain_names
def variational_dropout(
    x: Inexact[ArrayLike, "*shape"],
    rate: ArrayLike,
    *,
    key: KeyLike | None = None,
    deterministic: ArrayLike = False,
    time_axis: int = 1,
    sampler: Sampler = bernoulli,
) -> Inexact[Array, "*shape"]:
    """Zero each feature of each row with probability `rate`, identically at every timestep.

    A new mask at every step is noise that a recurrent network accumulates over time; one mask for
    the whole sequence is a smaller network, drawn once. It is `dropout` with a mask shared along
    `time_axis`, also called locked dropout. The result and other errors are those of `dropout`.

    Inside the recurrence there is no time axis. There, call `dropout` on the carried state with
    **one key for all steps**, made outside the loop, as in the example. `jax_debug_key_reuse`,
    where enabled, rejects a key that a loop uses at every step; pass `jax.random.clone(key)` then.
    `examples/recurrent_dropout/cells.py` drops the cells of Flax in the same way.

    Args:
        x: Floating or complex, with a time axis, such as (batch, time, features).
        rate: See `dropout`.
        key: See `dropout`.
        deterministic: See `dropout`.
        time_axis: The dimension of time, counted from the end if negative: 1 for (batch, time,
            features), 0 for (time, batch, features) and for (time, features).
        sampler: See `dropout`.

    Raises:
        TypeError: `time_axis` is not an integer.
        ValueError: `time_axis` is not a dimension of `x`.

    Note (PyTorch):
        The `dropout=` of `torch.nn.LSTM` differs: it draws a new mask at every timestep.

    Example:
        >>> import jax, jax.numpy as jnp, regjax
        >>> xs, key = jnp.ones((7, 2, 3)), jax.random.key(0)  # time, batch, features
        >>> xs = regjax.variational_dropout(xs, 0.3, key=key, time_axis=0)
        >>> w, state_key = jnp.eye(3), regjax.site_key(key, 0, "state")
        >>> def step(h, x):  # one mask of the state for all steps
        ...     h = jnp.tanh(x + regjax.dropout(h, 0.5, key=state_key) @ w)
        ...     return h, h
        >>> jax.lax.scan(step, jnp.zeros((2, 3)), xs)[1].shape
        (7, 2, 3)

    References:
        Gal and Ghahramani, "A theoretically grounded application of dropout in recurrent neural
        networks", NeurIPS 2016.
    """
    x = check_inexact(x)
    axis = check_axis("time_axis", time_axis, x.ndim, _ADVICE)
    spec = SampledMask("variational_dropout", mask_sampler(sampler), (axis,))
    return apply_dropout(spec, x, rate, key, deterministic)
