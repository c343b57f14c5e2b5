"""Uncertainty from Monte Carlo dropout: stochastic forward passes and their disagreement.

It is one file, like its twin `regtorch/_mc_dropout.py`, so that both are read side by side.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import export, lax
from jax.core import Tracer
from jax.scipy.special import entr

from regjax._dropout.core import real_dtype
from regjax._random.keys import check_key, site_key
from regshared.checks import check_bool, check_callable, check_choice, check_integer

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, UInt32

    from regjax._random.keys import KeyLike

Outputs: TypeAlias = Literal["logits", "probabilities", "values"]

_KINDS = ("logits", "probabilities", "values")
_SITE = "mc_dropout"  # pass i draws from site_key(key, i, _SITE)
# The tolerance of a sum of probabilities: wide enough for 8 bits of mantissa, not for logits.
_TOLERANCE = 0.01


class Prediction(NamedTuple):
    """The combined prediction of many stochastic forward passes.

    The arrays are float32, or float64 if the outputs are. The last four are None where they do not
    apply: entropies for values, and samples that were not requested.

    Attributes:
        mean: The mean of the passes: of probabilities, or of values.
        std: Their standard deviation, the square root of the mean squared distance from the mean.
        entropy: The entropy of the mean probabilities in nats: the total uncertainty.
        expected_entropy: The mean entropy of the passes: the uncertainty that they agree on.
        mutual_information: The difference, never negative: the disagreement of the passes, which
            more data could resolve.
        samples: The outputs of each pass, passes first.
    """

    mean: Float[Array, "*shape"]
    std: Float[Array, "*shape"]
    entropy: Float[Array, "*rows"] | None
    expected_entropy: Float[Array, "*rows"] | None
    mutual_information: Float[Array, "*rows"] | None
    samples: Float[Array, "passes ..."] | None


def mc_dropout(
    predict: Callable[..., Float[Array, "*shape"]],
    *inputs: Any,
    key: KeyLike,
    outputs: Outputs,
    samples: int = 32,
    class_axis: int = -1,
    memory_budget: int = 2**30,
    chunk_size: int | None = None,
    keep_samples: bool = False,
) -> Prediction:
    """Predict with dropout on, many times, in one jitted call: mean, deviation and entropy.

    Each pass keeps other units and is another, smaller model. Pass i is `predict(*inputs,
    key=site_key(key, i, "mc_dropout"))`: its masks depend neither on the number of passes nor on
    their grouping, and are the same in regtorch.

    The passes run side by side (`jax.vmap`) in chunks that fit into `memory_budget`, and the chunks
    one after the other; the memory kept between chunks does not grow with `samples`. Deviations are
    summed as differences from the first pass, so that nearly equal outputs keep their digits.

    **Normalization layers must be in evaluation mode**, with their running averages, while dropout
    is on. `predict` is responsible for that:

    - Flax Linen, whose kinds of layers have separate flags: `model.apply(variables, x,
      use_running_average=True, deterministic=False, rngs={"dropout": key})`.
    - Flax NNX: `view = nnx.view(model, use_running_average=True, deterministic=False)`, whose calls
      pass `rngs=nnx.Rngs(dropout=key)` on to each `Dropout`.
    - Equinox: `equinox.nn.inference_mode(model)`, then `equinox.tree_at` sets `inference=False` in
      each `Dropout`.

    Args:
        predict: A pure function of `*inputs` and the keyword `key` that returns one floating array.
            It is compiled once for all calls with inputs of the same shapes, so define it once. A
            function that closes over arrays, which may change, is compiled again at each call: pass
            parameters as inputs, or call `mc_dropout` in a jitted function.
        *inputs: Any number of pytrees of arrays, such as parameters and a batch.
        key: One PRNG key. As with `site_key`, it is not consumed.
        outputs: The kind of output of `predict`: `"logits"`, to which a softmax is applied;
            `"probabilities"` along `class_axis`; or `"values"`, as in regression, which have no
            entropy.
        samples: The number of passes. The mean has a standard error of `std / sqrt(samples)`.
        class_axis: The dimension of the classes in the output of one pass.
        memory_budget: The bytes that the intermediate values of a chunk may take, besides inputs
            and outputs. The estimate adds up the values alive at once, as if XLA fused none of
            them, and is mostly too high. One pass always runs, and passes run one at a time if a
            size is symbolic, as under `jax.export`.
        chunk_size: The number of passes that run side by side, in place of the estimate.
        keep_samples: Whether to return the output of each pass too.

    Raises:
        TypeError: `key` is not a key; `predict` cannot be hashed, or does not return one floating
            array; or one of the numbers is not an integer.
        ValueError: `samples`, `memory_budget` or `chunk_size` is below 1; `outputs` is none of the
            three; `class_axis` is not a dimension of the outputs, or has a single class; `key` is a
            batch of keys; the outputs do not depend on the key, as in evaluation, whatever
            `samples` is, unless they are empty; or the probabilities are negative or do not sum to
            1. Traced probabilities cannot raise and become NaN.

    Note (PyTorch):
        `regtorch.mc_dropout` takes a function or a model. Its passes draw the same masks. It
        detects a `predict` that ignores its key by comparing passes.

    Example:
        >>> import jax, jax.numpy as jnp, regjax
        >>> def predict(weights, x, *, key):
        ...     hidden = regjax.dropout(jax.nn.relu(x @ weights), 0.5, key=key)
        ...     return hidden @ weights.T
        >>> weights, x = jnp.eye(3, 8) * 2, jnp.array([[1.0, 0.0, 0.0], [0.1, 0.1, 0.1]])
        >>> y = regjax.mc_dropout(predict, weights, x, key=jax.random.key(0), outputs="logits")
        >>> y.mean.shape, y.std.shape, y.entropy.shape
        ((2, 3), (2, 3), (2,))

    References:
        Gal and Ghahramani, "Dropout as a Bayesian approximation", ICML 2016. The decomposition of
        the entropy: Houlsby et al., arXiv:1112.5745, 2011. Sums of deviations: Chan, Golub,
        LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
    """
    check_callable("predict", predict, "(*inputs, key) that returns an array")
    check_choice("outputs", outputs, _KINDS)
    settings = _Settings(
        outputs=outputs,
        samples=_at_least_one("samples", samples),
        class_axis=check_integer("class_axis", class_axis),
        memory_budget=_at_least_one("memory_budget", memory_budget),
        chunk_size=None if chunk_size is None else _at_least_one("chunk_size", chunk_size),
        keep_samples=check_bool("keep_samples", keep_samples),
    )
    run = _compiled(predict, settings, inputs, check_key(key))
    prediction, improper = run(inputs, key)
    if settings.outputs == "probabilities" and not isinstance(improper, Tracer) and improper:
        raise ValueError(
            "predict must return probabilities, at least 0 and with sum 1 along "
            f"class_axis={settings.class_axis}; got other values. Pass outputs='logits' for logits."
        )
    return prediction


@dataclasses.dataclass(frozen=True)
class _Settings:
    """The arguments of `mc_dropout` that are static under jit."""

    outputs: str
    samples: int
    class_axis: int
    memory_budget: int
    chunk_size: int | None
    keep_samples: bool


def _compiled(
    predict: Callable[..., Any], settings: _Settings, inputs: tuple[Any, ...], key: KeyLike
) -> Callable[[tuple[Any, ...], KeyLike], tuple[Prediction, Bool[Array, ""]]]:
    """Return the jitted program of `predict`, from earlier calls if these captured no arrays.

    A program that captures arrays is not cached: the cache would keep them alive, and tracers among
    them would leak out of their trace.
    """
    try:
        hash(predict)
    except TypeError:
        raise TypeError(
            f"predict must be hashable, as functions are; got a {type(predict).__name__}. Wrap it: "
            "def predict(model, x, *, key): return model(x, key=key)."
        ) from None
    program = _programs.pop(predict, None)
    if program is None:
        program = jax.jit(functools.partial(_run, predict), static_argnums=0)
    jaxpr = program.trace(settings, inputs, key).jaxpr
    # Captured arrays are constants of the program, captured tracers are additional inputs.
    if not jaxpr.consts and len(jaxpr.in_avals) == len(jax.tree.leaves((inputs, key))):
        _programs[predict] = program
    if len(_programs) > _MOST_PROGRAMS:
        del _programs[next(iter(_programs))]  # the least recently used one
    return functools.partial(program, settings)


def _run(
    predict: Callable[..., Any], settings: _Settings, inputs: tuple[Any, ...], key: KeyLike
) -> tuple[Prediction, Bool[Array, ""]]:
    """Run all passes; also return whether probabilities were improper."""

    def one_pass(index: UInt32[Array, ""]) -> Any:  # which `_check_outputs` checks
        return predict(*inputs, key=site_key(key, index, _SITE))

    def chunk(
        indices: UInt32[Array, " passes"], origin: Float[Array, "*shape"] | None = None
    ) -> tuple[_Moments, Float[Array, "passes ..."] | None]:
        y = jax.vmap(one_pass)(indices)
        moments = _moments(y, settings, origin)
        return moments, y if settings.keep_samples else None

    _check_outputs(one_pass, settings)
    size = settings.chunk_size or _fitting(chunk, settings)
    indices = jnp.arange(settings.samples, dtype=jnp.uint32)
    # The first chunk takes the remainder, and sets the origin for all chunks.
    first = settings.samples % size or size
    moments, samples = chunk(indices[:first])
    if first < settings.samples:

        def add(moments: _Moments, indices: UInt32[Array, " passes"]) -> tuple[_Moments, Any]:
            more, samples = chunk(indices, moments.origin)
            return _merged(moments, more), samples

        moments, rest = lax.scan(add, moments, indices[first:].reshape(-1, size))
        if samples is not None:
            samples = jnp.concatenate([samples, rest.reshape(-1, *rest.shape[2:])])
    return _prediction(moments, samples, settings), moments.improper


# By `predict`, least recently used first.
_programs: dict[Callable[..., Any], Any] = {}
_MOST_PROGRAMS = 256


class _Moments(NamedTuple):
    """The moments of the passes so far. `mean` and `squares` are of differences from `origin`."""

    passes: Float[Array, ""]
    origin: Float[Array, "*shape"]
    mean: Float[Array, "*shape"]
    squares: Float[Array, "*shape"]  # the sum of squared distances from the mean
    entropy: Float[Array, "*rows"] | None  # the mean of the passes' entropies
    improper: Bool[Array, ""]


def _moments(
    y: Float[Array, "passes ..."], settings: _Settings, origin: Float[Array, "*shape"] | None
) -> _Moments:
    """Return the moments of one chunk of passes."""
    y = y.astype(real_dtype(y.dtype))
    entropy, improper = None, jnp.zeros((), bool)
    if settings.outputs != "values":
        axis = settings.class_axis % (y.ndim - 1) + 1
        if settings.outputs == "logits":
            y = jax.nn.softmax(y, axis=axis)
        else:
            wrong = jnp.abs(y.sum(axis, keepdims=True) - 1) > _TOLERANCE
            wrong |= (y < 0).any(axis, keepdims=True)
            y = jnp.where(wrong, jnp.nan, y)
            improper = wrong.any()
        entropy = entr(y).sum(axis).mean(0)
    origin = y[0] if origin is None else origin
    shifted = y - origin[None]
    mean = shifted.mean(0)
    squares = jnp.square(shifted - mean[None]).sum(0)
    return _Moments(jnp.full((), len(y), y.dtype), origin, mean, squares, entropy, improper)


def _merged(a: _Moments, b: _Moments) -> _Moments:
    """Return the moments of the passes of both."""
    passes = a.passes + b.passes
    share = b.passes / passes
    delta = b.mean - a.mean
    entropy = None
    if a.entropy is not None and b.entropy is not None:
        entropy = a.entropy + (b.entropy - a.entropy) * share
    return _Moments(
        passes,
        a.origin,
        a.mean + delta * share,
        a.squares + b.squares + jnp.square(delta) * (a.passes * share),
        entropy,
        a.improper | b.improper,
    )


def _prediction(
    moments: _Moments, samples: Float[Array, "passes ..."] | None, settings: _Settings
) -> Prediction:
    mean = moments.origin + moments.mean
    variance = moments.squares / moments.passes
    positive = variance > 0
    # The square root's slope at 0 is infinite, and times a cotangent of 0 would give NaN.
    std = jnp.where(positive, jnp.sqrt(jnp.where(positive, variance, 1)), variance)
    if moments.entropy is None:
        return Prediction(mean, std, None, None, None, samples)
    mean = jnp.clip(mean, 0, 1)  # rounding may exceed the range in which entropy is defined
    entropy = entr(mean).sum(settings.class_axis)
    disagreement = jnp.maximum(entropy - moments.entropy, 0)
    return Prediction(mean, std, entropy, moments.entropy, disagreement, samples)


def _check_outputs(one_pass: Callable[..., Any], settings: _Settings) -> None:
    """Check the output of a pass before anything runs."""
    y = jax.eval_shape(one_pass, jnp.uint32(0))
    if not isinstance(y, jax.ShapeDtypeStruct) or not jnp.issubdtype(y.dtype, jnp.floating):
        raise TypeError(
            "predict must return one floating array, not several, of logits or probabilities, not "
            f"classes; got {y}."
        )
    if settings.outputs != "values":
        if not -y.ndim <= settings.class_axis < y.ndim:
            raise ValueError(
                f"class_axis must be a dimension of the output of predict, of shape {y.shape}; got "
                f"{settings.class_axis}."
            )
        if y.shape[settings.class_axis] < 2:
            raise ValueError(
                f"class_axis={settings.class_axis} must hold at least two classes; got outputs of "
                f"shape {y.shape}. Return [0, z] for one logit z, or [1 - p, p] for one "
                "probability p."
            )
    if 0 not in y.shape and not _depends_on_index(one_pass):
        raise ValueError(
            "predict must depend on its key; got the same output for all keys. Turn its dropout on "
            "(deterministic=False, a rate above 0), and pass the key to it."
        )


def _depends_on_index(one_pass: Callable[[Any], Any]) -> bool:
    """Return whether vmap batches the output, which it does if it depends on the mapped index."""
    batched: list[bool] = []

    # vmap calls the rule of a function if its argument is batched. (out_axes=None would raise for
    # such an output, and the failed trace would count as a leak under jax_check_tracer_leaks.)
    @jax.custom_batching.custom_vmap
    def output(y: Array) -> Array:
        return y

    @output.def_vmap
    def note(axis_size: int, in_batched: list[bool], y: Array) -> tuple[Array, bool]:
        batched.extend(in_batched)
        return y, in_batched[0]

    jax.eval_shape(jax.vmap(lambda index: output(one_pass(index))), jnp.zeros(2, jnp.uint32))
    return any(batched)


def _fitting(chunk: Callable[..., Any], settings: _Settings) -> int:
    """Return the largest of samples, a half, a quarter, … that fits the budget; at least 1."""
    size = settings.samples
    while size > 1:
        closed = jax.make_jaxpr(chunk)(jnp.zeros(size, jnp.uint32))
        if _peak_bytes(closed.jaxpr) <= settings.memory_budget:
            break
        size = -(-size // 2)
    return size


def _peak_bytes(jaxpr: Any) -> float:
    """Return the peak memory of the values that a program computes, as if none were fused."""
    last_use = {var: place for place, eqn in enumerate(jaxpr.eqns) for var in _variables(eqn)}
    last_use |= dict.fromkeys(filter(_is_variable, jaxpr.outvars), len(jaxpr.eqns))
    alive, peak, sizes = 0, 0, {}
    for place, eqn in enumerate(jaxpr.eqns):
        made = {var: _bytes(var) for var in eqn.outvars}
        within = max(map(_peak_bytes, _inner(eqn)), default=0)
        peak = max(peak, alive + max(sum(made.values()), within))
        sizes |= made
        alive += sum(made.values())
        dead = {var for var in (*_variables(eqn), *made) if last_use.get(var, place) == place}
        alive -= sum(sizes.pop(var, 0) for var in dead)
    return peak


def _variables(eqn: Any) -> list[Any]:
    return [var for var in eqn.invars if _is_variable(var)]


def _is_variable(atom: Any) -> bool:
    return not hasattr(atom, "val")  # a literal has a value


def _bytes(var: Any) -> float:
    shape, dtype = getattr(var.aval, "shape", ()), getattr(var.aval, "dtype", None)
    if any(map(export.is_symbolic_dim, shape)):
        return math.inf
    return math.prod(shape) * getattr(dtype, "itemsize", 0)


def _inner(eqn: Any) -> list[Any]:
    """Return the programs within an equation: the bodies of calls, loops and branches."""
    found = []
    for param in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "jaxpr")):
        param = getattr(param, "jaxpr", param)
        if hasattr(param, "eqns"):
            found.append(param)
    return found


def _at_least_one(name: str, value: int) -> int:
    return check_integer(name, value, minimum=1)
