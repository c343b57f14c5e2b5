"""Dropout for sequences: one mask for all timesteps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regjax._dropout.core import SampledMask, apply_dropout, check_axis, check_inexact
from regjax._random.bernoulli import Sampler, bernoulli
from regjax._random.packed import mask_sampler

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Array, Inexact

    from regjax._random.keys import KeyLike


_ADVICE = " Of a single timestep, use dropout, with the same key at every step."


def variational_dropout(
    x: Inexact[ArrayLike, "*shape"],
    rate: ArrayLike,
    *,
    key: KeyLike | None = None,
    deterministic: ArrayLike = False,
    time_axis: int = 1,
    sampler: Sampler = bernoulli,
) -> Inexact[Array, "*shape"]:
    """Zeroes each feature of each row with probability `rate`, at every timestep alike.

    A new mask at every step is noise that a recurrent network adds up over time; one mask for the
    whole sequence is a smaller network, drawn once. It is `dropout` whose mask is shared along
    `time_axis`, also called locked dropout.

    Inside the recurrence there is no time axis to share a mask along. There, call `dropout` on the
    carried state with **one key for all steps**, made outside the loop: the same key is the same
    mask. The second example does so.

    Args:
        x: floating or complex, with a time axis, such as (batch, time, features).
        rate: the probability that an element is zeroed, in [0, 1]; a number or a traced scalar.
        key: the random key; see `dropout`.
        deterministic: True in evaluation: `x` itself.
        time_axis: the dimension of time, counted from the end if negative: 1 of (batch, time,
            features), 0 of (time, batch, features) and of (time, features).
        sampler: what draws the mask.

    Returns:
        An array of the shape, dtype and sharding of `x`.

    Raises:
        TypeError: as `dropout`, or `time_axis` is not an integer.
        ValueError: as `dropout`, or `time_axis` is not a dimension of `x`.

    PyTorch:
        `regtorch.variational_dropout` with the same key gives the same result bit for bit. The
        `dropout=` of `torch.nn.LSTM` is another thing: it draws anew at every timestep.

    Example:
        >>> import jax, jax.numpy as jnp, regjax
        >>> x = jnp.ones((2, 3, 4))  # batch, time, features
        >>> y = regjax.variational_dropout(x, 0.5, key=jax.random.key(0))
        >>> y[:, 0, :]
        Array([[0., 0., 2., 2.],
               [0., 2., 2., 0.]], dtype=float32)
        >>> bool((y == y[:, :1, :]).all())
        True

        A network whose input and whose state are dropped, each with one mask for all steps:

        >>> def network(w, xs, key, deterministic=False):
        ...     of_input, of_state = jax.random.split(key)
        ...     xs = regjax.variational_dropout(
        ...         xs, 0.3, key=of_input, deterministic=deterministic, time_axis=0
        ...     )
        ...     def step(h, x):
        ...         h = regjax.dropout(h, 0.5, key=of_state, deterministic=deterministic)
        ...         h = jnp.tanh(x @ w["in"] + h @ w["hidden"])
        ...         return h, h
        ...     return jax.lax.scan(step, jnp.zeros((xs.shape[1], 4)), xs)[1]
        >>> w = {"in": jnp.ones((3, 4)), "hidden": jnp.eye(4)}
        >>> network(w, jnp.ones((7, 2, 3)), jax.random.key(0)).shape  # time, batch, features
        (7, 2, 4)

        No mask is stored for the backward pass. `jax_debug_key_reuse`, where it is switched on,
        objects to a key that a loop uses at every step, here on purpose: give `dropout`
        `jax.random.clone(of_state)` then. The cells of Flax are dropped in the same way in
        `examples/recurrent_dropout.py`.

    Source: Gal, Ghahramani, "A theoretically grounded application of dropout in recurrent neural
    networks", NeurIPS 2016.
    """
    x = check_inexact(x)
    axis = check_axis("time_axis", time_axis, x.ndim, _ADVICE)
    spec = SampledMask("variational_dropout", mask_sampler(sampler), (axis,))
    return apply_dropout(spec, x, rate, key, deterministic)
