"""Planted bugs in small training steps, each with the expected report, and correct steps.

The file is long because each planted bug needs a training step of its own.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import regjax
import regjax.linen
import regjax.nnx
from regjax import DropoutProblem as Problem
from regjax._guards import ADVICE
from regshared.report import MaskSummary, Site, make_report
from tests import shared
from tests.shared import found

ROOT = jax.random.key(3)
X = jnp.linspace(-1.0, 1.0, 8 * 16).reshape(8, 16)
W = jnp.linspace(1.0, -1.0, 16 * 16).reshape(16, 16)


line = functools.partial(shared.line, __file__)


def model(w, x, keys, rate=0.5, **options):
    h = regjax.dropout(jnp.tanh(x @ w), rate, key=keys[0], **options)  # first
    return regjax.dropout(h, 0.25, key=keys[1], **options)  # second


def trainer(keys_of, **options):
    """Return a jitted step of gradient descent, which carries weights and key."""

    @jax.jit
    def train_step(w, key, step):
        keys, key = keys_of(key, step)
        gradient = jax.grad(lambda w: (model(w, X, keys, **options) ** 2).mean())(w)
        return w - 0.1 * gradient, key

    return train_step


def check(train_step, **options):
    return regjax.check_dropout(train_step, W, ROOT, **options)


def named(key, step, first="first", second="second"):
    return [regjax.site_key(ROOT, step, name) for name in (first, second)], key


def split(key, step):
    first, second, key = jax.random.split(key, 3)
    return (first, second), key


def numbered(key, step):
    return (jax.random.fold_in(ROOT, step), jax.random.fold_in(ROOT, step + 1)), key


def forgotten(key, step):
    return (regjax.site_key(ROOT, 0, "first"), regjax.site_key(ROOT, step, "second")), key


def one_key(key, step):
    return (jax.random.fold_in(key, step),) * 2, key


FIRST, SECOND = line("first"), line("second")
NAMED_FIRST, NAMED_SECOND = f"first ({FIRST})", f"second ({SECOND})"
BOTH_AGAIN = [(Problem.SAME_MASK, (FIRST,)), (Problem.SAME_MASK, (SECOND,))]
SHARED = [(Problem.SHARED_KEY, (FIRST, SECOND))]
NEVER = [(Problem.NEVER_ACTIVE, ())]

# The source of the keys, the options of the model and the check, and the expected findings.
PLANTED = {
    "a constant key": (lambda key, step: (jax.random.split(ROOT), key), {}, {}, BOTH_AGAIN),
    "a key not carried on": (lambda key, step: (jax.random.split(key), key), {}, {}, BOTH_AGAIN),
    "a step forgotten": (forgotten, {}, {}, [(Problem.SAME_MASK, (NAMED_FIRST,))]),
    "one key, two sites": (one_key, {}, {}, SHARED),
    "numbers added": (numbered, {}, {}, SHARED),
    "one name, two sites": (
        functools.partial(named, second="first"),
        {},
        {},
        [(Problem.SHARED_KEY, (NAMED_FIRST, f"first ({SECOND})"))],
    ),
    "deterministic in training": (named, {"deterministic": True}, {}, NEVER),
    "a traced flag": (named, {"deterministic": jnp.array(True)}, {}, NEVER),
    "rate 0": (named, {"rate": 0.0}, {"expect": ["first"]}, [(Problem.NEVER_ACTIVE, ("first",))]),
    "another rate": (
        named,
        {"rate": 0.1},
        {"expect": {"first": 0.5, "s*": 0.25}},
        [(Problem.OTHER_RATE, (NAMED_FIRST,))],
    ),
    "active in evaluation": (
        named,
        {},
        {"evaluate": lambda w, key: model(w, X, (key, key), deterministic=False)},
        [(Problem.ACTIVE_IN_EVALUATION, (site,)) for site in (FIRST, SECOND)],
    ),
}


@pytest.mark.parametrize(("keys_of", "options", "how", "expected"), PLANTED.values(), ids=PLANTED)
@pytest.mark.sample(3)
def test_a_planted_bug_is_named_with_its_site(keys_of, options, how, expected):
    report = check(trainer(keys_of, **options), **how)
    assert found(report) == expected
    for problem, sites in expected:
        assert problem.value in str(report)
        assert all(site in str(report) for site in sites)
    with pytest.raises(RuntimeError, match=expected[0][0].value):
        report.raise_if_wrong()


def dropped(x, key, rate=0.5, **options):
    return regjax.dropout(x, rate, key=key, **options)  # dropped


def layers(step_key, *, same, block=lambda x: x, w=W):
    """Scan over three layers."""

    def body(h, key):
        return dropped(jnp.tanh(h @ w), step_key if same else key), None

    def loss(x):
        return jax.lax.scan(block(body), x, jax.random.split(step_key, 3))[0].sum()

    return jax.jit(jax.grad(loss))(X)


def rows(step_key, *, same):
    keys = jax.random.split(step_key, len(X))
    if same:
        return jax.jit(jax.vmap(dropped, (0, None)))(X, step_key)
    return jax.jit(jax.vmap(dropped))(X, keys)


def devices(step_key, *, same):
    def local(x, key):
        return dropped(x, key if same else jax.random.fold_in(key, jax.lax.axis_index("rows")))

    mesh = jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Auto,))
    rows = PartitionSpec("rows")
    mapped = jax.shard_map(local, mesh=mesh, in_specs=(rows, PartitionSpec()), out_specs=rows)
    return jax.jit(mapped)(X, step_key)


def parallel(step_key, *, same):
    keys = jax.random.split(step_key, 8)
    if same:
        return jax.pmap(dropped, in_axes=(0, None))(X[:, None], step_key)
    return jax.pmap(dropped)(X[:, None], keys)


def twice(step_key, *, same):
    """Run two forward passes of one jitted function, as in R-Drop."""
    forward = jax.jit(dropped)
    keys = [step_key] * 2 if same else jax.random.split(step_key)
    return forward(X, keys[0]), forward(X + 1, keys[1])


def unrolled(step_key, *, same):
    """Loop over layers in Python, without jit."""
    h = X
    for layer in range(3):
        h = dropped(jnp.tanh(h @ W), step_key if same else jax.random.fold_in(step_key, layer))
    return h


def micro_batches(step_key, *, same):
    def body(total, batch):
        number, x = batch
        key = step_key if same else jax.random.fold_in(step_key, number)
        return total + jax.grad(lambda w: dropped(x @ w, key).sum())(W), None

    batches = jnp.arange(4), X.reshape(4, 2, 16)
    return jax.jit(lambda: jax.lax.scan(body, jnp.zeros_like(W), batches)[0])()


REPEATED = {
    "scan over layers": layers,
    "scan over layers, checkpointed": functools.partial(layers, block=jax.checkpoint),
    "vmap over rows": rows,
    "shard_map over devices": devices,
    "pmap over devices": parallel,
    "two calls of one jitted function": twice,
    "layers in Python": unrolled,
    "micro-batches": micro_batches,
}


@pytest.mark.parametrize("same", [True, False], ids=["planted", "sound"])
@pytest.mark.parametrize("run", REPEATED.values(), ids=REPEATED)
@pytest.mark.sample(2)
def test_one_key_for_everything_in_a_step(run, same):
    report = regjax.check_dropout(lambda step: run(regjax.site_key(ROOT, step, "it"), same=same))
    site = f"it ({line('dropped')})" if same else line("dropped")
    assert found(report) == ([(Problem.REPEATED_MASK, (site,))] if same else [])
    (row,) = report.rows
    assert row.draws[0] == row.draws[1] > 1


class Regressor(nnx.Module):
    def __init__(self):
        self.dropout = regjax.nnx.Dropout(0.5, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.dropout(x)  # nnx


def stateful():
    regressor = Regressor()
    step = nnx.jit(lambda module, x: module(x))
    return lambda _: step(regressor, X)


def stateless():
    graph, state = nnx.split(Regressor())
    step = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
    return lambda _: step(state, X)


class Block(linen.Module):
    @linen.compact
    def __call__(self, x):
        return regjax.linen.Dropout(0.5, deterministic=False)(x)  # linen


class Stack(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = Block()(x)
        return Block()(x)


def rngs_of(key_of):
    loss = lambda x, key: (Stack().apply({}, x, rngs={"dropout": key}) ** 2).sum()
    step = jax.jit(jax.grad(loss))
    return lambda number: step(X, key_of(number))


BLOCKS = [f"Stack/Block_{number}/Dropout_0 ({line('linen')})" for number in range(2)]
FRAMEWORKS = {
    "nnx": (stateful, []),
    "nnx, the state lost": (stateless, [(Problem.SAME_MASK, (line("nnx"),))]),
    "linen": (lambda: rngs_of(lambda step: jax.random.fold_in(ROOT, step)), []),
    "linen, a constant key": (
        lambda: rngs_of(lambda step: ROOT),
        [(Problem.SAME_MASK, (block,)) for block in BLOCKS],
    ),
}


@pytest.mark.parametrize(("make", "expected"), FRAMEWORKS.values(), ids=FRAMEWORKS)
def test_in_flax_sites_are_modules(make, expected):
    assert found(regjax.check_dropout(make())) == expected


def sharded(kind):
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(kind,))
    x = jax.device_put(X, NamedSharding(mesh, PartitionSpec("rows")))

    @jax.jit
    def train_step(x, step):
        key = regjax.site_key(ROOT, step, "it")
        return x - jax.grad(lambda x: (dropped(x, key) ** 2).sum())(x)

    def run(step):
        with jax.set_mesh(mesh):
            return train_step(x, step)

    return run


def scheduled(step):
    return jax.jit(dropped)(X, jax.random.fold_in(ROOT, step), jnp.float32(0.1) * step)


@jax.jit
def epoch(step):
    """Run several steps in one call."""

    def body(x, number):
        return dropped(x + 1, regjax.site_key(ROOT, number, "it")), None

    return jax.lax.scan(body, X, 3 * step + jnp.arange(3))[0]


@jax.jit
def evaluated_again(step):
    """Compute the loss again for logging, with the key of the gradient."""
    key = regjax.site_key(ROOT, step, "it")
    loss = jax.checkpoint(lambda x: (dropped(jnp.sin(x), key) ** 2).sum())
    return jax.hessian(loss)(X[0]), loss(X[0])


def family(step):
    """Masks that do not have a draw per element: a single word, and blocks as large as maps."""
    keys = [regjax.site_key(ROOT, step, name) for name in ("words", "blocks", "weights")]
    embedded = jnp.ones((8, 128, 4))
    y = regjax.embedding_dropout(embedded, jnp.zeros((8, 128), int), 0.5, key=keys[0])
    maps = regjax.drop_block(jnp.ones((1, 7, 7, 2)), 0.1, block_size=7, key=keys[1])
    layer = {"a": {"kernel": W}, "b": {"kernel": W}}
    return y, maps, regjax.drop_connect(layer, 0.5, key=keys[2])


SOUND = {
    "keys split and carried on": lambda: check(trainer(split)),
    "keys of sites": lambda: check(trainer(named), expect={"first": 0.5, "second": 0.25}),
    "evaluation": lambda: check(
        trainer(named), evaluate=lambda w, key: model(w, X, (key, key), deterministic=True)
    ),
    "evaluation at a traced rate of 0": lambda: check(
        trainer(named), evaluate=lambda w, key: jax.jit(dropped)(X, key, 0.0)
    ),
    "sharded, auto": lambda: regjax.check_dropout(sharded(AxisType.Auto)),
    "sharded, explicit": lambda: regjax.check_dropout(sharded(AxisType.Explicit)),
    "a rate that starts at 0": lambda: regjax.check_dropout(scheduled),
    "a rate that was rounded": lambda: regjax.check_dropout(
        lambda step: jax.jit(dropped)(X, jax.random.fold_in(ROOT, step), 0.1),
        expect={"test_guards.py:*": 0.1},
    ),
    "several steps in one": lambda: regjax.check_dropout(epoch),
    "a loss computed again": lambda: regjax.check_dropout(evaluated_again),
    "the rest of the family": lambda: regjax.check_dropout(family),
    "NaN under a checkpoint": lambda: regjax.check_dropout(
        lambda step: layers(
            regjax.site_key(ROOT, step, "it"),
            same=False,
            block=jax.checkpoint,
            w=W.at[0].set(jnp.nan),
        )
    ),
    "a few elements": lambda: regjax.check_dropout(
        lambda step: [dropped(X[0, :1], jax.random.fold_in(ROOT, 99 * step + i)) for i in range(9)]
    ),
}


@pytest.mark.parametrize("run", SOUND.values(), ids=SOUND)
@pytest.mark.sample(4)
def test_a_sound_step_gives_an_empty_report(run):
    """64-bit keys do not collide; equal masks are reported if their probability is below 1e-9."""
    report = run()
    assert report.rows
    assert found(report) == []
    assert str(report).endswith("nothing is wrong")
    report.raise_if_wrong()


def constant(key, keep_prob, shape, *, out_sharding=None):
    return jnp.asarray(np.random.default_rng(0).random(shape) < 0.5)


def everything(key, keep_prob, shape, *, out_sharding=None):
    return jnp.ones(shape, bool)


ODD = {
    "a constant mask": ({"sampler": constant}, Problem.IGNORED_KEY),
    "a mask that keeps all": ({"sampler": everything}, Problem.ALL_OR_NOTHING),
    "a rate that is NaN": ({"rate": jnp.float32(jnp.nan)}, Problem.INVALID_RATE),
    "a rate above 1": ({"rate": jnp.float32(1.5)}, Problem.INVALID_RATE),
}


@pytest.mark.parametrize(("options", "problem"), ODD.values(), ids=ODD)
def test_a_mask_that_nobody_draws_is_named(options, problem):
    sampler = options.get("sampler", regjax.bernoulli)

    @jax.jit
    def train_step(step, rate):
        return dropped(X, jax.random.fold_in(ROOT, step), rate, sampler=sampler)

    report = regjax.check_dropout(lambda step: train_step(step, options.get("rate", 0.5)))
    assert found(report) == [(problem, (line("dropped"),))]


@pytest.mark.parametrize("size", [20, 40])
def test_masks_that_agree_are_judged_by_their_chance(size):
    """Equal masks of 20 fair bits (p = 2**-20) are not reported; equal masks of 40 bits are."""
    drawn = MaskSummary(
        order=0,
        site=Site("", "model.py:1"),
        key=(0, 1),
        origin="",
        function="dropout",
        rate=0.5,
        shape=(size,),
        size=size,
        kept=5,
        sample=bytes(size),
        values=(),
        digits=0.0,
    )
    other = dataclasses.replace(drawn, key=(0, 2))
    findings = make_report([[drawn], [other]], [], [], ADVICE, (), ()).findings
    expected = [] if size == 20 else [(Problem.IGNORED_KEY, 2.0**-40)]
    assert [(finding.problem, finding.chance) for finding in findings] == expected


def test_what_is_made_again_may_be_rounded_otherwise():
    """In bfloat16 recomputation differs by some percent; a larger difference is reported."""
    x = X.astype(jnp.bfloat16)

    def train_step(step):
        key = jax.random.fold_in(ROOT, step)
        return [dropped(x * jnp.bfloat16(scale), key) for scale in (1.0, 1.01, 2.0)]

    (finding,) = regjax.check_dropout(train_step).findings
    assert finding.problem is Problem.REPEATED_MASK
    assert "drew 2 times" in finding.detail


def test_sites_have_names_and_functions():
    """The key of a leaf of `drop_connect` derives from that of a site, and has both names."""
    rows = regjax.check_dropout(family).rows
    assert [(row.site, *row.functions) for row in rows] == [
        ("words", "embedding_dropout"),
        ("blocks", "drop_block"),
        ("weights/a/kernel", "drop_connect"),
        ("weights/b/kernel", "drop_connect"),
    ]


def test_a_step_may_donate_what_it_is_given():
    step = jax.jit(lambda w, step: dropped(w, regjax.site_key(ROOT, step, "it")), donate_argnums=0)
    report = regjax.check_dropout(step, X + 0, evaluate=lambda w: w.block_until_ready())
    assert found(report) == []


def test_a_step_is_compiled_once_for_the_guard_and_not_again_after_it():
    traces = []

    @jax.jit
    def train_step(step):
        traces.append(step)
        return dropped(X, jax.random.fold_in(ROOT, step))

    before = train_step(0)
    assert len(traces) == 1
    assert found(regjax.check_dropout(train_step)) == []
    assert len(traces) == 2
    np.testing.assert_array_equal(train_step(0), before)
    assert len(traces) == 2
    assert "callback" not in str(jax.make_jaxpr(train_step)(0))


def test_sites_may_be_allowed_what_they_do():
    report = functools.partial(check, trainer(one_key))
    assert found(report(allow=[FIRST])) == SHARED
    assert found(report(allow=["test_guards.py:*"])) == []


def test_keys_that_were_derived_and_not_used_are_told():
    (finding,) = check(trainer(named, deterministic=True)).findings
    assert finding.detail == (
        "no mask was drawn in 2 steps; keys were derived for first, second, and not used"
    )


@pytest.mark.parametrize("transform", [jax.jit, lambda f: lambda: jax.lax.cond(True, f, f)])
def test_a_check_inside_a_traced_function_is_refused(transform):
    """The draws would happen when the compiled function runs, after the report."""

    def inside():
        regjax.check_dropout(lambda step: dropped(X, jax.random.fold_in(ROOT, step)))
        return X

    with pytest.raises(RuntimeError, match=r"outside of jax.jit.* regjax.check_dropout\(jax.jit"):
        transform(inside)()


def test_a_check_inside_an_eager_transform_sees_what_is_drawn():
    checked = lambda x: regjax.check_dropout(lambda step: dropped(x, key_of(step))) and x.sum()
    key_of = functools.partial(jax.random.fold_in, ROOT)
    np.testing.assert_array_equal(jax.grad(checked)(X), jnp.ones_like(X))
    assert len(regjax.check_dropout(lambda step: dropped(X, key_of(step))).rows) == 1
