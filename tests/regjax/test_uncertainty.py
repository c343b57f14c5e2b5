"""Monte Carlo dropout in JAX: compilation, memory, transforms, and models of each framework.

The file is long because each framework contributes a model of its own.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import regjax
from regjax import _mc_dropout as _uncertainty
from regjax._random.events import Draw

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (4, 6))
W = jax.random.normal(jax.random.key(1), (6, 3))


def predict(w, x, *, key):
    return jnp.tanh(regjax.dropout(x, 0.5, key=key) @ w)


def mc(predict, *inputs, key=KEY, outputs="logits", samples=8, **options):
    return regjax.mc_dropout(predict, *inputs, key=key, outputs=outputs, samples=samples, **options)


@functools.cache
def usual():
    return mc(predict, W, X, keep_samples=True)


def assert_same(one, other, atol=0.0):
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=atol)


def test_a_pass_is_the_function_with_the_key_of_its_number():
    y = usual()
    for index, sample in enumerate(y.samples):
        alone = predict(W, X, key=regjax.site_key(KEY, index, "mc_dropout"))
        np.testing.assert_allclose(sample, alone, rtol=0, atol=1e-6)


def test_predict_is_compiled_once():
    traces = []

    def counted(w, x, *, key):
        traces.append(x.shape)
        return predict(w, x, key=key)

    first = mc(counted, W, X, keep_samples=True)
    assert_same(first, usual())
    once = len(traces)
    mc(counted, W + 1, X - 1, key=jax.random.key(5), keep_samples=True)
    assert len(traces) == once
    mc(counted, W, X[:2], keep_samples=True)
    assert len(traces) > once


def test_arrays_that_predict_closes_over_may_change():
    """Including arrays inside an object, as the parameters of a module in training."""
    held = {"w": W}

    def closing(x, *, key):
        return predict(held["w"], x, key=key)

    before = mc(closing, X, keep_samples=True)
    held["w"] = W + 1
    assert_same(before, usual(), atol=1e-6)
    after = mc(closing, X, keep_samples=True)
    assert_same(after, mc(predict, W + 1, X, keep_samples=True), atol=1e-6)


CAPTURING = {
    "jit": lambda f: jax.jit(f),
    "vmap": lambda f: jax.vmap(f),
    "grad": lambda f: jax.grad(lambda w: f(w).sum()),
    "jitted grad": lambda f: jax.jit(jax.grad(lambda w: f(w).sum())),
}


@pytest.mark.parametrize("transform", CAPTURING.values(), ids=CAPTURING)
def test_a_predict_that_captures_tracers_leaks_none(transform):
    def mean(w):
        closing = lambda x, *, key: regjax.dropout(x * w, 0.5, key=key)
        return mc(closing, jnp.ones(4), samples=3, outputs="values").mean

    with jax.check_tracer_leaks(True):
        transform(mean)(jnp.ones(4))


def test_programs_are_kept_for_a_limited_number_of_functions(monkeypatch):
    monkeypatch.setattr(_uncertainty, "_MOST_PROGRAMS", 2)
    monkeypatch.setattr(_uncertainty, "_programs", {})
    functions = [lambda x, *, key, n=n: regjax.dropout(x, n / 10, key=key) for n in range(1, 4)]
    for function in (*functions, functions[1]):
        mc(function, jnp.ones(4), samples=2, outputs="values")
    assert list(_uncertainty._programs) == [functions[2], functions[1]]


def test_inside_of_jit_predict_may_close_over_what_is_traced():
    @jax.jit
    def whole(w, x, key):
        return mc(lambda *, key: predict(w, x, key=key), key=key, keep_samples=True)

    assert_same(whole(W, X, KEY), usual(), atol=1e-6)


def test_under_vmap():
    rows = jax.vmap(lambda x: mc(predict, W, x[None], chunk_size=3).mean)(X)
    # A single row has the mask of the first row of a batch.
    np.testing.assert_allclose(rows[0], usual().mean[:1], rtol=0, atol=1e-6)
    assert rows.shape == (4, 1, 3)


def test_gradients_flow_through_every_statistic():
    def loss(w):
        y = mc(predict, w, X, chunk_size=3)  # 2 passes, then 3 and 3
        return (y.mean[:, 0] + y.std[:, 1] + y.mutual_information).sum()

    step = 1e-2 * jax.random.normal(jax.random.key(2), W.shape)
    slope = (loss(W + step) - loss(W - step)) / 2
    np.testing.assert_allclose((jax.grad(loss)(W) * step).sum(), slope, rtol=1e-2)


def test_the_gradient_of_a_deviation_of_zero_is_none():
    """A batch with a row that dropout does not change."""
    x = X.at[0].set(0)
    gradient = jax.grad(lambda w: mc(predict, w, x).std.sum())(W)
    assert jnp.isfinite(gradient).all()
    assert gradient.any()


@pytest.mark.parametrize("kind", ["raw", "rbg"])
def test_keys_of_any_kind(kind):
    key = jax.random.key_data(KEY) if kind == "raw" else jax.random.key(0, impl="rbg")
    y = mc(predict, W, X, key=key, keep_samples=True)
    assert (y.std > 0).all()
    if kind == "raw":
        assert_same(y, usual())


IGNORING = {
    "evaluation": lambda x, key: regjax.dropout(x, 0.5, key=key, deterministic=True),
    "rate 0": lambda x, key: regjax.dropout(x, 0.0, key=key),
    "jit": lambda x, key: jax.jit(lambda x, key: x * 2)(x, key),
    "checkpoint": lambda x, key: jax.checkpoint(lambda x, key: x * 2)(x, key),
    "scan": lambda x, key: jax.lax.scan(lambda c, _: (c * 2, None), x, jnp.arange(2))[0],
    "another key": lambda x, key: regjax.dropout(x, 0.5, key=KEY),
}


@pytest.mark.parametrize("ignoring", IGNORING.values(), ids=IGNORING)
def test_a_key_that_is_not_used_is_found(ignoring):
    for samples in (1, 4):
        with pytest.raises(ValueError, match=r"^predict must depend on its key"):
            mc(lambda x, *, key: ignoring(x, key), X, samples=samples)


def test_probabilities_that_are_none_become_nan_where_they_are_traced():
    def some_wrong(x, *, key):
        y = jax.nn.softmax(regjax.dropout(x, 0.5, key=key))
        return jnp.where(jnp.arange(4)[:, None] == 2, y * 1.1, y)

    y = jax.jit(lambda x: mc(some_wrong, x, outputs="probabilities"))(X)
    for field in (y.mean, y.std, y.entropy, y.expected_entropy, y.mutual_information):
        assert jnp.isnan(field[2]).all()
        assert jnp.isfinite(field[jnp.array([0, 1, 3])]).all()


@pytest.mark.parametrize("option", ["memory_budget", "chunk_size"])
def test_budgets_and_chunks_are_at_least_one(option):
    with pytest.raises(ValueError, match=f"{option} must be at least 1; got 0"):
        mc(predict, W, X, **{option: 0})
    with pytest.raises(TypeError, match=f"{option} must be an integer"):
        mc(predict, W, X, **{option: 0.5})


def test_predict_must_be_hashable():
    class Unhashable:
        __hash__ = None

        def __call__(self, x, *, key):
            return predict(x, key=key)

    with pytest.raises(TypeError, match="Wrap it"):
        mc(Unhashable(), X)


def deep(x, *, key):
    """Loop over layers with large temporaries in an inner jit, with a sort that cannot be fused."""

    @jax.jit
    def layer(x, key):
        return jnp.sort(regjax.dropout(jnp.tile(x, 32), 0.5, key=key))[:, -64:]

    def body(x, index):
        return layer(x, regjax.site_key(key, index, "layer")), None

    return jax.lax.scan(body, x, jnp.arange(3))[0]


def test_a_chunk_stays_within_the_budget():
    """Return the temporary memory of a compiled call, by XLA's analysis."""

    def needed(samples, memory_budget):
        run = jax.jit(functools.partial(mc, deep, samples=samples, memory_budget=memory_budget))
        compiled = run.lower(jnp.ones((64, 64)), key=KEY).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    budget = 2**22
    few, many, at_once = needed(64, budget), needed(512, budget), needed(64, 2**40)
    assert few <= budget < at_once
    assert many <= few + 8 * 512  # more passes need no more memory, except for their indices


@pytest.mark.parametrize(
    "kind", [AxisType.Explicit, pytest.param(AxisType.Auto, marks=pytest.mark.slow)], ids=str
)
def test_a_sharded_batch_stays_where_it_is(kind):
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        x = jax.device_put(X, NamedSharding(mesh, P("batch")))
        w = jax.device_put(W, NamedSharding(mesh, P()))
        y = mc(predict, w, x, chunk_size=3, keep_samples=True)
    assert_same(y, usual(), atol=1e-6)
    assert y.mean.sharding.is_equivalent_to(x.sharding, 2)


def test_every_draw_is_told():
    events = []
    with regjax.observing(events.append):
        mc(predict, W, X, chunk_size=3)
        jax.effects_barrier()
    drawn = [event for event in events if isinstance(event, Draw)]
    assert len({event.key for event in drawn}) == len(drawn) == 8


# A norm and a dropout of rate one half in each framework: what a pass keeps is twice what
# evaluation says. Each gives the passes, evaluation, and training mode, where the norm takes the
# batch's own averages.


def linen_model():
    from flax import linen as nn

    from regjax.linen import Dropout

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, use_running_average, deterministic):
            x = nn.BatchNorm(use_running_average)(x)
            return Dropout(0.5)(x, deterministic=deterministic)

    model = Model()
    variables = model.init(KEY, X, use_running_average=True, deterministic=True)

    def predict(variables, x, *, key):
        return model.apply(
            variables, x, use_running_average=True, deterministic=False, rngs={"dropout": key}
        )

    evaluated = model.apply(variables, X, use_running_average=True, deterministic=True)
    trained, _ = model.apply(
        variables, X, use_running_average=False, deterministic=True, mutable=["batch_stats"]
    )
    return (predict, variables), evaluated, trained


def linen_model_with_one_flag():
    """If `train` controls both, an interceptor excludes dropout from it."""
    from flax import linen as nn

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.BatchNorm(use_running_average=not train)(x)
            return nn.Dropout(0.5)(x, deterministic=not train)

    model = Model()
    variables = model.init(KEY, X, train=False)

    def dropping(call, args, options, context):
        if isinstance(context.module, nn.Dropout):
            options = options | {"deterministic": False}
        return call(*args, **options)

    def predict(variables, x, *, key):
        with nn.intercept_methods(dropping):
            return model.apply(variables, x, train=False, rngs={"dropout": key})

    evaluated = model.apply(variables, X, train=False)
    trained, _ = model.apply(
        variables, X, train=True, rngs={"dropout": KEY}, mutable=["batch_stats"]
    )
    return (predict, variables), evaluated, trained


def nnx_model():
    from flax import nnx

    from regjax.nnx import Dropout

    class Model(nnx.Module):
        def __init__(self):
            self.norm = nnx.BatchNorm(6, rngs=nnx.Rngs(0))
            self.dropout = Dropout(0.5)

        def __call__(self, x, rngs=None):
            return self.dropout(self.norm(x), rngs=rngs)

    model = Model()
    view = nnx.view(model, use_running_average=True, deterministic=False)
    graph, state = nnx.split(view)

    def predict(state, x, *, key):
        return nnx.merge(graph, state)(x, rngs=nnx.Rngs(dropout=key))

    evaluated = nnx.view(model, use_running_average=True, deterministic=True)(X)
    before = jax.tree.map(jnp.copy, nnx.state(model))
    mc(lambda x, *, key: view(x, rngs=nnx.Rngs(dropout=key)), X)  # or closing over the view
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), before)
    training = nnx.view(nnx.clone(model), use_running_average=False, deterministic=True)
    return (predict, state), evaluated, training(X)


def equinox_model():
    import equinox as eqx

    from regjax.equinox import Dropout

    class Model(eqx.Module):
        norm: eqx.nn.BatchNorm
        dropout: Dropout

        def __call__(self, x, state, key=None):
            x, state = self.norm(x, state)
            return self.dropout(x, key=key), state

    def make():
        return Model(eqx.nn.BatchNorm(6, "batch", mode="batch"), Dropout(0.5))

    model, state = eqx.nn.make_with_state(make)()

    def call(model, state, x, key=None):
        keys = None if key is None else jax.random.split(key, len(x))
        over = (0, None, None if key is None else 0)
        return jax.vmap(model, in_axes=over, out_axes=(0, None), axis_name="batch")(x, state, keys)

    def dropouts(model):
        nodes = jax.tree.leaves(model, is_leaf=lambda node: isinstance(node, Dropout))
        return [node.inference for node in nodes if isinstance(node, Dropout)]

    evaluating = eqx.nn.inference_mode(model)
    dropping = eqx.tree_at(dropouts, evaluating, replace_fn=lambda _: False)
    arrays, rest = eqx.partition((dropping, state), eqx.is_array)

    def predict(arrays, x, *, key):
        return call(*eqx.combine(arrays, rest), x, key)[0]

    training = eqx.tree_at(dropouts, model, replace_fn=lambda _: True)
    return (predict, arrays), call(evaluating, state, X)[0], call(training, state, X)[0]


def haiku_model():
    import haiku as hk

    from regjax.haiku import dropout

    def forward(x, is_training, rate):
        x = hk.BatchNorm(True, True, 0.9)(x, is_training)
        return dropout(hk.next_rng_key(), rate, x) if rate else x

    model = hk.transform_with_state(forward)
    params, state = model.init(KEY, 2 * X + 1, True, 0.0)

    def predict(params_and_state, x, *, key):
        return model.apply(*params_and_state, key, x, False, 0.5)[0]

    evaluated, trained = (model.apply(params, state, None, X, flag, 0.0)[0] for flag in (0, 1))
    return (predict, (params, state)), evaluated, trained


FRAMEWORKS = (linen_model, linen_model_with_one_flag, nnx_model, equinox_model, haiku_model)


@pytest.mark.parametrize("make", FRAMEWORKS)
@pytest.mark.sample(2)
def test_norms_stay_in_evaluation_in_every_framework(make):
    (predict, variables), evaluated, trained = make()
    y = mc(predict, variables, X, keep_samples=True)
    kept = np.asarray(y.samples) != 0
    assert 0.3 < kept.mean() < 0.7  # for 192 fair coins, outside with probability 3e-8
    twice = np.broadcast_to(2 * np.asarray(evaluated), kept.shape)
    np.testing.assert_allclose(np.asarray(y.samples)[kept], twice[kept], rtol=1e-6)
    # Test of the test: statistics of the batch would give another prediction.
    assert np.abs(trained - evaluated).max() > 0.1


@pytest.mark.parametrize("setting", [jax.debug_key_reuse, jax.check_tracer_leaks])
def test_under_the_checks_of_jax(setting):
    predict = lambda x, *, key: regjax.dropout(x, 0.5, key=key)
    options = {"key": jax.random.key(0), "outputs": "values", "samples": 3, "chunk_size": 1}
    with setting(True):
        y = regjax.mc_dropout(predict, jnp.ones(4), **options)
        z = jax.jit(lambda x: regjax.mc_dropout(predict, x, **options))(jnp.ones(4))
    np.testing.assert_array_equal(y.mean, z.mean)
