"""Whole train steps in the harness: each feature agrees, and a defect in it is found."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import regjax
from parity_tests import views
from parity_tests.compare import BFLOAT16, FLOAT32, FLOAT64
from parity_tests.frameworks import to_torch
from parity_tests.harness import JaxSide, JaxStep, TorchSide, TorchStep, compare_training
from parity_tests.sides import JaxStepRun
from parity_tests.train_steps import NAMES, RATE, batches, jax_step, template, torch_step

ADAM = lambda params: torch.optim.Adam(params, RATE)
SGD = lambda params: torch.optim.SGD(params, RATE, momentum=0.9)
CLIP = 0.3
SCHEDULE = lambda count: 1 / (1 + count)
ADAM_IN_JAX = regjax.optim.adam(RATE)


def clip_as_torch(gradients, params=None):
    """Clip by global norm, to which PyTorch adds 1e-6 and optax nothing."""
    norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(gradients)))
    factor = jnp.minimum(1, CLIP / (norm + 1e-6))
    return jax.tree.map(lambda g: g * factor, gradients)


CLIPPED = optax.chain(optax.stateless(clip_as_torch), ADAM_IN_JAX)
MOMENTUM = optax.sgd(RATE, momentum=0.9)
SCHEDULED = optax.sgd(lambda count: RATE * SCHEDULE(jnp.asarray(count, float)), momentum=0.9)
AVERAGED = {"decay": 0.9}
SCALED = {"scale": 2.0**10}
RECIPE = {"parts": 2, **AVERAGED, **SCALED}
RECIPE_IN_JAX = optax.chain(optax.stateless(clip_as_torch), SCHEDULED)
# Feature: the optimizers, and the arguments of both sides; those of JAX with a defect; where it is.
FEATURES = {
    "clipping": ((CLIPPED, {}), (ADAM, {"clip": CLIP}), (ADAM_IN_JAX, {}), (1, "state")),
    "accumulation": (
        (MOMENTUM, {"parts": 2}),
        (SGD, {"parts": 2}),
        (optax.chain(optax.scale(2.0), MOMENTUM), {"parts": 2}),  # a sum, not a mean
        (1, "state"),
    ),
    "loss scaling": (
        (MOMENTUM, SCALED),
        (SGD, SCALED),
        (MOMENTUM, {**SCALED, "unscale": False}),
        (1, "state"),
    ),
    "learning rate": ((MOMENTUM, {}), (SGD, {}), (optax.sgd(1.02 * RATE, 0.9), {}), (1, "update")),
    "momentum": ((MOMENTUM, {}), (SGD, {}), (optax.sgd(RATE, 0.91), {}), (2, "state")),
    "EMA": ((MOMENTUM, AVERAGED), (SGD, AVERAGED), (MOMENTUM, {"decay": 0.91}), (1, "average")),
    "schedule": (
        (SCHEDULED, {}),
        (SGD, {"schedule": SCHEDULE}),
        (MOMENTUM, {}),
        (2, "update"),
    ),
    "a whole recipe": (
        (RECIPE_IN_JAX, RECIPE),
        (SGD, {**RECIPE, "clip": CLIP, "schedule": SCHEDULE}),
        (RECIPE_IN_JAX, {**RECIPE, "decay": 0.91}),
        (1, "average"),
    ),
}


def place_of(found):
    assert found.first is not None
    return found.first.step, found.first.quantity


@pytest.mark.parametrize(
    "tier",
    [FLOAT32, pytest.param(FLOAT64, marks=pytest.mark.slow)],
    ids=["float32", "float64"],
)
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.sample(2)
def test_a_feature_agrees_and_a_defect_in_it_is_found(feature, tier):
    in_jax, in_torch, defect, where = FEATURES[feature]

    def run(make, options):
        port = jax_step(make, dtype=tier.dtype, **options)
        original = torch_step(in_torch[0], dtype=tier.dtype, **in_torch[1])
        return compare_training(port, original, batches(4, tier.dtype), NAMES, tier=tier)

    with jax.enable_x64(tier.dtype == "float64"):
        found = run(*in_jax)
        found.raise_if_different()
        assert found.deviations["state"]
        assert bool(found.deviations["average"]) == ("decay" in in_torch[1])
        assert place_of(run(*defect)) == where


@pytest.mark.parametrize(("tier", "agrees"), [(BFLOAT16, True), (FLOAT32, False)])
def test_products_in_bfloat16_have_a_tier(tier, agrees):
    port = jax_step(MOMENTUM, compute="bfloat16")
    found = compare_training(
        port, torch_step(SGD, compute="bfloat16"), batches(5), NAMES, tier=tier
    )
    assert found.agrees == agrees, found


def test_a_learning_rate_that_is_15_percent_off_is_found_in_bfloat16():
    """Whole steps show no gradients; between losses, 2 % are found."""
    port = jax_step(optax.sgd(1.15 * RATE, momentum=0.9), compute="bfloat16")
    pair = port, torch_step(SGD, compute="bfloat16")
    found = compare_training(*pair, batches(5), NAMES, tier=BFLOAT16)
    assert place_of(found) == (1, "update")


def normalized(momentum=0.1, **options):
    """Return the original with a batch norm, which has running statistics."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 8),
        torch.nn.BatchNorm1d(8, momentum=momentum),
        torch.nn.Tanh(),
        torch.nn.Linear(8, 3),
    )
    return torch_step(ADAM, model=model, **options)


def linen_state():
    """Return a TrainState of a model of Linen, and its step."""
    from flax import linen as nn
    from flax.training.train_state import TrainState

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=False, momentum=0.9)(nn.Dense(8)(x))
            return nn.Dense(3)(jnp.tanh(x))

    class State(TrainState):
        batch_stats: dict

    model = Model()
    variables = model.init(jax.random.key(0), jnp.zeros((8, 6)))

    @jax.jit
    def step(state, batch, i):
        def loss(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            y, new = state.apply_fn(variables, batch[0], mutable=["batch_stats"])
            return ((y - batch[1]) ** 2).mean(), new["batch_stats"]

        (value, statistics), gradient = jax.value_and_grad(loss, has_aux=True)(state.params)
        state = state.apply_gradients(grads=gradient, batch_stats=statistics)
        return state, value

    return State.create(apply_fn=model.apply, tx=ADAM_IN_JAX, **variables), step


def nnx_state():
    """Return a module and an optimizer of NNX, and a step that changes them in place."""
    from flax import nnx

    class Model(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.hidden, self.out = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)
            self.norm = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)

        def __call__(self, x):
            return self.out(jnp.tanh(self.norm(self.hidden(x))))

    @nnx.jit
    def step(state, batch, i):
        model, optimizer = state

        def loss(model):
            return ((model(batch[0]) - batch[1]) ** 2).mean()

        value, gradient = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradient)
        return value

    model = Model()
    return (model, nnx.Optimizer(model, ADAM_IN_JAX, wrt=nnx.Param)), step


def equinox_state():
    """Return a module, its state and that of an optimizer, and their step."""
    import equinox as eqx

    class Model(eqx.Module):
        hidden: eqx.nn.Linear
        norm: eqx.nn.BatchNorm
        out: eqx.nn.Linear

        def __init__(self):
            keys = jax.random.split(jax.random.key(0))
            self.hidden = eqx.nn.Linear(6, 8, key=keys[0])
            self.norm = eqx.nn.BatchNorm(8, axis_name="batch", mode="batch", momentum=0.9)
            self.out = eqx.nn.Linear(8, 3, key=keys[1])

        def __call__(self, x, state):
            x, state = self.norm(self.hidden(x), state)
            return self.out(jnp.tanh(x)), state

    @eqx.filter_jit
    def step(all_state, batch, i):
        model, state, moments = all_state

        def loss(model):
            apply = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
            y, new = apply(batch[0], state)
            return ((y - batch[1]) ** 2).mean(), new

        (value, state), gradient = eqx.filter_value_and_grad(loss, has_aux=True)(model)
        updates, moments = ADAM_IN_JAX.update(gradient, moments)
        return (eqx.apply_updates(model, updates), state, moments), value

    model, state = eqx.nn.make_with_state(Model)()
    return (model, state, ADAM_IN_JAX.init(eqx.filter(model, eqx.is_inexact_array))), step


LAYERS = {"hidden": "0", "norm": "1", "out": "3"}
LINEN = {"Dense_0": "0", "BatchNorm_0": "1", "Dense_1": "3"}
STATES = {
    "TrainState": (linen_state, LINEN, "BatchNorm_0/mean"),
    "nnx": (nnx_state, LAYERS, "norm/mean"),
    "equinox": (equinox_state, LAYERS, "norm/batch_state_index/init/0"),
}
# The variance of PyTorch is unbiased, that of the others is not.
BIASED = ("*.running_var",)


def names_of(names, module):
    return next(path for path, name in names.items() if name == module)


@pytest.mark.parametrize(("make", "names", "mean"), STATES.values(), ids=STATES)
@pytest.mark.sample(2)
def test_a_state_of_each_library_trains_the_same(make, names, mean):
    run = lambda original: compare_training(
        JaxStep(*make()), original, batches(3), names, ignore_buffers=BIASED, record=False
    )
    found = run(normalized())
    found.raise_if_different()
    assert len(found.deviations["buffer"]) == len(found.deviations["state"]) == 3
    assert max(found.deviations["buffer"]) <= found.bounds["buffer"]
    # The bias before the batch norm, whose random steps move the running mean.
    assert "Buffers were not compared: 1.running_var." in found.notes
    assert "no verdict: " + names_of(names, "0") + "/bias" in found.notes[-1]

    first = run(normalized(momentum=0.5)).first
    assert first is not None
    assert (first.step, first.quantity, first.name) == (1, "buffer", mean)


def test_a_module_of_averages_is_not_the_model():
    from flax import nnx

    (model, optimizer), step = nnx_state()
    state = model, optimizer, nnx.clone(model)
    run = JaxStepRun(JaxStep(state, step, averages=lambda state: state[2]))
    ones = lambda arrays: {path: np.ones(array.shape) for path, array in arrays.items()}
    run.start(ones(run.params), ones(run.buffers), {p: a + 1 for p, a in ones(run.params).items()})
    assert [float(m.hidden.kernel[0, 0]) for m in (model, state[2])] == [1, 2]
    assert run.buffers.keys() == {"norm/mean", "norm/var"}


def test_a_biased_variance_has_a_hint():
    found = compare_training(JaxStep(*nnx_state()), normalized(), batches(1), LAYERS, record=False)
    assert found.first is not None
    assert (found.first.quantity, found.first.name) == ("buffer", "norm/var")
    assert "n / (n - 1), or pass ignore_buffers=['*.running_var']" in found.first.detail


def test_statistics_of_equinox_continue_at_those_of_pytorch():
    """In the mode "ema" a first step would replace them."""
    import equinox as eqx

    make = eqx.nn.make_with_state(eqx.nn.BatchNorm)
    model, kept = make(3, axis_name="batch", mode="ema", momentum=0.9)
    state = views.unshared((model, kept))
    old = views.read_statistics(state, None)
    assert list(old) == ["ema_state_index/init/0", "ema_state_index/init/1"]
    _, kept = views.replace(state, old, {path: jnp.ones(3) for path in old})
    assert not kept.get(model.ema_first_time_index)
    assert all((array == 1).all() for array in kept.get(model.ema_state_index))


def test_a_buffer_without_a_counterpart_is_an_error_with_module_and_fix():
    port = jax_step(MOMENTUM)
    with pytest.raises(ValueError, match=r"no leaf of params takes '1\.weight', '1\.bias'"):
        compare_training(port, normalized(), batches(1), {"hidden": "0", "out": "3"})
    model = torch_step(SGD).model
    model.get_submodule("1").register_buffer("scale", torch.ones(()))
    original = torch_step(SGD, model=model)
    with pytest.raises(ValueError, match=r"none for '1.scale' of Tanh '1'. Pass statistics= to"):
        compare_training(port, original, batches(1), NAMES)
    found = compare_training(port, original, batches(1), NAMES, ignore_buffers=("1.*",))
    assert "Buffers were not compared: 1.scale." in found.notes
    with pytest.raises(ValueError, match=r"got '2\.\*', which matches none of 1\.scale"):
        compare_training(port, original, batches(1), NAMES, ignore_buffers=("2.*",))
    with pytest.raises(TypeError, match=r"ignore_buffers must be a list of globs, .*; got '1\.\*'"):
        compare_training(port, original, batches(1), NAMES, ignore_buffers="1.*")


SELECTORS = {
    "a state that is not recognized": ({"state": (1, 2)}, "Pass params=, a function from the"),
    "other arrays": (
        {"params": lambda state: jax.tree.map(lambda p: p + 1, state["params"])},
        "must select arrays of the state; got other arrays",
    ),
    "averages on one side": ({"averages": lambda state: state["ema"]}, "in JAX only"),
    "metrics": ({"step": lambda state, batch, i: (state, {})}, "a scalar loss"),
    "two trees": ({"state": ({"params": {}}, {"params": {}})}, "must have one module or tree"),
    "no loss": ({"step": lambda state, batch, i: (state, jnp.zeros(2))}, "a scalar loss"),
}


@pytest.mark.parametrize(("change", "message"), SELECTORS.values(), ids=SELECTORS)
def test_steps_that_cannot_be_compared_are_refused(change, message):
    port = dataclasses.replace(jax_step(MOMENTUM), **change)
    with pytest.raises(ValueError, match=message):
        compare_training(port, torch_step(SGD), batches(1), NAMES)


def test_notes_name_the_quantities_that_are_not_compared():
    original = torch_step(SGD)
    side = TorchStep(original.model, original.step)
    found = compare_training(jax_step(MOMENTUM), side, batches(1), NAMES)
    assert found.notes == (
        "Gradients were not compared: a whole train step does not show them.",
        "The optimizer's state was not compared: TorchStep has no optimizer.",
    )
    found = compare_training(jax_step(optax.sgd(RATE)), torch_step(SGD), batches(1), NAMES)
    assert found.notes[-1] == (
        "The optimizer's state was not compared: the state in JAX has no arrays like those of SGD."
    )


@pytest.mark.parametrize(("momentum", "agrees"), [(0.1, True), (0.5, False)])
def test_a_loss_returns_statistics(momentum, agrees):
    """Compare two losses; the variance is corrected, as in PyTorch."""
    original = normalized(momentum)
    statistics = {"norm": {"mean": jnp.ones(8), "var": jnp.zeros(8)}}
    params = template()
    params["norm"] = {"scale": jnp.zeros(8), "bias": jnp.zeros(8)}

    def loss(params, statistics, batch, step):
        hidden, norm = params["hidden"], params["norm"]
        x = batch[0] @ hidden["kernel"] + hidden["bias"][None]
        new = {"mean": x.mean(0), "var": x.var(0, ddof=1)}
        mix = lambda old, new: 0.9 * old + 0.1 * new
        x = jax.nn.standardize(x, axis=0, epsilon=1e-5) * norm["scale"][None] + norm["bias"][None]
        y = jnp.tanh(x) @ params["out"]["kernel"] + params["out"]["bias"][None]
        return ((y - batch[1]) ** 2).mean(), {"norm": jax.tree.map(mix, statistics["norm"], new)}

    found = compare_training(
        JaxSide(params, loss, ADAM_IN_JAX, statistics=statistics),
        with_loss(original),
        batches(3),
        LAYERS,
    )
    assert found.agrees == agrees
    assert agrees or place_of(found) == (1, "buffer")


def with_loss(original):
    """Return the same model and optimizer with a loss instead of a step."""

    def loss(model, batch, step):
        return ((model(to_torch(batch[0])) - to_torch(batch[1])) ** 2).mean()

    return TorchSide(original.model, loss, original.optimizer)


def test_a_step_is_compared_with_a_loss():
    pair = jax_step(MOMENTUM), with_loss(torch_step(SGD))
    compare_training(*pair, batches(2), NAMES).raise_if_different()
