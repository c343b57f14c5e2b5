"""Every optimizer: its signature, its mask, and its use with other transformations."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import optax
import pytest

from regjax import optim
from regjax.optim._records import RECORDS
from tests.regjax.optimizers import (
    GRADIENT,
    NO_BIAS,
    PARAMS,
    VARIANTS,
    assert_close,
    first_update,
    matrices,
    scalar_updates,
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


# The optimizers with weight decay.
OPTIMIZERS = {n.lower(): getattr(optim, n.lower()) for n in RECORDS if n != "Rprop"}
each_optimizer = pytest.mark.parametrize(("name", "make"), OPTIMIZERS.items(), ids=OPTIMIZERS)


@pytest.mark.parametrize("mask", [NO_BIAS, lambda params: NO_BIAS], ids=["tree", "function"])
@each_optimizer
@pytest.mark.sample(6)
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
