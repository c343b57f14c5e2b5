"""Attention from the whole matrix of weights, which the backward pass stores once."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
from jax import lax

from regjax._dropout.core import apply_dropout
from regjax._dropout.scores import Allowed, Scores, per_query, softmax
from regjax._random.events import observer
from regjax._random.keys import is_typed

if TYPE_CHECKING:
    from jaxtyping import Array, Float


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Static:
    """A rate or a flag that is known before tracing."""

    value: Any


class _Draw(NamedTuple):
    """The arguments of `apply_dropout`, apart from the weights."""

    spec: Any
    rate: Array | _Static
    key: Any
    deterministic: Array | _Static


def whole(
    scores: Scores,
    query: Array,
    key: Array,
    value: Array,
    bias: Any,
    allowed: Allowed,
    spec: Any,
    rate: Any,
    rng: Any,
    deterministic: Any,
) -> Float[Array, "*batch queries heads features"]:
    """Return the result of attention; the last four arguments are those of `apply_dropout`."""
    rate, flag = (x if isinstance(x, jax.Array) else _Static(x) for x in (rate, deterministic))
    draw = _Draw(spec, rate, rng, flag)
    if observer():  # it must see every call, and no mask of the derivative
        weights = whole_weights(scores, query, key, bias, allowed)
        return _mixed(scores, draw, weights, value).astype(value.dtype)
    return _attend(scores, query, key, value, bias, allowed, draw)


@functools.partial(jax.jit, static_argnums=0)
def whole_weights(
    scores: Scores, query: Array, key: Array, bias: Any, allowed: Allowed
) -> Float[Array, "*batch heads queries keys"]:
    """Return all weights before dropout."""
    return softmax(scores(query, key, bias, allowed, 0))


@functools.partial(jax.jit, static_argnums=0)
def whole_sums(
    scores: Scores, query: Array, key: Array, bias: Any, allowed: Allowed
) -> Float[Array, "*batch heads queries"]:
    """Return the logarithm of each row's sum, -inf for a query that attends to no key."""
    return jax.nn.logsumexp(lax.stop_gradient(scores(query, key, bias, allowed, 0)), axis=-1)


@functools.partial(jax.jit, static_argnums=0)
def _attend(
    scores: Scores, query: Array, key: Array, value: Array, bias: Any, allowed: Any, draw: _Draw
) -> Array:
    """Return the result, in one dispatch outside of jit."""
    found = scores(query, key, bias, allowed, 0)
    return _mixed_softmax(scores, found, value, draw).astype(value.dtype)


def _mixed(scores: Scores, draw: _Draw, weights: Array, value: Array) -> Array:
    """Return the sums of the values by dropped weights, in float32 or wider."""
    rate, flag = (x.value if isinstance(x, _Static) else x for x in (draw.rate, draw.deterministic))
    dropped = apply_dropout(draw.spec, weights, rate, draw.key, flag)
    return scores.mixed_values(dropped.astype(value.dtype), value)


# With the derivatives of its parts, XLA would keep more than one matrix for the backward pass. This
# rule needs the weights alone: it draws their mask again, and where it is transposed, the sum of
# each row of `changes` becomes a sum over features.
@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _mixed_softmax(scores: Scores, found: Array, value: Array, draw: _Draw) -> Array:
    return _mixed(scores, draw, softmax(found), value)


@_mixed_softmax.defjvp
def _mixed_softmax_jvp(scores: Scores, primals: Any, tangents: Any) -> tuple[Array, Array]:
    found, value, draw = primals
    dot_found, dot_value, _ = tangents
    result = _mixed_softmax(scores, *primals)
    if draw.key is not None and is_typed(draw.key):  # the same mask is no reuse of its key
        draw = draw._replace(key=jax.random.clone(draw.key))

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def derivative(
        weights: Array, value: Array, result: Array, draw: _Draw, dot_found: Any, dot_value: Any
    ) -> Array:
        changes = weights * dot_found
        mixed = functools.partial(_mixed, scores, draw)
        _, dot = jax.jvp(mixed, (weights, value), (changes, dot_value))
        return dot - per_query(changes.sum(-1)) * result

    return result, derivative(softmax(found), value, result, draw, dot_found, dot_value)
