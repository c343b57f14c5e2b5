"""Parameters and gradients that every optimizer and every decay accepts or rejects."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import regjax
from regjax import optim
from regjax.optim import _gradients
from tests.regjax.optimizers import MAKE, assert_close, dtypes, first_update

OPTIMIZERS = {name: make(0.1) for name, make in MAKE.items()}
STATELESS = {
    "sgd": OPTIMIZERS["sgd"],
    "sgd-decay": optim.sgd(0.1, weight_decay=0.5),
    "l1": optim.add_l1_decay(0.5),
    "l2-sp": optim.add_l2_sp_decay({"a": jnp.ones((2, 3)), "b": jnp.ones((2, 3))}, 0.5),
    "independent": optim.add_independent_weight_decay(0.5),
    "cautious": optim.add_cautious_weight_decay(0.5),
    "by-leaf": optim.add_decay_by_leaf(0.5),
    "scale": optim.scale_by_leaf(0.5),
}
LINKS = {**OPTIMIZERS, **STATELESS}
each_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
each_link = pytest.mark.parametrize("link", LINKS.values(), ids=LINKS)
PARAMS = {"a": jnp.full((2, 3), 0.5), "b": jnp.full((2, 3), -0.25)}
GRADIENT = {"a": jnp.full((2, 3), 0.25), "b": jnp.full((2, 3), 2.0)}


@each_link
def test_extra_arguments_are_ignored(link):
    state = link.init(PARAMS)
    plain = link.update(GRADIENT, state, PARAMS)
    extra = link.update(GRADIENT, state, PARAMS, value=1.0, grad=GRADIENT, value_fn=lambda p: 1.0)
    assert_close(plain, extra)


WRONG = {
    "shape": (
        {**GRADIENT, "b": jnp.ones(3)},
        ValueError,
        r"^updates must have the shapes of the parameters; got float32\[3\] at 'b', where the "
        r"parameter is float32\[2, 3\]\. Pass the gradient",
    ),
    "missing": (
        {"a": GRADIENT["a"]},
        ValueError,
        r"^updates must have the structure of the parameters; got nothing at 'b', where the "
        r"parameter is float32\[2, 3\]\. Pass",
    ),
    "superfluous": (
        {**GRADIENT, "c": jnp.ones(3)},
        ValueError,
        r"got float32\[3\] at 'c', where the parameter is nothing",
    ),
    "complex": ({**GRADIENT, "b": GRADIENT["b"] * 1j}, TypeError, r"updates must be real .* 'b'"),
    "text": ({**GRADIENT, "b": "b"}, TypeError, r"updates must be arrays .* got 'b' at 'b'"),
}


@pytest.mark.parametrize(("gradient", "error", "message"), WRONG.values(), ids=WRONG)
@each_link
def test_gradients_of_other_parameters_are_refused(link, gradient, error, message):
    with pytest.raises(error, match=message):
        link.update(gradient, link.init(PARAMS), PARAMS)


@pytest.mark.parametrize("params", [PARAMS, {**PARAMS, "a": None}], ids=["untrained", "none"])
def test_gradients_are_checked_behind_one_that_is_none(params):
    gradient = {"a": None, "b": jnp.ones(3)}
    with pytest.raises(ValueError, match=r"shapes of the parameters; got float32\[3\] at 'b'"):
        OPTIMIZERS["adam"].update(gradient, OPTIMIZERS["adam"].init(params), params)


def test_a_parameter_that_is_none_has_no_gradient():
    params, optimizer = {**PARAMS, "a": None}, OPTIMIZERS["adam"]
    with pytest.raises(ValueError, match="'a', where the parameter is None"):
        optimizer.update(GRADIENT, optimizer.init(params), params)


def test_an_array_has_a_shape_and_a_dtype():
    assert _gradients.is_array(np.ones(1))
    for partial in (SimpleNamespace(shape=()), SimpleNamespace(dtype="float32"), 1.0):
        with pytest.raises(TypeError, match=r"params must hold only arrays; got .*\. Pass"):
            _gradients.check_arrays(partial)


@pytest.mark.parametrize(
    "name", sorted(OPTIMIZERS.keys() - {"sgd", "asgd", "adafactor", "adamw", "muon"})
)
def test_they_are_refused_without_parameters_too(name):
    optimizer = OPTIMIZERS[name]
    with pytest.raises(ValueError, match=r"float32\[3\] at 'b', where the optimizer state is"):
        optimizer.update({**GRADIENT, "b": jnp.ones(3)}, optimizer.init(PARAMS))


@each_link
def test_integers_are_not_trained(link):
    params, gradient = ({**tree, "step": jnp.array([[7]])} for tree in (PARAMS, GRADIENT))
    if link is STATELESS["l2-sp"]:
        link = optim.add_l2_sp_decay(params, 0.5, mask={"a": True, "b": True, "step": False})
    elif link is STATELESS["cautious"]:
        link = optim.add_cautious_weight_decay(0.5, {"a": True, "b": True, "step": False})
    state = link.init(params)
    for wrong in (gradient["step"], jnp.ones((1, 1))):
        with pytest.raises(TypeError, match=r"params must be float .* int32\[1, 1\] at 'step'"):
            link.update({**gradient, "step": wrong}, state, params)
    # The gradient of an integer in jax.grad(allow_int=True).
    nothing = {**gradient, "step": np.zeros((1, 1), jax.dtypes.float0)}
    updates, after = link.update(nothing, state, params)
    assert optax.apply_updates(params, updates)["step"] == 7
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert dtypes(after) == dtypes(state)


@each_link
def test_a_parameter_without_a_gradient_stays_as_it_is(link):
    both, one = GRADIENT, {**GRADIENT, "b": None}
    if link is STATELESS["l2-sp"]:
        alone = optim.add_l2_sp_decay({"a": jnp.ones((2, 3)), "b": None}, 0.5)
    else:
        alone = link
    _, state = link.update(both, link.init(PARAMS), PARAMS)
    params = {**PARAMS, "b": None}
    _, state_alone = alone.update(one, alone.init(params), params)
    updates, after = link.update(one, state, PARAMS)
    updates_alone, after_alone = alone.update(one, state_alone, params)
    assert updates["b"] is None
    assert_close((updates, _of(after, "a")), (updates_alone, _of(after_alone, "a")))
    assert_close(_of(after, "b"), _of(state, "b"))
    assert jax.tree.structure(after) == jax.tree.structure(state)


def _of(state, name):
    leaves = jax.tree.leaves_with_path(state)
    return [leaf for path, leaf in leaves if path[-1] == jax.tree_util.DictKey(name)]


@pytest.mark.parametrize(
    "leaf", [jax.nn.relu, "relu", object()], ids=["function", "text", "object"]
)
@pytest.mark.parametrize("name", LINKS)
def test_a_leaf_that_is_no_array(name, leaf):
    link, params = LINKS[name], {**PARAMS, "other": leaf}
    gradient = {**GRADIENT, "other": None}
    if name not in STATELESS:
        with pytest.raises(TypeError, match=r"params must hold only arrays; got .* at 'other'"):
            link.init(params)
        return
    if name == "l2-sp":
        reference = {"a": jnp.ones((2, 3)), "b": jnp.ones((2, 3)), "other": leaf}
        link = optim.add_l2_sp_decay(reference, 0.5)
    updates, _ = link.update(gradient, link.init(params), params)
    assert_close(updates, {**first_update(LINKS[name], PARAMS, GRADIENT), "other": None})


def test_python_numbers_are_parameters_as_in_optax():
    for optimizer in (optim.sgd(0.5, 0.9), optim.adam(0.5), optim.adafactor(0.5)):
        updates, _ = optimizer.update(1.0, optimizer.init(2.0), 2.0)
        assert updates.shape == ()


FLAGS = {
    "maximize": [m for m in MAKE if m not in ("muon", "rprop")],
    "nesterov": ["momentum"],
    "amsgrad": ["adamw"],
    "decoupled_weight_decay": ["nadam", "radam"],
    "centered": [],
    "transposed": ["muon"],
}


@pytest.mark.parametrize("value", ["False", "no", 1, None])
@pytest.mark.parametrize(("flag", "names"), FLAGS.items(), ids=FLAGS)
def test_a_flag_must_be_a_bool(flag, names, value):
    makes = [MAKE[name] for name in names]
    if flag == "centered":
        makes = [optim.rmsprop]
    if flag == "maximize":
        makes.append(optim.rprop)
    for make in makes:
        with pytest.raises(TypeError, match=f"^{flag} must be True or False; got {value!r}.$"):
            make(**{flag: value})


PAIRS = {
    "betas": (optim.adam, optim.adamw, optim.nadam, optim.radam, optim.adamax),
    "etas": (optim.rprop,),
    "step_sizes": (optim.rprop,),
    "eps": (optim.adafactor,),
    "ns_coefficients": (optim.muon,),
}


@pytest.mark.parametrize("value", [0.9, None, (0.9,), "ab", jnp.ones(5)])
@pytest.mark.parametrize(("name", "makes"), PAIRS.items(), ids=PAIRS)
def test_a_pair_must_be_one(name, makes, value):
    for make in makes:
        with pytest.raises((TypeError, ValueError), match=f"^{name} must be t.* numbers; got "):
            make(**{name: value})


# --- state: dtype, sharding, memory of an injected hyperparameter ---

DTYPES = {
    "sgd": (optim.sgd, "accumulator_dtype", {"momentum": 0.9, "nesterov": True}, "trace"),
    "adam": (optim.adam, "mu_dtype", {"amsgrad": True}, "mu"),
    "adamw": (optim.adamw, "mu_dtype", {}, "mu"),
    "nadam": (optim.nadam, "mu_dtype", {}, "mu"),
    "muon": (optim.muon, "mu_dtype", {"ns_dtype": "float32"}, "ema"),
}


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [("float32", "bfloat16"), ("bfloat16", "float64"), ("float32", "float32")],
)
@pytest.mark.parametrize(("make", "option", "options", "field"), DTYPES.values(), ids=DTYPES)
def test_the_dtype_of_a_moment(make, option, options, field, dtype, stored):
    with jax.enable_x64(True):
        params, gradient = (optax.tree.cast(tree, dtype) for tree in (PARAMS, GRADIENT))
        optimizer = make(0.1, **options, **{option: stored})
        state = optimizer.init(params)
        for _ in range(2):
            updates, after = optimizer.update(gradient, state, params)
            assert set(jax.tree.leaves(dtypes(updates))) == {jnp.dtype(dtype)}
            assert dtypes(after) == dtypes(state)
            state = after
        [moment] = {leaf.dtype for leaf in jax.tree.leaves(optax.tree.get(state, field))}
        assert moment == jnp.dtype(stored)
        if stored == dtype:
            plain = make(0.1, **options)
            [expected] = [plain.update(gradient, plain.init(params), params)]
            assert_close(optimizer.update(gradient, optimizer.init(params), params), expected)


def test_a_step_uses_the_moment_unrounded_and_stores_it_rounded():
    gradient, dtype = {"a": jnp.full((2, 3), jnp.float32(1 / 3))}, jnp.bfloat16
    optimizer = optim.sgd(1.0, 0.875, accumulator_dtype=dtype)
    state, stored = optimizer.init(gradient), jnp.zeros([], dtype)
    for _ in range(3):
        updates, state = optimizer.update(gradient, state)
        trace = 0.875 * stored.astype("float32") + gradient["a"][0, 0]
        stored = trace.astype(dtype)
        assert_close(updates["a"], jnp.full((2, 3), -trace), rtol=1e-6)
        assert_close(state["moments"].trace["a"], jnp.full((2, 3), stored))
    with jax.numpy_dtype_promotion("standard"):
        optimizer = optax.sgd(1.0, 0.875, accumulator_dtype=dtype)
        reference = optimizer.init(gradient)
        for _ in range(3):
            expected, reference = optimizer.update(gradient, reference)
    assert_close(updates, expected, rtol=4e-3)
    assert dtypes((updates, state["moments"].trace)) == dtypes((expected, reference[0].trace))


def test_a_narrow_moment_rounds_no_gradient():
    with jax.enable_x64(True):
        gradient = jnp.array([1 / 3], "float64")
        updates = first_update(optim.sgd(1.0, 0.5, accumulator_dtype="float32"), gradient, gradient)
        assert_close(updates, -gradient)


@pytest.mark.parametrize("dtype", ["int32", "no dtype", 3.0])
@pytest.mark.parametrize(("make", "option", "options", "field"), DTYPES.values(), ids=DTYPES)
def test_a_moment_needs_a_float_dtype(make, option, options, field, dtype):
    del options, field
    with pytest.raises(TypeError, match=f"^{option} must be a float dtype or None; got"):
        make(**{option: dtype})


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Explicit, jax.sharding.AxisType.Auto])
@each_optimizer
def test_the_state_is_sharded_as_the_parameters(optimizer, kind):
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(kind,) * 2)
    spec = jax.P("x", None)
    with jax.set_mesh(mesh):
        params, gradient = (
            jax.device_put({"w": jnp.ones((4, 6))}, jax.NamedSharding(mesh, spec)) for _ in range(2)
        )
        state = optimizer.init(params)
        factor = {"v_row": jax.P("x", None), "v_col": jax.P(None, None)}
        for path, leaf in jax.tree.leaves_with_path(state):
            if leaf.ndim:
                wanted = factor.get(path[-2].name, spec)
                assert leaf.sharding.is_equivalent_to(jax.NamedSharding(mesh, wanted), leaf.ndim)
        if kind == jax.sharding.AxisType.Auto:
            return

        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, after), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=2))((params, state))
        typeof = lambda tree: jax.tree.map(lambda leaf: jax.typeof(leaf).sharding.spec, tree)
        assert typeof(after) == typeof(state)
        assert params["w"].sharding.spec == spec


INJECTED = {
    "sgd": (optim.sgd, {}, 0),
    "sgd-passed": (optim.sgd, {"momentum": 0.0}, 1),
    "rmsprop": (optim.rmsprop, {}, 1),
    "rmsprop-passed": (optim.rmsprop, {"momentum": 0.0}, 2),
}


@pytest.mark.parametrize(("make", "options", "buffers"), INJECTED.values(), ids=INJECTED)
def test_an_injected_default_allocates_nothing(make, options, buffers):
    for optimizer in (
        optax.inject_hyperparams(make)(0.1, **options),
        optax.inject_hyperparams(make)(lambda count: 0.1, **options),
    ):
        for init in (optimizer.init, lambda p, o=optimizer: jax.eval_shape(o.init, p)):
            leaves = jax.tree.leaves(init(jnp.ones(100)))
            assert sum(leaf.shape == (100,) for leaf in leaves) == buffers
        updates, _ = optimizer.update(jnp.ones(100), optimizer.init(jnp.ones(100)), jnp.ones(100))
        assert_close(updates, first_update(make(0.1), jnp.ones(100), jnp.ones(100)), rtol=1e-6)


@pytest.mark.parametrize("name", ["adam", "adamw", "nadam", "radam", "adamax"])
def test_betas_can_be_injected(name):
    make, betas = getattr(optim, name), jnp.array([0.75, 0.875])
    expected = first_update(make(0.125, (0.75, 0.875)), PARAMS, GRADIENT)
    for given in (betas, np.array(betas), lambda count: betas):
        optimizer = optax.inject_hyperparams(make)(0.125, betas=given)
        state = optimizer.init(PARAMS)
        assert_close(state.hyperparams["betas"], betas)
        updates, _ = jax.jit(optimizer.update)(GRADIENT, state, PARAMS)
        assert_close(updates, expected, rtol=1e-6)


# --- masks ---

MASKS = {
    "rule": regjax.decay_mask,
    "one-bool": lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
    "one-true": lambda params: jax.tree.map(lambda p: True, params),
}
DECAYING = {
    **{name: make for name, make in vars(optim).items() if name in MAKE and name != "rprop"},
    "add_l1_decay": optim.add_l1_decay,
    "add_independent_weight_decay": optim.add_independent_weight_decay,
}
LAYER = {"dense": {"kernel": jnp.ones((2, 3)), "other": {"kernel": jnp.ones((2, 3))}}}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("make", [optim.adamw, optim.sgd])
def test_a_mask_that_is_taken_for_a_schedule_is_refused(make, mask):
    optimizer = optax.inject_hyperparams(make)(weight_decay=0.5, mask=mask)
    with pytest.raises((TypeError, ValueError), match=r"static_args=\('mask',\)"):
        optimizer.init(LAYER)
    fixed = optax.inject_hyperparams(make, static_args=("mask",))(weight_decay=0.5, mask=mask)
    jax.eval_shape(lambda: first_update(fixed, LAYER, LAYER))


def test_a_rule_of_a_step_count_is_refused():
    message = r"params must be a pytree of parameters; got int32\[\]\. .* static_args=\('mask',\)"
    with pytest.raises(TypeError, match=message):
        optax.inject_hyperparams(optax.adamw)(0.1, mask=regjax.decay_mask).init(LAYER)
    with pytest.raises(TypeError, match=message):
        jax.jit(regjax.decay_rates)(jnp.int32(0))


@pytest.mark.parametrize("mask", [False, {"a": False, "b": False}, np.bool_(False)])
@pytest.mark.parametrize(("name", "make"), DECAYING.items(), ids=DECAYING)
def test_a_mask_that_is_false_for_all_is_refused(name, make, mask):
    message = r"mask must be True for some parameter, since weight_decay is not 0; got "
    with pytest.raises(ValueError, match=message):
        make(weight_decay=0.1, mask=mask)
    make(weight_decay=0.0, mask=mask).init(PARAMS) if name != "muon" else None


def test_a_mask_function_sees_parameters_without_a_gradient():
    rules = [("b", False), ("**", True)]
    optimizer = optim.adamw(0.1, mask=lambda params: regjax.decay_mask(params, rules))
    state = optimizer.init(PARAMS)
    updates, new_state = optimizer.update({**GRADIENT, "b": None}, state, PARAMS)
    expected, _ = optimizer.update(GRADIENT, state, PARAMS)
    np.testing.assert_array_equal(updates["a"], expected["a"])
    assert updates["b"] is None
    for field in ("mu", "nu"):
        moments = (optax.tree.get(each, field)["b"] for each in (state, new_state))
        np.testing.assert_array_equal(*moments)


def test_an_integer_keeps_its_value_beside_narrow_moments():
    params = {"w": jnp.ones(3), "steps": jnp.array(1_000_003)}
    gradient = {"w": jnp.ones(3), "steps": np.zeros((), jax.dtypes.float0)}
    optimizer = optim.adam(0.1, mu_dtype="bfloat16")
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    assert updates["steps"].dtype == jnp.int32
    assert optax.apply_updates(params, updates)["steps"] == 1_000_003


def test_complex_moments_have_no_narrow_dtype():
    optimizer = optim.sgd(0.1, 0.9, accumulator_dtype="float32")
    with pytest.raises(TypeError, match=r"params must be real .* got complex64 at 'w'"):
        optimizer.init({"w": jnp.ones(3, complex)})
    with pytest.raises(TypeError, match="accumulator_dtype must be a float dtype"):
        optim.sgd(0.1, 0.9, accumulator_dtype="complex64")
