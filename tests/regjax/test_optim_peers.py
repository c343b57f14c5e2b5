"""The optimizers inside the wrappers and train states of optax, Flax and Equinox."""

from __future__ import annotations

import pickle

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization
from flax.training.train_state import TrainState

import regjax
from regjax import optim
from tests.regjax import optimizers
from tests.regjax.optimizers import assert_close, first_update, matrices, walk
from tests.regjax.versions import as_pure

OPTIONS = {name: {"weight_decay": 0.1} for name in optimizers.MAKE} | {
    "sgd": {},
    "rprop": {},
    "momentum": {"dampening": 0.1, "weight_decay": 0.1, "maximize": True},
    "adamw": {"mask": matrices, "mu_dtype": "bfloat16"},
    "nadam": {"weight_decay": 0.1, "decoupled_weight_decay": True},
    "adagrad": {"lr_decay": 0.1, "weight_decay": 0.1},
}


def maker(name):
    """Return the optimizer as a function of the learning rate, for `inject_hyperparams`."""
    return lambda lr=0.1: optimizers.MAKE[name](lr, **OPTIONS[name])


MAKE = {name: maker(name) for name in optimizers.MAKE}
PARAMS = {"a": jnp.array([[0.5, -1.0], [2.0, 0.25]]), "b": jnp.array([[1.0, -0.5]])}
GRADIENT = {"a": jnp.array([[0.25, 0.5], [-1.0, 0.75]]), "b": jnp.array([[-0.5, 1.0]])}
TWICE = jax.tree.map(lambda g: 2 * g, GRADIENT)
CLOSE = 2e-6
# MultiSteps, lookahead and reduce_on_plateau require promotion.
pytestmark = pytest.mark.usefixtures("leaning")


def masked(make):
    wrapped = optax.masked(make(), {"a": True, "b": False})
    updates = first_update(wrapped, PARAMS, GRADIENT)
    alone = first_update(make(), {"a": PARAMS["a"]}, {"a": GRADIENT["a"]})
    assert_close(updates, {**alone, "b": GRADIENT["b"]}, atol=CLOSE)


def chain(make):
    wrapped = optax.chain(optax.scale(2.0), make())
    assert_close(walk(wrapped, [GRADIENT] * 2, PARAMS)[0], walk(make(), [TWICE] * 2, PARAMS)[0])


def named_chain(make):
    wrapped = optax.named_chain(("twice", optax.scale(2.0)), ("optimizer", make()))
    visited, state = walk(wrapped, [GRADIENT] * 2, PARAMS)
    expected, inner = walk(make(), [TWICE] * 2, PARAMS)
    assert_close((visited, state["optimizer"]), (expected, inner))


def multi_steps(make):
    wrapped = optax.MultiSteps(make(), 2)
    state = wrapped.init(PARAMS)
    step = jax.jit(wrapped.update)
    updates, state = step(GRADIENT, state, PARAMS)
    assert_close(updates, jax.tree.map(jnp.zeros_like, PARAMS))
    updates, state = step(GRADIENT, state, PARAMS)
    assert_close(updates, first_update(make(), PARAMS, GRADIENT), atol=CLOSE)


def partition(make):
    wrapped = optax.partition({"x": make(), "y": optax.sgd(0.5)}, {"a": "x", "b": "y"})
    updates = first_update(wrapped, PARAMS, GRADIENT)
    alone = first_update(make(), {"a": PARAMS["a"]}, {"a": GRADIENT["a"]})
    assert_close(updates, {**alone, "b": -0.5 * GRADIENT["b"]}, atol=CLOSE)


def lookahead(make):
    wrapped = optax.lookahead(make(), sync_period=3, slow_step_size=0.5)
    params = optax.LookaheadParams.init_synced(PARAMS)
    updates = first_update(wrapped, params, GRADIENT)
    assert_close(updates.fast, first_update(make(), PARAMS, GRADIENT), atol=CLOSE)
    assert_close(updates.slow, jax.tree.map(jnp.zeros_like, PARAMS))


def flatten(make):
    if make is MAKE["muon"]:  # it accepts no vectors
        return
    updates = first_update(optax.flatten(make()), PARAMS, GRADIENT)
    if make not in (MAKE["adamw"], MAKE["adafactor"]):  # for which a vector is not a matrix
        assert_close(updates, first_update(make(), PARAMS, GRADIENT), atol=CLOSE)


def tree_get_and_set(make):
    wrapped = optax.inject_hyperparams(make)(lr=0.1)
    _, state = wrapped.update(GRADIENT, wrapped.init(PARAMS), PARAMS)
    assert optax.tree_utils.tree_get(state, "lr") == np.float32(0.1)
    state = optax.tree_utils.tree_set(state, lr=jnp.float32(0.0))
    updates, _ = wrapped.update(GRADIENT, state, PARAMS)
    if make not in (MAKE["asgd"], MAKE["rprop"]):  # these read it a step early, or once
        assert_close(updates, jax.tree.map(jnp.zeros_like, PARAMS))


def apply_if_finite(make):
    wrapped = optax.apply_if_finite(make(), 2)
    state = wrapped.init(PARAMS)
    updates, after = jax.jit(wrapped.update)(
        {**GRADIENT, "b": jnp.full((1, 2), jnp.nan)}, state, PARAMS
    )
    assert_close(updates, jax.tree.map(jnp.zeros_like, PARAMS))
    assert_close(after.inner_state, state.inner_state)
    updates, _ = wrapped.update(GRADIENT, after, PARAMS)
    assert_close(updates, first_update(make(), PARAMS, GRADIENT), atol=CLOSE)


def inject_hyperparams(make):
    wrapped = optax.inject_hyperparams(make)(lr=lambda count: 0.1 / (1 + count))
    updates, state = jax.jit(wrapped.update)(GRADIENT, wrapped.init(PARAMS), PARAMS)
    assert_close(updates, first_update(make(), PARAMS, GRADIENT), atol=CLOSE)
    assert state.hyperparams["lr"] == np.float32(0.1)


def line_search(make):
    """Return a link whose update needs additional arguments."""
    wrapped = optax.chain(make(), optax.contrib.reduce_on_plateau())
    state = wrapped.init(PARAMS)
    updates, _ = wrapped.update(GRADIENT, state, PARAMS, value=jnp.float32(1.0))
    assert_close(updates, first_update(make(), PARAMS, GRADIENT), atol=CLOSE)


def nnx_optimizer(make):
    model = nnx.Linear(2, 2, use_bias=False, rngs=nnx.Rngs(0))
    model.kernel[...] = PARAMS["a"]
    optimizer = nnx.Optimizer(model, make(), wrt=nnx.Param)
    gradients = jax.tree.map(lambda _: GRADIENT["a"], nnx.state(model, nnx.Param))
    nnx.jit(lambda m, o, g: o.update(m, g, value=1.0))(model, optimizer, gradients)
    [expected], _ = walk(make(), [GRADIENT["a"]], PARAMS["a"])
    assert_close(model.kernel[...], expected, atol=CLOSE)


def flax_train_state(make):
    state = TrainState.create(apply_fn=None, params=PARAMS, tx=make())
    state = jax.jit(lambda s: s.apply_gradients(grads=GRADIENT))(state)
    assert_close(state.params, walk(make(), [GRADIENT], PARAMS)[0][0], atol=CLOSE)
    for restored in (
        serialization.from_bytes(state.opt_state, serialization.to_bytes(state.opt_state)),
        pickle.loads(pickle.dumps(state.opt_state)),
    ):
        assert jax.tree.structure(restored) == jax.tree.structure(state.opt_state)
        assert_close(restored, state.opt_state)


class _Model(eqx.Module):
    """A model with leaves that are not trained."""

    weight: jax.Array
    calls: jax.Array
    activation: object
    name: str
    bias: None = None

    def __call__(self, x):
        return jnp.sum(self.activation(x @ self.weight))


def equinox_filter(make):
    model = _Model(PARAMS["a"], jnp.array([[3]]), jax.nn.relu, "model")
    optimizer, x = make(), jnp.array([[1.0, 0.5]])
    state = optimizer.init(eqx.filter(model, eqx.is_array))
    gradient = eqx.filter_grad(lambda m: m(x))(model)
    expected, _ = walk(make(), [gradient.weight] * 2, PARAMS["a"])
    for at_update in (eqx.filter(model, eqx.is_array), model):
        updates, after = eqx.filter_jit(optimizer.update)(gradient, state, at_update)
        new = eqx.apply_updates(model, updates)
        assert_close(new.weight, expected[0], atol=CLOSE)
        assert new.calls == 3
        assert jax.tree.structure(after) == jax.tree.structure(state)


PEERS = (
    masked,
    chain,
    named_chain,
    multi_steps,
    partition,
    lookahead,
    flatten,
    tree_get_and_set,
    apply_if_finite,
    inject_hyperparams,
    line_search,
    nnx_optimizer,
    flax_train_state,
    equinox_filter,
)


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.__name__)
@pytest.mark.sample(7)
def test_quick(peer):
    peer(MAKE["momentum"])


@pytest.mark.slow
@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.__name__)
@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_every_optimizer(make, peer):
    peer(make)


MASKED = {
    "adamw": optim.adamw,
    "sgd": lambda rate, **options: optim.sgd(rate, weight_decay=0.5, **options),
    "l1": lambda rate, **options: optax.chain(optim.add_l1_decay(rate, **options), optim.sgd(rate)),
}


@pytest.mark.parametrize("make", MASKED.values(), ids=MASKED)
def test_static_masks_in_nnx_optimizer(make):
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    state = nnx.state(model, nnx.Param)
    results = []
    for mask in (
        regjax.decay_mask(state),
        regjax.decay_mask(as_pure(state)),
        regjax.decay_mask,
    ):
        trained = nnx.clone(model)
        optimizer = nnx.Optimizer(trained, make(0.1, mask=mask), wrt=nnx.Param)
        optimizer.update(trained, jax.tree.map(jnp.ones_like, state))
        results.append(nnx.to_pure_dict(nnx.state(trained, nnx.Param)))
    assert_close(results[0], results[2])
    assert_close(results[1], results[2])
    penalties = [
        regjax.l2_penalty(params, 0.5, mask=regjax.decay_mask(state))
        for params in (state, as_pure(state))
    ]
    assert_close(*penalties)


def test_static_references_in_nnx_optimizer():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    state = nnx.state(model, nnx.Param)
    zeros = jax.tree.map(jnp.zeros_like, state)
    for reference in (zeros, as_pure(zeros)):
        trained = nnx.clone(model)
        link = optax.chain(optim.add_l2_sp_decay(reference, 0.5), optim.sgd(0.5))
        nnx.Optimizer(trained, link, wrt=nnx.Param).update(trained, zeros)
        assert_close(trained.kernel[...], 0.75 * model.kernel[...], rtol=1e-6)
