from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from regjax import optim

OPTIMIZERS = {"adagrad": optim.adagrad, "adadelta": optim.adadelta, "rmsprop": optim.rmsprop}
PARAMS = {"kernel": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "bias": jnp.array([1.0, 2.0])}
GRADIENT = {"kernel": jnp.array([[0.5, 1.0], [-1.0, 0.0]]), "bias": jnp.array([0.5, -1.0])}

each_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def _matrices(tree):
    return jax.tree.map(lambda leaf: leaf.ndim > 1, tree)


def _in_dtype(tree, dtype):
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


def _first_update(optimizer, params=PARAMS, gradient=GRADIENT):
    return optimizer.update(gradient, optimizer.init(params), params)[0]


def _walk(optimizer, steps=3, params=PARAMS, gradient=GRADIENT):
    state = optimizer.init(params)
    for _ in range(steps):
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def _three_steps_down(optimizer):
    """How far each of three steps goes, where the gradient is always 1."""
    state, visited = optimizer.init(jnp.array(0.0)), []
    for _ in range(3):
        update, state = optimizer.update(jnp.array(1.0), state)
        visited.append(-float(update))
    return visited


def _assert_close(ours, theirs, atol=0.0):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), ours, theirs)


@pytest.mark.parametrize(
    ("make", "names", "defaults"),
    [
        (
            optim.adagrad,
            "learning_rate lr_decay weight_decay initial_accumulator_value eps maximize mask",
            (1e-2, 0.0, 0.0, 0.0, 1e-10, False, None),
        ),
        (
            optim.adadelta,
            "learning_rate rho eps weight_decay maximize mask",
            (1.0, 0.9, 1e-6, 0.0, False, None),
        ),
        (
            optim.rmsprop,
            "learning_rate alpha eps weight_decay momentum centered maximize mask",
            (1e-2, 0.99, 1e-8, 0.0, 0.0, False, False, None),
        ),
    ],
)
def test_signature(make, names, defaults):
    parameters = inspect.signature(make).parameters
    assert " ".join(parameters) == names
    assert tuple(p.default for p in parameters.values()) == defaults
    assert parameters["maximize"].kind is inspect.Parameter.KEYWORD_ONLY
    assert parameters["mask"].kind is inspect.Parameter.KEYWORD_ONLY


def _early(value):
    return lambda count: jnp.where(count == 0, value, 0.0)


# The first step from w = -2 with gradient 1, worked out by hand.
@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (optim.adagrad(), -0.01),
        (optim.adagrad(0.1), -0.1),
        (optim.adagrad(0.1, 0.5), -0.1),
        (optim.adagrad(0.1, weight_decay=0.25), -0.1),
        (optim.adagrad(0.1, weight_decay=1.0), 0.1),
        (optim.adagrad(0.1, weight_decay=0.25, maximize=True), 0.1),
        (optim.adagrad(0.1, initial_accumulator_value=3.0), -0.05),
        (optim.adagrad(0.1, eps=1.0), -0.05),
        (optim.adagrad(0.3, initial_accumulator_value=3.0, eps=1.0), -0.1),
        (optim.adagrad(_early(0.1)), -0.1),
        (optim.adagrad(_early(0.1), 0.5), -0.1),
        (optim.adagrad(0.1, weight_decay=_early(1.0)), 0.1),
        (optim.adadelta(), -0.0031622619),
        (optim.adadelta(1.0, 0.25, 0.25), -0.5),
        (optim.adadelta(0.1, 0.25, 0.25), -0.05),
        (optim.adadelta(1.0, 0.25, 0.25, weight_decay=1.0), 0.5),
        (optim.adadelta(1.0, 0.25, 0.25, weight_decay=1.0, maximize=True), 1.5 / 7**0.5),
        (optim.adadelta(_early(0.1), 0.25, 0.25), -0.05),
        (optim.adadelta(1.0, 0.25, 0.25, weight_decay=_early(1.0)), 0.5),
        (optim.rmsprop(), -0.1),
        (optim.rmsprop(0.1, 0.75), -0.2),
        (optim.rmsprop(0.1, 0.75, 0.5), -0.1),
        (optim.rmsprop(0.1, 0.75, weight_decay=0.25), -0.2),
        (optim.rmsprop(0.1, 0.75, weight_decay=0.25, maximize=True), 0.2),
        (optim.rmsprop(0.1, 0.75, momentum=0.5), -0.2),
        (optim.rmsprop(0.1, 0.5, centered=True), -0.2),
        (optim.rmsprop(0.1, 0.5, 0.5, centered=True), -0.1),
        (optim.rmsprop(_early(0.1), 0.75), -0.2),
        (optim.rmsprop(0.1, 0.75, weight_decay=_early(1.0)), 0.2),
    ],
)
def test_first_step_by_hand(optimizer, expected):
    update = _first_update(optimizer, jnp.array([-2.0]), jnp.array([1.0]))
    np.testing.assert_allclose(update, [expected], rtol=1e-6)


RATES_OF_THREE_STEPS = jnp.array([1.0, 0.5, 0.25])


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (optim.adagrad(1.0), [1.0, 2**-0.5, 3**-0.5]),
        (optim.adagrad(1.0, 0.5), [1.0, 2**-0.5 / 1.5, 3**-0.5 / 2.0]),
        (
            optim.adagrad(lambda count: RATES_OF_THREE_STEPS[count], 0.5),
            [1.0, 0.5 * 2**-0.5 / 1.5, 0.25 * 3**-0.5 / 2.0],
        ),
        # The learning rate does not enter the mean of squared steps.
        (optim.adadelta(0.1, 0.0, 1.0), [0.1 * 0.5**0.5, 0.1 * 0.75**0.5, 0.1 * 0.875**0.5]),
        (optim.rmsprop(1.0, 0.5), [2**0.5, (4 / 3) ** 0.5, (8 / 7) ** 0.5]),
        (optim.rmsprop(1.0, 0.0, momentum=0.5), [1.0, 1.5, 1.75]),
        # Nor the momentum.
        (
            optim.rmsprop(lambda count: RATES_OF_THREE_STEPS[count], 0.0, momentum=0.5),
            [1.0, 0.75, 0.4375],
        ),
        (optim.rmsprop(1.0, 0.5, centered=True), [2.0, 4 / 3**0.5, 8 / 7**0.5]),
    ],
)
def test_three_steps_by_hand(optimizer, expected):
    np.testing.assert_allclose(_three_steps_down(optimizer), expected, rtol=1e-6)


def test_the_decay_of_the_learning_rate_in_late_steps():
    optimizer = optim.adagrad(1.0, 1e-3)
    state = optimizer.init(jnp.array(0.0))
    late = optax.ScaleByScheduleState(jnp.int32(10**6))
    update, _ = optimizer.update(jnp.array(1.0), (*state[:3], late))
    np.testing.assert_allclose(update, -1 / 1001, rtol=1e-6)


@pytest.mark.parametrize(
    "mask", [{"kernel": True, "bias": False}, _matrices, lambda params: _matrices(params)]
)
@each_optimizer
def test_mask(make, mask):
    # The decay turns the first gradient of the kernel around, so that even a sign shows it.
    masked = _first_update(make(0.1, weight_decay=2.0, mask=mask))
    full = _first_update(make(0.1, weight_decay=2.0))
    none = _first_update(make(0.1, weight_decay=0.0))
    _assert_close(masked, {"kernel": full["kernel"], "bias": none["bias"]})
    assert not jnp.array_equal(full["kernel"], none["kernel"])
    assert not jnp.array_equal(full["bias"], none["bias"])


@each_optimizer
def test_parameters_may_hold_none(make):
    params, gradient = {**PARAMS, "unused": None}, {**GRADIENT, "unused": None}
    mask = {"kernel": True, "bias": False, "unused": None}
    for each in (None, mask, {**mask, "unused": True}):
        updates = _first_update(make(0.1, weight_decay=0.5, mask=each), params, gradient)
        assert updates["unused"] is None
        assert updates["kernel"].shape == (2, 2)


@each_optimizer
def test_update_needs_parameters_only_to_decay(make):
    optimizer = make(weight_decay=0)
    optimizer.update(GRADIENT, optimizer.init(PARAMS))
    optimizer = make(weight_decay=0.1)
    state = optimizer.init(PARAMS)
    with pytest.raises(ValueError, match=r"params is None, but weight_decay=0\.1 needs .* call"):
        optimizer.update(GRADIENT, state)


def _constant(rate):
    return lambda count: jnp.float32(rate)


# The types of parts 2 and 3; a pair where part 2 is one.
STATES = {
    "adagrad": (optim.adagrad(weight_decay=0.1), optax.ScaleByRssState, optax.EmptyState),
    "adagrad-lr-decay": (
        optim.adagrad(lr_decay=0.1),
        optax.ScaleByRssState,
        optax.ScaleByScheduleState,
    ),
    "adagrad-schedule": (
        optim.adagrad(_constant(0.1), 0.1, mask=_matrices),
        optax.ScaleByRssState,
        optax.ScaleByScheduleState,
    ),
    "adadelta": (optim.adadelta(weight_decay=0.1), optax.ScaleByAdaDeltaState, optax.EmptyState),
    "adadelta-schedule": (
        optim.adadelta(_constant(0.1), mask={"kernel": True, "bias": False}),
        optax.ScaleByAdaDeltaState,
        optax.ScaleByScheduleState,
    ),
    "rmsprop": (optim.rmsprop(weight_decay=0.1), optax.ScaleByRmsState, optax.EmptyState),
    "rmsprop-centered": (
        optim.rmsprop(centered=True),
        optax.ScaleByRStdDevState,
        optax.EmptyState,
    ),
    "rmsprop-momentum": (
        optim.rmsprop(_constant(0.1), momentum=0.9),
        (optax.ScaleByRmsState, optax.TraceState),
        optax.ScaleByScheduleState,
    ),
    "rmsprop-centered-momentum": (
        optim.rmsprop(momentum=0.9, centered=True, weight_decay=0.1),
        (optax.ScaleByRStdDevState, optax.TraceState),
        optax.EmptyState,
    ),
}


@pytest.mark.parametrize(("optimizer", "scaling", "rate"), STATES.values(), ids=STATES)
def test_state_is_what_optax_tools_know(optimizer, scaling, rate):
    state = optimizer.init(PARAMS)
    assert len(state) == 4
    assert type(state[3]) is rate
    if isinstance(scaling, tuple):
        assert tuple(type(part) for part in state[2]) == scaling
    else:
        assert type(state[2]) is scaling
    after = optimizer.update(GRADIENT, state, PARAMS)[1]
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    mapped = optax.tree.map_params(optimizer, lambda leaf: leaf + 1, state)
    moments = jax.tree.leaves(mapped[2])
    assert len(moments) % 2 == 0
    assert all(bool(jnp.all(leaf == 1)) for leaf in moments)


# After one step from w = -2 with gradient 1, by hand.
@pytest.mark.parametrize(
    ("optimizer", "fields"),
    [
        (optim.adagrad(initial_accumulator_value=3.0), {"sum_of_squares": 4.0}),
        (optim.adagrad(lr_decay=0.5), {"sum_of_squares": 1.0, "count": 1}),
        (optim.adadelta(0.1, 0.25, 0.25), {"e_g": 0.75, "e_x": 0.75 * 0.25}),
        (optim.rmsprop(0.1, 0.75), {"nu": 0.25}),
        (optim.rmsprop(0.1, 0.75, momentum=0.5), {"nu": 0.25, "trace": 2.0}),
        (
            optim.rmsprop(0.1, 0.5, momentum=0.5, centered=True),
            {"nu": 0.5, "mu": 0.5, "trace": 2.0},
        ),
    ],
)
def test_what_the_state_holds(optimizer, fields):
    params = jnp.array(-2.0)
    after = optimizer.update(jnp.array(1.0), optimizer.init(params), params)[1]
    for field, expected in fields.items():
        np.testing.assert_allclose(optax.tree.get(after, field), expected, rtol=1e-6)


VARIANTS = {
    "adagrad": lambda rate: optim.adagrad(rate, weight_decay=0.1, mask=_matrices),
    "adagrad-decayed": lambda rate: optim.adagrad(rate, 0.1, 0.1, 0.1),
    "adadelta": lambda rate: optim.adadelta(rate, weight_decay=0.1, maximize=True),
    "rmsprop": lambda rate: optim.rmsprop(rate, weight_decay=0.1, mask=_matrices),
    "rmsprop-momentum": lambda rate: optim.rmsprop(rate, momentum=0.9, weight_decay=0.1),
    "rmsprop-centered": lambda rate: optim.rmsprop(rate, momentum=0.9, centered=True),
}
RATES = {
    "float": lambda: 0.125,
    "schedule": lambda: lambda count: jnp.float32(0.125),
    "array": lambda: jnp.float32(0.125),
}

each_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("rate", RATES.values(), ids=RATES)
@each_variant
def test_dtypes_are_kept(variant, rate, dtype):
    params, gradient = _in_dtype(PARAMS, dtype), _in_dtype(GRADIENT, dtype)
    optimizer = variant(rate())
    state = optimizer.init(params)
    updates, after = jax.eval_shape(optimizer.update, gradient, state, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    assert {leaf.dtype for leaf in jax.tree.leaves(after) if leaf.ndim} == {jnp.dtype(dtype)}
    kinds = [jax.tree.map(lambda leaf: leaf.dtype, tree) for tree in (state, after)]
    assert kinds[0] == kinds[1]


@pytest.mark.parametrize("rate", [0.1, lambda count: jnp.float32(0.1)], ids=["float", "schedule"])
@each_variant
def test_float64_is_kept_under_x64(variant, rate):
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: np.asarray(leaf, "float64"), PARAMS)
        optimizer = variant(rate)
        state = optimizer.init(params)
        updates, after = optimizer.update(params, state, params)
        leaves = [leaf for leaf in jax.tree.leaves((updates, after)) if leaf.ndim]
        assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float64")}


def test_a_float32_learning_rate_decays_under_x64():
    with jax.enable_x64(True):
        optimizer = optim.adagrad(jnp.float32(0.5), jnp.float32(0.5))
        assert _three_steps_down(optimizer)[1] == pytest.approx(0.5 * 2**-0.5 / 1.5, rel=1e-7)


def test_trees_of_mixed_dtypes():
    dtypes = {"kernel": jnp.bfloat16, "bias": jnp.float32}
    params = {name: leaf.astype(dtypes[name]) for name, leaf in PARAMS.items()}
    for variant in VARIANTS.values():
        updates = _first_update(variant(lambda count: jnp.float32(0.1)), params, params)
        assert {name: leaf.dtype for name, leaf in updates.items()} == dtypes


@each_variant
def test_bfloat16_is_rounded_once(variant):
    # Parameters, gradient and the zero state are exact in bfloat16, so only the end rounds.
    optimizer, results = variant(0.1), []
    for dtype in ("float32", "bfloat16"):
        params, gradient = _in_dtype(PARAMS, dtype), _in_dtype(GRADIENT, dtype)
        state = jax.tree.map(jnp.zeros_like, optimizer.init(params))
        results.append(optimizer.update(gradient, state, params))
    rounded = optax.tree.cast_like(results[0], results[1])
    _assert_close(_in_dtype(results[1], "float32"), _in_dtype(rounded, "float32"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@each_optimizer
def test_a_parameter_without_gradient_stays_where_it_is(make, dtype):
    # In float16 itself the default eps would be 0, and the step 0 / 0.
    zeros = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, dtype), PARAMS)
    _assert_close(_first_update(make(), _in_dtype(PARAMS, dtype), zeros), zeros)


@each_variant
def test_one_compilation_for_all_steps(variant):
    optimizer = variant(lambda count: 0.1 / (1.0 + count.astype(float)))
    traces = []

    @jax.jit
    def train_step(params, state):
        traces.append(None)
        updates, state = optimizer.update(GRADIENT, state, params)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, optimizer.init(PARAMS)
    for _ in range(4):
        params, state = train_step(params, state)
    assert len(traces) == 1
    assert train_step._cache_size() == 1


@each_variant
def test_scan_walks_as_a_loop_does(variant):
    optimizer = variant(0.1)

    def train_step(carry, _):
        params, state = carry
        updates, state = optimizer.update(GRADIENT, state, params)
        return (optax.apply_updates(params, updates), state), None

    scanned, _ = jax.lax.scan(train_step, (PARAMS, optimizer.init(PARAMS)), length=3)
    _assert_close(scanned, _walk(optimizer), atol=2e-6)


@each_variant
def test_a_traced_learning_rate(variant):
    # Where a gradient is zero, the root of the mean has no slope.
    gradient = {**GRADIENT, "kernel": GRADIENT["kernel"] + 0.25}

    def after(rate):
        return _walk(variant(rate), 2, gradient=gradient)[0]["kernel"]

    compiled, step = jax.jit(after), 1e-2
    _assert_close(compiled(0.1), after(0.1), atol=2e-6)
    slope = jax.jit(jax.jacfwd(after))(0.1)
    difference = (compiled(0.1 + step) - compiled(0.1 - step)) / (2 * step)
    np.testing.assert_allclose(slope, difference, rtol=0.01, atol=2e-3)


INJECTED = {
    **OPTIMIZERS,
    "rmsprop-centered": lambda learning_rate, weight_decay, momentum=0.9: optim.rmsprop(
        learning_rate, weight_decay=weight_decay, momentum=momentum, centered=True
    ),
}


@pytest.mark.parametrize("make", INJECTED.values(), ids=INJECTED)
def test_injected_hyperparameters(make):
    injected = optax.inject_hyperparams(make)(learning_rate=0.1, weight_decay=0.5)
    state = injected.init(PARAMS)
    updates, after = jax.jit(injected.update)(GRADIENT, state, PARAMS)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    expected = _first_update(make(learning_rate=0.1, weight_decay=0.5))
    # 1 - 0.99 in float32, as an injected alpha is, has lost two digits.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), updates, expected)
    after.hyperparams["learning_rate"] = jnp.float32(0.0)
    _assert_close(injected.update(GRADIENT, after, PARAMS)[0], jax.tree.map(jnp.zeros_like, PARAMS))


@each_optimizer
def test_inside_other_transformations(make):
    parts = {"kernel": make(0.1, mask=_matrices), "bias": optim.sgd(0.1)}
    split = optax.partition(parts, {"kernel": "kernel", "bias": "bias"})
    updates = _first_update(split)
    _assert_close(updates["bias"], -0.1 * GRADIENT["bias"], atol=1e-7)
    _assert_close(updates["kernel"], _first_update(make(0.1))["kernel"], atol=1e-7)


NUMBERS = [
    (optim.adagrad, "learning_rate", "to ascend, pass maximize=True"),
    (optim.adagrad, "lr_decay", r"pass 0\.0 for none"),
    (optim.adagrad, "weight_decay", r"pass 0\.0 for none"),
    (optim.adagrad, "initial_accumulator_value", r"pass 0\.0, say"),
    (optim.adagrad, "eps", "pass 1e-10, say"),
    (optim.adadelta, "learning_rate", "to ascend, pass maximize=True"),
    (optim.adadelta, "rho", r"pass 0\.9, say"),
    (optim.adadelta, "eps", "pass 1e-6, say"),
    (optim.adadelta, "weight_decay", r"pass 0\.0 for none"),
    (optim.rmsprop, "learning_rate", "to ascend, pass maximize=True"),
    (optim.rmsprop, "alpha", r"pass 0\.99, say"),
    (optim.rmsprop, "eps", "pass 1e-8, say"),
    (optim.rmsprop, "weight_decay", r"pass 0\.0 for none"),
    (optim.rmsprop, "momentum", r"pass 0\.0 for none"),
]
each_number = pytest.mark.parametrize(("make", "argument", "fix"), NUMBERS)


@pytest.mark.parametrize("value", [-0.5, float("nan"), float("inf"), np.float32(-1), -1])
@each_number
def test_argument_out_of_range_is_refused(make, argument, fix, value):
    with pytest.raises(ValueError, match=rf"^{argument} must be .* it is {value}: {fix}$"):
        make(**{argument: value})


@pytest.mark.parametrize("value", [1.0, 1.5, jnp.float32(1)])
@pytest.mark.parametrize(("make", "argument"), [(optim.adadelta, "rho"), (optim.rmsprop, "alpha")])
def test_mean_that_never_moves_is_refused(make, argument, value):
    with pytest.raises(ValueError, match=rf"{argument} must be in \[0, 1\), but it is {value}: "):
        make(**{argument: value})


@pytest.mark.parametrize("value", [True, None, "0.1", jnp.ones(2), 1j])
@each_number
def test_argument_that_is_no_number_is_refused(make, argument, fix, value):
    del fix
    with pytest.raises(TypeError, match=f"^{argument} must be a real number, but it is"):
        make(**{argument: value})


@each_optimizer
def test_mask_that_does_not_fit_is_refused_by_init(make):
    optimizer = make(weight_decay=0.1, mask={"kernel": True})
    with pytest.raises(ValueError, match=r"at 'bias': the mask has nothing there"):
        optimizer.init(PARAMS)
    optimizer = make(weight_decay=0.1, mask={"kernel": True, "bias": 0.5})
    with pytest.raises(TypeError, match=r"mask at 'bias' must be a bool, but it is 0\.5"):
        optimizer.init(PARAMS)


@pytest.mark.parametrize(
    ("name", "make"),
    [("Adagrad", optim.adagrad), ("Adadelta", optim.adadelta), ("RMSprop", optim.rmsprop)],
)
def test_complex_parameters(name, make):
    params = {"spectrum": jnp.array([1 + 2j, -1j, 3.0])}
    gradient = {"spectrum": jnp.array([0.5 - 1j, 2 + 1j, 0.5j])}
    with pytest.raises(TypeError, match=rf"{name} .* complex parameter 'spectrum': .*split_real_"):
        make().init(params)
    optimizer = make(0.5, weight_decay=0.1)
    with jax.numpy_dtype_promotion("standard"):
        split = optax.contrib.split_real_and_imaginary(optimizer)
        update = _first_update(split, params, gradient)["spectrum"]
    for part in (jnp.real, jnp.imag):
        alone = _first_update(optimizer, *(jax.tree.map(part, tree) for tree in (params, gradient)))
        _assert_close(part(update), alone["spectrum"], atol=1e-7)
