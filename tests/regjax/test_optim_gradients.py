"""Parameters, gradients and masks that every optimizer and every decay accepts or rejects."""

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


DECAYING = {
    **{name: make for name, make in vars(optim).items() if name in MAKE and name != "rprop"},
    "add_l1_decay": optim.add_l1_decay,
    "add_independent_weight_decay": optim.add_independent_weight_decay,
}


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
