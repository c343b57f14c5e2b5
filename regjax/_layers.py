"""Code shared by the layers for Flax, Equinox and Haiku: settings, and calls of a function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from jax.core import Tracer

from regjax._checks import check_array, check_number, naming
from regjax._dropout.core import check_flag
from regshared.checks import (
    check_bool,
    check_callable,
    check_choice,
    check_integer,
    check_integers,
    check_string,
)

if TYPE_CHECKING:
    from jax.typing import ArrayLike

    from regjax._random.keys import KeyLike

# The attributes that a layer may have and passes to its function, with the check of each.
_SETTINGS: dict[str, Callable[[str, Any], Any]] = {
    "block_size": lambda name, value: check_integer(name, value, minimum=1),
    "broadcast_dims": check_integers,
    "channel_axis": check_integer,
    "gamma_scale": lambda name, value: check_number(name, value, minimum=0),
    "mode": lambda name, value: check_choice(name, value, ("row", "batch")),
    "rule": lambda name, value: value,  # checked against the weights, in the call
    "sampler": lambda name, value: check_callable(name, value, "(key, keep_prob, shape)"),
    "scale_by_keep": check_bool,
    "share_channels": check_bool,
    "time_axis": check_integer,
    "with_noise": check_bool,
}


def check_settings(layer: object) -> None:
    """Raise a TypeError or ValueError for an invalid setting when a layer is constructed."""
    for name, check in {**_SETTINGS, "rng_collection": check_string}.items():
        if hasattr(layer, name):
            check(name, getattr(layer, name))


class FunctionLayer:
    """Base of a layer that calls a function with its settings.

    Attributes:
        _function: The regjax function behind the layer; private, or `nnx.tabulate` would show it.
    """

    _function: ClassVar[Callable[..., Any]]

    def _drop(self, inputs: Sequence[Any], rate_or_stddev: ArrayLike, /, **options: Any) -> Any:
        """Apply the function to the inputs; `options` holds `key` and `deterministic`."""
        settings = {name: getattr(self, name) for name in _SETTINGS if hasattr(self, name)}
        if "broadcast_dims" in settings:
            ndim = check_array("inputs", inputs[0]).ndim
            settings["broadcast_dims"] = wrapped_dims(settings["broadcast_dims"], ndim)
        return self._function(*inputs, rate_or_stddev, **settings, **options)


class FlaxLayer(FunctionLayer):
    """Base of the layers for Linen and NNX, each of which implements `_flag` and `_key`.

    Attributes:
        keyless_rates: Rates or standard deviations for which nothing is random and no key is
            needed.
        _key_name: The name of the key in a call, for errors.
    """

    keyless_rates: ClassVar[tuple[float, ...]] = (0, 1)
    _key_name: ClassVar[str]

    def _flag(self, deterministic: ArrayLike | None) -> ArrayLike:
        """Return `deterministic` of the call, or else of the layer."""
        raise NotImplementedError

    def _key(self, source: Any) -> KeyLike:
        """Return a key from the source of the call, or else of the layer."""
        raise NotImplementedError

    def _call(
        self,
        inputs: Sequence[Any],
        rate_or_stddev: ArrayLike,
        deterministic: ArrayLike | None,
        source: Any,
    ) -> Any:
        """Return the first of the inputs, with dropout in training."""
        flag = check_flag(self._flag(deterministic))
        if flag is True:
            return inputs[0]
        is_random = isinstance(rate_or_stddev, Tracer) or rate_or_stddev not in self.keyless_rates
        key = self._key(source) if is_random else None
        with naming(x="inputs", weights="inputs", key=self._key_name):
            return self._drop(inputs, rate_or_stddev, key=key, deterministic=flag)


def wrapped_dims(
    broadcast_dims: Sequence[int],
    ndim: int,
    *,
    of: str = "inputs",
    error: type[Exception] = IndexError,
) -> tuple[int, ...]:
    """Return `broadcast_dims` as Flax and Haiku interpret them: negative ones count from the end.

    `of` is the framework's name for the array with `ndim` dimensions, and `error` the exception
    that it raises if one is out of range.
    """
    broadcast_dims = check_integers("broadcast_dims", broadcast_dims)
    if any(not -ndim <= dim < ndim for dim in broadcast_dims):
        raise error(
            f"broadcast_dims must be dimensions of {of}, which has {ndim}; got {broadcast_dims}."
        )
    return tuple(sorted({dim % ndim for dim in broadcast_dims}))
