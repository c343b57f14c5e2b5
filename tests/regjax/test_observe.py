from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import regjax
import regjax.equinox
import regjax.haiku
import regjax.linen
import regjax.nnx
from regjax._random import events as _observe
from regjax._random.events import Draw
from regshared.events import SiteKey
from tests.regjax.family import FAMILY
from tests.regjax.family import X as X2

KEY = jax.random.key(0)
X = jnp.arange(1.0, 9.0)


def watch(run):
    """Return the draws of `run`, in program order."""
    events = []
    with regjax.observing(events.append):
        run()
        jax.effects_barrier()
    return sorted((e for e in events if isinstance(e, Draw)), key=lambda e: e.order), events


def drop(x, key=KEY, rate=0.5, **options):
    return regjax.dropout(x, rate, key=key, **options)


def scanned(x):
    return jax.lax.scan(lambda c, k: (drop(c, k), None), x, jax.random.split(KEY, 3))[0]


RUNS = {
    "eager": (drop, 1),
    "jit": (jax.jit(drop), 1),
    "grad": (lambda x: jax.grad(lambda y: drop(y).sum())(x), 1),
    "jit of grad": (jax.jit(lambda x: jax.grad(lambda y: drop(y).sum())(x)), 1),
    "vmap": (lambda x: jax.vmap(drop)(x[None].repeat(3, 0), jax.random.split(KEY, 3)), 3),
    "scan": (scanned, 3),
    "traced rate": (lambda x: jax.jit(lambda r: drop(x, rate=r))(0.5), 1),
    "packed": (functools.partial(drop, sampler=regjax.packed_bernoulli), 1),
    "feature": (lambda x: regjax.feature_dropout(x.reshape(2, 2, 2), 0.5, key=KEY), 1),
    "alpha": (lambda x: regjax.alpha_dropout(x, 0.5, key=KEY), 1),
    "traced flag, off": (lambda x: jax.jit(lambda d: drop(x, deterministic=d))(True), 0),
    "traced flag, on": (lambda x: jax.jit(lambda d: drop(x, deterministic=d))(False), 1),
    "evaluation": (functools.partial(drop, deterministic=True), 0),
    "rate 0": (functools.partial(drop, rate=0.0), 0),
}


@pytest.mark.parametrize(("run", "draws"), RUNS.values(), ids=RUNS)
@pytest.mark.sample(8)
def test_every_draw_is_told_once(run, draws):
    before = run(X)
    drawn, _ = watch(lambda: np.testing.assert_array_equal(run(X), before))
    assert len(drawn) == draws
    assert np.array_equal(run(X), before)


def test_the_recorded_mask_is_the_applied_one():
    y = drop(X, rate=0.25)
    ((event,), _) = watch(lambda: drop(X, rate=0.25))
    assert (event.key, event.rate) == ((0, 0), 0.25)
    np.testing.assert_array_equal(event.entering, X)
    np.testing.assert_array_equal(np.where(event.mask, X * np.float32(1 / 0.75), 0), y)


PORTS = {
    "haiku": lambda rate: regjax.haiku.dropout(KEY, 0.5, X),
    "haiku, traced": lambda rate: regjax.haiku.dropout(KEY, rate, X),
    "equinox, traced": lambda rate: regjax.equinox.Dropout(rate)(X, key=KEY),
}


@pytest.mark.parametrize("run", PORTS.values(), ids=PORTS)
def test_the_mask_of_a_port_is_the_applied_one(run):
    before, results = jax.jit(run)(0.5), []
    ((event,), _) = watch(lambda: results.append(jax.jit(run)(0.5)))
    np.testing.assert_array_equal(results[0], before)
    np.testing.assert_array_equal(results[0], np.where(event.mask, 2 * X, 0))


def test_a_shared_mask_is_told_as_it_is():
    ((event,), _) = watch(lambda: drop(X.reshape(2, 4), broadcast_dims=(0,)))
    assert event.mask.shape == (1, 4)


def test_keys_of_sites_are_told_with_what_they_were_derived_from():
    root = jax.random.key(7)
    _, events = watch(lambda: jax.jit(lambda s: regjax.site_key(root, s, "hidden"))(5))
    high, low = jax.random.key_data(regjax.site_key(root, 5, "hidden"))
    assert events == [SiteKey("hidden", (0, 7), 5, (int(high), int(low)))]


def test_a_function_jitted_before_is_seen_and_leaves_no_trace_after():
    inner = jax.jit(drop)
    outer = jax.jit(lambda x: inner(x) + 1)
    outer(X)
    events = []
    with regjax.observing(events.append):
        for _ in range(2):
            outer(X)
        jax.effects_barrier()
    assert len(events) == 2
    outer(X)
    jax.effects_barrier()
    assert len(events) == 2
    assert "callback" not in str(jax.make_jaxpr(outer)(X))


def test_nested_observers_both_receive_events():
    outer, inner = [], []
    with regjax.observing(outer.append):
        with regjax.observing(inner.append):
            drop(X)
            jax.effects_barrier()
        drop(X, rate=0.1)
        jax.effects_barrier()
    assert [event.rate for event in outer] == [0.5, 0.1]
    assert [event.rate for event in inner] == [0.5]


def test_after_an_error_nobody_watches():
    events = []
    with pytest.raises(ZeroDivisionError), regjax.observing(events.append):
        raise ZeroDivisionError
    drop(X)
    jax.effects_barrier()
    assert events == []


@pytest.mark.parametrize("flags", [[False], [True], [True, False]], ids=str)
def test_what_a_traced_flag_turns_off_is_not_told(flags):
    """Including vmap of the flag, which runs both branches."""

    def at(flag):
        return regjax.dropout(X, 0.5, key=KEY, deterministic=flag)

    events = []
    with regjax.observing(events.append):
        run = jax.vmap(at) if len(flags) > 1 else lambda flags: at(flags[0])
        jax.jit(run)(jnp.array(flags))
        jax.effects_barrier()
    assert len(events) == flags.count(False)


MASKS = np.random.default_rng(0)


def impure(key, keep_prob, shape, *, out_sharding=None):
    """An impure sampler, which draws another mask in each run."""
    draw = lambda _: MASKS.random(shape) < 0.5
    words = jax.random.key_data(key)
    return jax.pure_callback(draw, jax.ShapeDtypeStruct(shape, bool), words)


@pytest.mark.parametrize("jit", [jax.jit, lambda f: f], ids=["jit", "eager"])
@pytest.mark.parametrize("rate", [0.5, jnp.float32(0.5)], ids=["number", "traced"])
def test_of_an_impure_sampler_the_applied_mask_is_recorded(jit, rate, monkeypatch):
    """Value, gradient and record use the same mask."""
    monkeypatch.setitem(globals(), "MASKS", np.random.default_rng(0))
    loss = lambda x, rate: (lambda y: (y.sum(), y))(drop(x, rate=rate, sampler=impure))
    step = jax.grad(loss, has_aux=True)
    # A number is not an argument of the compiled function.
    run = jit(step) if isinstance(rate, jax.Array) else jit(lambda x, _: step(x, rate))
    results = []
    ((event,), _) = watch(lambda: results.append(run(X, rate)))
    ((gradient, y),) = results
    assert 0 < event.mask.sum() < X.size
    np.testing.assert_array_equal(gradient, np.where(event.mask, 2.0, 0.0))
    np.testing.assert_array_equal(y, np.where(event.mask, 2 * X, 0.0))


def runs_of(framework):
    """Return a call of each function or layer, as a function of a key, and its name."""
    for name, (settings, inputs, function) in FAMILY.items():
        if name.startswith("Gaussian"):  # no mask
            continue
        if framework == "regjax":
            run = lambda key, f=function, i=inputs, s=settings: f(*i, 0.5, key=key, **s)
        elif framework == "haiku":
            draw = getattr(regjax.haiku, function.__name__)
            run = lambda key, f=draw, i=inputs, s=settings: f(key, 0.5, *i, **s)
        elif framework == "equinox":  # one example, without a batch
            settings = {"block_size": 3} if name == "DropBlock" else {}
            layer = getattr(regjax.equinox, name)(0.5, **settings)
            inputs = (X2, *inputs[1:])
            run = lambda key, f=layer, i=inputs: f(*i, key=key)
        else:
            options = {"deterministic": False, **settings}
            layer = getattr(getattr(regjax, framework), name)(0.5, **options)
            if framework == "linen":
                run = lambda key, f=layer, i=inputs: f.apply({}, *i, rngs={"dropout": key})
            else:
                run = lambda key, f=layer, i=inputs: f(*i, rngs=nnx.Rngs(dropout=key))
        yield function.__name__, run


FRAMEWORKS = ["regjax", "linen", "nnx", "equinox", "haiku"]


class Names:
    """A replacement for observers during tracing, which is faster than a run."""

    def __init__(self):
        self.seen = set()

    def draw(self, function, *_):
        self.seen.add(function)

    def site_key(self, *_):
        pass


@pytest.mark.wrong_types
@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.sample(3)
def test_every_layer_is_recorded_under_the_name_of_its_function(framework):
    for name, run in runs_of(framework):
        names = Names()
        with _observe._observer(names):
            jax.eval_shape(run, KEY)
        assert names.seen == {name}


def drop_with(key):
    return jax.grad(lambda x: drop(x, key).sum())(X)


def attention(key, factor=1.0, **options):
    q, k, v = (jnp.sin(jnp.arange(x, x + 32.0)).reshape(1, 8, 2, 2) for x in range(3))
    options = {"dropout_rng": key, "dropout_rate": 0.5, **options}
    return regjax.dot_product_attention(q * factor, k, v, **options)


@pytest.mark.parametrize("block_size", [None, 3])
@pytest.mark.sample(1)
def test_attention_is_recorded_once_for_each_row_under_a_gradient(block_size):
    """Rows share a key and arrive in any order; the blocks of each row are assembled."""
    loss = lambda factor: attention(KEY, factor, block_size=block_size).sum()
    factors = jnp.arange(3.0)
    drawn, _ = watch(lambda: jax.jit(jax.vmap(jax.grad(loss)))(factors))
    alone = [watch(functools.partial(attention, KEY, factor))[0][0] for factor in factors]
    assert len(drawn) == 3
    drawn, alone = (sorted(each, key=lambda e: e.entering.max()) for each in (drawn, alone))
    for event, other in zip(drawn, alone, strict=True):
        np.testing.assert_array_equal(event.mask, other.mask)
        np.testing.assert_allclose(event.entering, other.entering, rtol=1e-6)


# One run of each implementation of masks; the other layers use these.
CHECKED = {framework: jax.jit(next(runs_of(framework))[1]) for framework in FRAMEWORKS}
CHECKED |= {
    "eager": drop_with,
    "attention": jax.jit(attention),
    "blockwise": jax.jit(functools.partial(attention, block_size=4)),
}
SETTINGS = {"key reuse": jax.debug_key_reuse, "tracer leaks": jax.check_tracer_leaks}


# The leak checker runs for every function that a layer calls, and these call the same ones.
LAYERS = {"linen", "nnx", "equinox", "haiku"}
UNDER_CHECKS = [
    pytest.param(
        run, setting, marks=[pytest.mark.slow] * (run in LAYERS and setting == "tracer leaks")
    )
    for setting in SETTINGS
    for run in CHECKED
]


@pytest.mark.parametrize(("name", "setting"), UNDER_CHECKS)
@pytest.mark.sample(2)
def test_observers_and_guards_under_the_checks_of_jax(name, setting):
    """Observation uses each key once, and leaks no tracer."""
    run = CHECKED[name]
    root, reports = jax.random.key(0), []
    step = lambda number: run(regjax.site_key(root, number, "site"))
    with SETTINGS[setting](True):
        drawn, _ = watch(lambda: reports.append(regjax.check_dropout(step)))
    assert len(drawn) == 2
    assert not reports[0].findings


def test_observed_attention_in_blocks_takes_hardly_more_memory():
    """XLA's analysis of memory: the whole matrix would take 8 MiB, and its mask 2 MiB."""
    x = jnp.ones((1, 1024, 2, 4))
    options = {"dropout_rate": 0.1, "dropout_rng": KEY, "block_size": 64}
    attend = lambda x: regjax.dot_product_attention(x, x, x, **options)

    def measured() -> int:
        analysis = jax.jit(attend).lower(x).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    alone = measured()
    with regjax.observing(lambda event: None):
        observed = measured()
    assert alone < 2**21
    assert observed < 1.25 * alone


def test_a_rate_that_is_a_product_rounds_alike_while_it_is_observed():
    steps = jnp.arange(1.0, 200.0)

    def run(x, steps):
        return jax.lax.map(lambda step: drop(x, rate=step * 0.0037), steps)

    plain = jax.jit(run)(X, steps)
    with regjax.observing(lambda event: None):
        observed = jax.jit(run)(X, steps)
        jax.effects_barrier()
    np.testing.assert_array_equal(plain, observed)


def test_a_shard_map_without_jit_is_observed():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    rows = jax.device_put(jnp.arange(16), NamedSharding(mesh, P("data")))
    x = jax.device_put(jnp.ones((16, 4)), NamedSharding(mesh, P("data")))

    def layer(x, rows, root):
        key = regjax.site_key(root, 0, "hidden")
        return regjax.dropout(x, 0.5, key=key, sampler=regjax.by_example(rows))

    mapped = jax.shard_map(
        layer, mesh=mesh, in_specs=(P("data"), P("data"), P()), out_specs=P("data")
    )
    draws, _ = watch(lambda: mapped(x, rows, KEY))
    assert sum(draw.mask.size for draw in draws) == x.size
