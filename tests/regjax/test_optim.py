"""Tests of every optimizer; the other files have tests of particular ones."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from regjax import optim
from regjax.optim._records import RECORDS
from tests.regjax.optimizers import (
    GRADIENT,
    NO_BIAS,
    PARAMS,
    assert_close,
    dtypes,
    first_update,
    in_dtype,
    matrices,
    scalar_updates,
    walk,
)

# The arguments of torch.optim without effect on the result, and those of regjax.optim alone.
NO_EFFECT = {"params", "foreach", "fused", "capturable", "differentiable"}
JAX_ONLY = dict.fromkeys(("mask", "mu_dtype", "accumulator_dtype"))
JAX_ONLY |= {"ns_dtype": "bfloat16", "transposed": False}
EXTRA = dict.fromkeys(RECORDS, "mask") | dict.fromkeys(("Adam", "AdamW", "NAdam"), "mask mu_dtype")
EXTRA |= {"SGD": "mask accumulator_dtype", "Rprop": "", "Muon": "mask ns_dtype transposed mu_dtype"}


@pytest.mark.parametrize("name", RECORDS)
def test_signature(name):
    torch = pytest.importorskip("torch")
    parameters = inspect.signature(getattr(optim, name.lower())).parameters
    torch_parameters = inspect.signature(getattr(torch.optim, name)).parameters
    expected = {arg: p.default for arg, p in torch_parameters.items() if arg not in NO_EFFECT}
    assert expected.keys() - {"lr"} <= set(RECORDS[name].options)
    expected = {"learning_rate": expected.pop("lr"), **expected}
    extra = {arg: JAX_ONLY[arg] for arg in EXTRA[name].split()}
    assert {arg: p.default for arg, p in parameters.items()} == expected | extra
    keywords = [arg for arg, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    assert {"maximize", *extra} & parameters.keys() <= set(keywords)
    positional = [arg for arg in parameters if arg not in keywords]
    assert positional == [arg for arg in expected if arg in positional]


# Muon accepts matrices only.
MATRICES = [{**tree, "bias": tree["bias"][:, None]} for tree in (PARAMS, GRADIENT)]


@dataclass(frozen=True)
class Variant:
    """An optimizer with its options, and a problem.

    Attributes:
        make: Returns the optimizer for a learning rate.
        close: The allowed difference of an eager run and a compiled one, which fuses sums.
        problem: Parameters and their gradient.
        has_schedule: Whether the learning rate may be a schedule.
    """

    make: Callable[[Any], optax.GradientTransformation]
    close: float = 1e-6
    problem: Any = (PARAMS, GRADIENT)
    has_schedule: bool = True


VARIANTS = {
    "sgd": Variant(lambda r: optim.sgd(r, 0.9, 0.1, 0.1, maximize=True, mask=NO_BIAS)),
    "nesterov": Variant(lambda r: optim.sgd(r, 0.9, weight_decay=0.1, nesterov=True)),
    "asgd": Variant(lambda r: optim.asgd(r, 0.1, 0.5, 1.0, 0.1, maximize=True, mask=NO_BIAS)),
    "rprop": Variant(lambda r: optim.rprop(r), has_schedule=False),
    "adam": Variant(lambda r: optim.adam(r, weight_decay=0.1, maximize=True)),
    "amsgrad": Variant(lambda r: optim.adam(r, weight_decay=0.1, amsgrad=True)),
    "adamw": Variant(lambda r: optim.adamw(r, mask=matrices)),
    "nadam": Variant(lambda r: optim.nadam(r, weight_decay=0.1, maximize=True)),
    "nadamw": Variant(
        lambda r: optim.nadam(r, weight_decay=0.1, decoupled_weight_decay=True, mask=matrices)
    ),
    "radam": Variant(lambda r: optim.radam(r, (0.9, 0.9), weight_decay=0.1)),
    "radamw": Variant(
        lambda r: optim.radam(r, weight_decay=0.1, decoupled_weight_decay=True, mask=matrices)
    ),
    "adamax": Variant(lambda r: optim.adamax(r, weight_decay=0.1, mask=matrices)),
    "adagrad": Variant(lambda r: optim.adagrad(r, weight_decay=0.1, mask=matrices)),
    "adagrad-decayed": Variant(lambda r: optim.adagrad(r, 0.1, 0.1, 0.125)),
    "adadelta": Variant(lambda r: optim.adadelta(r, weight_decay=0.1, maximize=True), close=2e-6),
    "rmsprop": Variant(lambda r: optim.rmsprop(r, weight_decay=0.1, mask=matrices), close=2e-6),
    "rmsprop-momentum": Variant(
        lambda r: optim.rmsprop(r, momentum=0.9, weight_decay=0.1), close=2e-6
    ),
    "rmsprop-centered": Variant(
        lambda r: optim.rmsprop(r, momentum=0.9, centered=True), close=2e-6
    ),
    "adafactor": Variant(
        lambda r: optim.adafactor(r, weight_decay=0.1, maximize=True, mask=matrices)
    ),
    "muon": Variant(lambda r: optim.muon(r, ns_dtype="float32"), close=1e-5, problem=MATRICES),
    "muon-bfloat16": Variant(
        lambda r: optim.muon(r, 0.1, 0.9, False, mask=NO_BIAS), close=0.02, problem=MATRICES
    ),
}
each_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
LINKS = {"maximize", "weight_decay", "moments", "learning_rate"}


@each_variant
def test_state_has_four_links_that_keep_their_form(variant):
    params, gradient = variant.problem
    optimizer = variant.make(0.1)
    state = optimizer.init(params)
    after = jax.eval_shape(optimizer.update, gradient, state, params)[1]
    assert state.keys() == LINKS
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    # Optax's tools map the parameters in the state, and nothing else.
    mapped = optax.tree.map_params(optimizer, lambda leaf: leaf + 1, state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    assert jax.tree.map(
        lambda new, old: bool(jnp.all(new == old + (1 if old.ndim else 0))), mapped, state
    ) == jax.tree.map(lambda _: True, state)


# The type of state["moments"], and below of state["learning_rate"].
MOMENTS_STATES = {
    "sgd": (optim.sgd(weight_decay=0.1), optax.EmptyState),
    "momentum": (optim.sgd(momentum=0.9), optax.TraceState),
    "dampened": (
        optim.sgd(momentum=0.9, dampening=0.5),
        (optax.ScaleByScheduleState, optax.TraceState),
    ),
    "adam": (optim.adam(weight_decay=0.1), optax.ScaleByAdamState),
    "amsgrad": (optim.adam(amsgrad=True), optax.ScaleByAmsgradState),
    "adamw": (optim.adamw(), optax.ScaleByAdamState),
    "adamw-amsgrad": (optim.adamw(0.1, amsgrad=True), optax.ScaleByAmsgradState),
    "nadam": (optim.nadam(weight_decay=0.1), optim.ScaleByNadamState),
    "nadamw": (optim.nadam(decoupled_weight_decay=True), optim.ScaleByNadamState),
    "radam": (optim.radam(), optax.ScaleByAdamState),
    "radamw": (optim.radam(decoupled_weight_decay=True), optax.ScaleByAdamState),
    "adamax": (optim.adamax(0.1), optax.ScaleByAdamState),
    "adagrad": (optim.adagrad(weight_decay=0.1), optax.ScaleByRssState),
    "adadelta": (optim.adadelta(weight_decay=0.1), optax.ScaleByAdaDeltaState),
    "rmsprop": (optim.rmsprop(weight_decay=0.1), optax.ScaleByRmsState),
    "rmsprop-centered": (optim.rmsprop(centered=True), optax.ScaleByRStdDevState),
    "rmsprop-momentum": (optim.rmsprop(momentum=0.9), (optax.ScaleByRmsState, optax.TraceState)),
    "rmsprop-both": (
        optim.rmsprop(momentum=0.9, centered=True),
        (optax.ScaleByRStdDevState, optax.TraceState),
    ),
    "adafactor": (optim.adafactor(), (optax.FactoredState, *(optax.EmptyState,) * 2)),
    "muon": (optim.muon(), (optax.EmaState, optax.EmptyState)),
}
RATE_STATES = {
    "adagrad": (optim.adagrad(), optax.EmptyState),
    "adagrad-lr-decay": (optim.adagrad(lr_decay=0.1), optax.ScaleByScheduleState),
    "adadelta-schedule": (optim.adadelta(lambda count: 0.1), optax.ScaleByScheduleState),
}


@pytest.mark.parametrize(
    ("link", "optimizer", "expected"),
    [
        *(("moments", *case) for case in MOMENTS_STATES.values()),
        *(("learning_rate", *case) for case in RATE_STATES.values()),
    ],
    ids=[*MOMENTS_STATES, *RATE_STATES],
)
def test_state_is_what_optax_tools_know(link, optimizer, expected):
    state = optimizer.init(PARAMS["kernel"])[link]
    assert expected == (tuple(map(type, state)) if type(state) is tuple else type(state))


def _arrays(state):
    return [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]


def _rates(variant, dtype):
    yield 0.125
    if dtype != "float64":  # a strongly typed float32, which strict promotion rejects
        yield jnp.float32(0.125)
    if variant.has_schedule:
        yield lambda count: jnp.float32(0.125)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@each_variant
def test_dtypes_are_kept(variant, dtype):
    with jax.enable_x64(dtype == "float64"):
        params, gradient = (in_dtype(tree, dtype) for tree in variant.problem)
        for rate in _rates(variant, dtype):
            optimizer = variant.make(rate)
            state = optimizer.init(params)
            updates, after = jax.eval_shape(optimizer.update, gradient, state, params)
            assert set(jax.tree.leaves(dtypes(updates))) == {jnp.dtype(dtype)}
            assert {leaf.dtype for leaf in _arrays(after)} == {jnp.dtype(dtype)}
            assert dtypes(after) == dtypes(state)


@each_variant
def test_trees_of_mixed_dtypes(variant):
    params, gradient = (
        {"kernel": tree["kernel"].astype(jnp.bfloat16), "bias": tree["bias"]}
        for tree in variant.problem
    )
    optimizer = variant.make([*_rates(variant, "float32")][-1])
    updates = jax.eval_shape(lambda: first_update(optimizer, params, gradient))
    assert dtypes(updates) == dtypes(params)


@each_variant
def test_half_types_are_rounded_once(variant):
    # Parameters, gradient and initial state are exact in bfloat16, so only the result is rounded.
    optimizer, results = variant.make(0.125), []
    for dtype in ("float32", "bfloat16"):
        params, gradient = (in_dtype(tree, dtype) for tree in variant.problem)
        results.append(optimizer.update(gradient, optimizer.init(params), params))
    rounded = optax.tree.cast_like(results[0], results[1])
    assert_close(*(in_dtype(tree, "float32") for tree in (results[1], rounded)))


@each_variant
def test_one_compilation_walks_as_a_loop_does(variant):
    params, gradient = variant.problem
    halved = lambda count: 0.1 / (1.0 + count.astype(float))
    optimizer = variant.make(halved if variant.has_schedule else 0.1)
    traces = []

    def train_step(carry, _):
        traces.append(None)
        params, state = carry
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    start = (params, optimizer.init(params))
    compiled, carry = jax.jit(train_step), start
    for _ in range(4):
        carry, _ = compiled(carry, None)
    assert len(traces) == compiled._cache_size() == 1
    visited, state = walk(optimizer, [gradient] * 4, params)
    assert_close(carry, (visited[-1], state), atol=variant.close)
    scanned, _ = jax.eval_shape(lambda: jax.lax.scan(train_step, start, length=4))
    assert dtypes(scanned) == dtypes(start)


@each_variant
def test_a_traced_learning_rate(variant):
    # The root of the square of a zero gradient has no derivative.
    params, gradient = variant.problem
    gradient = jax.tree.map(lambda g: g + 0.375, gradient)

    def after(rate):
        return walk(variant.make(rate), [gradient] * 2, params)[0][-1]["kernel"]

    value_and_slope = jax.jit(lambda rate: jax.jvp(after, (rate,), (1.0,)))
    values = {rate: value_and_slope(rate) for rate in (0.0, 0.09, 0.1, 0.11)}
    assert_close(values[0.1][0], after(0.1), atol=variant.close)
    difference = (values[0.11][0] - values[0.09][0]) / 0.02
    np.testing.assert_allclose(values[0.1][1], difference, rtol=0.01, atol=2e-3)
    assert np.all(np.isfinite(values[0.0]))


# The others temporarily store a root or a decayed gradient, as in optax.
IN_PLACE = ("sgd", "asgd", "rprop", "adam", "amsgrad", "adamw", "nadam", "radam", "adamax")


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of XLA on a CPU")
@pytest.mark.parametrize("name", IN_PLACE)
def test_a_step_writes_over_what_it_is_given(name):
    shapes = {"kernel": (64, 128), "bias": ()}
    params = {leaf: jax.ShapeDtypeStruct(shape, "float32") for leaf, shape in shapes.items()}
    optimizer = VARIANTS[name].make(0.1)
    state = jax.eval_shape(optimizer.init, params)

    def train_step(params, state, gradient):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(train_step, donate_argnums=(0, 1)).lower(params, state, params).compile()
    assert step.memory_analysis().temp_size_in_bytes < 1000  # a copy of the kernel has 32,768


# Every numeric hyperparameter can be traced. Tuples cannot, but their elements can.
RATE_AND_DECAY = {"learning_rate": 0.125, "weight_decay": 0.5}
MOMENTS = {**RATE_AND_DECAY, "b1": 0.75, "b2": 0.9, "eps": 0.5}


def _betas_apart(make, **options):
    def made(learning_rate, weight_decay, b1, b2, eps):
        return make(learning_rate, (b1, b2), eps, weight_decay, **options)

    return made


def _nadam(learning_rate, weight_decay, b1, b2, eps, momentum_decay):
    return optim.nadam(learning_rate, (b1, b2), eps, weight_decay, momentum_decay)


def _rprop(learning_rate, shrink, grow, smallest, largest):
    return optim.rprop(learning_rate, (shrink, grow), (smallest, largest))


def _adafactor(learning_rate, beta2_decay, eps1, eps2, d, weight_decay):
    return optim.adafactor(learning_rate, beta2_decay, (eps1, eps2), d, weight_decay)


def _muon(learning_rate, weight_decay, momentum, a, b, c, eps):
    options = {"eps": eps, "ns_dtype": "float32"}
    return optim.muon(learning_rate, weight_decay, momentum, True, (a, b, c), **options)


INJECTED = {
    "sgd": (optim.sgd, {**RATE_AND_DECAY, "momentum": 0.75, "dampening": 0.5}),
    "nesterov": (optim.sgd, {**RATE_AND_DECAY, "momentum": 0.75, "nesterov": True}),
    "asgd": (optim.asgd, {**RATE_AND_DECAY, "lambd": 0.5, "alpha": 0.5, "t0": 1.0}),
    "rprop": (optim.rprop, {"learning_rate": 0.125}),
    "rprop-apart": (
        _rprop,
        {"learning_rate": 0.5, "shrink": 0.5, "grow": 1.5, "smallest": 0.1, "largest": 1.0},
    ),
    "adam": (optim.adam, RATE_AND_DECAY),
    "adam-apart": (_betas_apart(optim.adam), MOMENTS),
    "amsgrad-apart": (_betas_apart(optim.adam, amsgrad=True), MOMENTS),
    "adamw": (optim.adamw, RATE_AND_DECAY),
    "adamw-apart": (_betas_apart(optim.adamw), MOMENTS),
    "nadam": (optim.nadam, RATE_AND_DECAY),
    "nadam-apart": (_nadam, {**MOMENTS, "momentum_decay": 0.5}),
    "radam": (optim.radam, RATE_AND_DECAY),
    "radam-apart": (_betas_apart(optim.radam), MOMENTS),
    "adamax": (optim.adamax, RATE_AND_DECAY),
    "adamax-apart": (_betas_apart(optim.adamax), MOMENTS),
    "adagrad": (
        optim.adagrad,
        {**RATE_AND_DECAY, "lr_decay": 0.5, "initial_accumulator_value": 0.5, "eps": 0.5},
    ),
    "adadelta": (optim.adadelta, {**RATE_AND_DECAY, "rho": 0.75, "eps": 0.5}),
    "rmsprop": (optim.rmsprop, {**RATE_AND_DECAY, "alpha": 0.75, "eps": 0.5, "momentum": 0.5}),
    "rmsprop-centered": (optim.rmsprop, {**RATE_AND_DECAY, "momentum": 0.9, "centered": True}),
    "adafactor": (optim.adafactor, RATE_AND_DECAY),
    "adafactor-apart": (
        _adafactor,
        {**RATE_AND_DECAY, "beta2_decay": -0.5, "eps1": 0.5, "eps2": 2.0, "d": 1.5},
    ),
    # Then the number of steps is an array, too.
    "muon": (optim.muon, {**RATE_AND_DECAY, "momentum": 0.5, "ns_steps": 3, "ns_dtype": "float32"}),
    "muon-apart": (
        _muon,
        {**RATE_AND_DECAY, "momentum": 0.5, "a": 1.5, "b": -0.5, "c": 0.125, "eps": 4.0},
    ),
}


@pytest.mark.parametrize(("name", "make", "given"), [(k, *v) for k, v in INJECTED.items()])
def test_injected_hyperparameters(name, make, given):
    params, gradient = VARIANTS[name.split("-")[0]].problem
    expected, expected_state = walk(make(**given), [gradient] * 3, params)
    injected = optax.inject_hyperparams(make)(**given)
    # A step count that is converted to float is float64 here; the parameters are float32.
    with jax.enable_x64(True):
        compiled = optax.GradientTransformation(injected.init, jax.jit(injected.update))
        visited, state = walk(compiled, [gradient] * 3, params)
        assert_close(visited, expected, atol=1e-5, rtol=1e-6)
        assert_close(_arrays(state.inner_state), _arrays(expected_state), atol=1e-5, rtol=1e-6)
        assert given.keys() - state.hyperparams.keys() <= {"nesterov", "centered", "ns_dtype"}
        state.hyperparams["learning_rate"] *= 0
        updates, after = compiled.update(gradient, state, params)
        assert dtypes((updates, after)) == dtypes((params, state))
    if make not in (optim.asgd, optim.rprop, _rprop):  # these read it a step early, or once
        assert_close(updates, jax.tree.map(jnp.zeros_like, params))


# The optimizers with weight decay.
OPTIMIZERS = {n.lower(): getattr(optim, n.lower()) for n in RECORDS if n != "Rprop"}

each_optimizer = pytest.mark.parametrize(("name", "make"), OPTIMIZERS.items(), ids=OPTIMIZERS)


@pytest.mark.parametrize("mask", [NO_BIAS, lambda params: NO_BIAS], ids=["tree", "function"])
@each_optimizer
def test_mask(name, make, mask):
    # The decay changes the sign of the first gradient of the kernel, and so of any update.
    problem = VARIANTS[name].problem
    masked = first_update(make(0.1, weight_decay=2.0, mask=mask), *problem)
    full = first_update(make(0.1, weight_decay=2.0), *problem)
    none = first_update(make(0.1, weight_decay=0.0), *problem)
    assert_close(masked, {"kernel": full["kernel"], "bias": none["bias"]})
    assert not jnp.array_equal(full["kernel"], none["kernel"])
    assert not jnp.array_equal(full["bias"], none["bias"])


def test_a_mask_of_a_whole_subtree():
    params, gradient = {"a": PARAMS, "b": PARAMS}, {"a": GRADIENT, "b": GRADIENT}
    mask = {"a": True, "b": False}
    updates = first_update(optim.sgd(0.1, weight_decay=0.5, mask=mask), params, gradient)
    assert_close(updates["a"], first_update(optim.sgd(0.1, weight_decay=0.5)))
    assert_close(updates["b"], first_update(optim.sgd(0.1)))


def test_a_callable_mask_sees_parameters_at_every_update():
    seen = []

    def mask(params):
        seen.append(params)
        return True

    first_update(optim.sgd(0.1, weight_decay=0.5, mask=mask))
    assert all(tree is PARAMS or tree["bias"] is PARAMS["bias"] for tree in seen)
    assert len(seen) >= 2


@each_optimizer
def test_mask_that_does_not_fit_is_refused_by_init(name, make):
    params, _ = VARIANTS[name].problem
    with pytest.raises(ValueError, match=r"mask must have .* got nothing at 'bias'"):
        make(weight_decay=0.1, mask={"kernel": True}).init(params)
    with pytest.raises(TypeError, match=r"mask at 'bias' must be a bool; got 0\.5"):
        make(weight_decay=0.1, mask={"kernel": True, "bias": 0.5}).init(params)


@each_optimizer
def test_parameters_may_hold_none(name, make):
    params, gradient = ({**tree, "unused": None} for tree in VARIANTS[name].problem)
    mask = {**NO_BIAS, "unused": None}
    for each in (None, mask, {**mask, "unused": True}):
        optimizer = make(0.1, weight_decay=0.5, mask=each)
        updates = jax.eval_shape(lambda o=optimizer: first_update(o, params, gradient))
        assert updates["unused"] is None
        assert updates["kernel"].shape == params["kernel"].shape
    assert first_update(optim.rprop(0.1), params, gradient)["unused"] is None


@each_optimizer
def test_update_needs_parameters_only_to_decay(name, make):
    params, gradient = VARIANTS[name].problem
    optimizer = make(weight_decay=0.1)
    always = name in ("asgd", "adafactor")
    message = "^params must be given, since " + ("" if always else r"weight_decay=0\.1 .* Call")
    with pytest.raises(ValueError, match=message):
        optimizer.update(gradient, optimizer.init(params))
    if not always:
        optimizer = make(weight_decay=0)
        optimizer.update(gradient, optimizer.init(params))


def test_a_schedule_is_asked_from_step_zero_on():
    rates = jnp.array([1.0, 0.5, 0.25])
    updates, _ = scalar_updates(optim.sgd(lambda count: rates[count]), [1.0] * 3)
    assert updates == [-1.0, -0.5, -0.25]


def test_inside_other_transformations():
    clipped = optax.chain(optax.clip_by_global_norm(1e-3), optim.sgd(0.1, weight_decay=0.5))
    scale = 1e-3 / optax.tree.norm(GRADIENT)
    expected = jax.tree.map(lambda g, p: -0.1 * (scale * g + 0.5 * p), GRADIENT, PARAMS)
    assert_close(first_update(clipped), expected, atol=1e-7)


@each_optimizer
def test_beside_another_in_a_partition(name, make):
    params, gradient = VARIANTS[name].problem
    parts = {"kernel": make(0.1, mask=matrices), "bias": optim.sgd(0.1)}
    split = optax.partition(parts, {"kernel": "kernel", "bias": "bias"})
    updates = first_update(split, params, gradient)
    alone = first_update(make(0.1), params, gradient)
    assert_close(updates["bias"], -0.1 * gradient["bias"], atol=1e-7)
    assert_close(updates["kernel"], alone["kernel"], atol=1e-7)
