"""Every public function and layer under every setting of JAX that a user may enable.

A case returns the output and the gradient. Under each setting it must trace to the same program as
under JAX's defaults, which implies equal bits without compilation; if the programs differ, their
results must have equal bits. Programs also run under settings that act at run time.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import regjax
import regjax.equinox
import regjax.haiku
import regjax.linen
import regjax.nnx
from tests.regjax.family import FAMILY, IDS

Case = Callable[[jax.Array], Any]

X = jnp.linspace(-2.0, 3.0, 4 * 8, dtype=jnp.float32).reshape(4, 8)
IMAGES = jnp.linspace(0.5, 1.5, 2 * 5 * 5 * 2, dtype=jnp.float32).reshape(2, 5, 5, 2)
HEADS = jnp.linspace(-1.0, 1.0, 2 * 4 * 2 * 4, dtype=jnp.float32).reshape(2, 4, 2, 4)
PARAMS = {"w": X, "b": X[0]}
INPUTS = {"DropConnect": (PARAMS,), "EmbeddingDropout": (X, IDS[:4])}
INPUTS |= dict.fromkeys(("FeatureDropout", "FeatureAlphaDropout", "DropBlock"), (IMAGES,))


def through(f: Callable[..., Any], x: Any) -> tuple[Any, Any]:
    """Return a function that computes the output of `f` and its gradient."""
    y, pull_back = jax.vjp(f, x)
    return y, pull_back(jax.tree.map(jnp.ones_like, y))


def of_functions() -> dict[str, Case]:
    """Yield the public functions of the family, alone and under jit."""

    def case(function: Any, inputs: Any, settings: Any, key: jax.Array) -> Any:
        x, *others = inputs
        return through(lambda x: function(x, *others, 0.3, key=key, **settings), x)

    cases: dict[str, Case] = {}
    for name, (settings, _, function) in FAMILY.items():
        cases[function.__name__] = partial(case, function, INPUTS.get(name, (X,)), settings)
    packed = partial(regjax.dropout, sampler=regjax.packed_bernoulli)
    wide = jnp.ones((128, 32), jnp.float32)
    cases["packed_bernoulli"] = partial(case, packed, (wide,), {})
    for backend in (None, "blockwise"):
        attend = partial(_attention, backend)
        cases[f"attention {backend or 'whole'}"] = attend
    return cases


def _attention(backend: str | None, key: jax.Array) -> Any:
    options = {} if backend is None else {"block_size": 2}
    attend = partial(
        regjax.dot_product_attention,
        dropout_rate=0.3,
        dropout_rng=key,
        deterministic=False,
        **options,
    )
    return through(lambda x: attend(x, x, x), HEADS)


def of_layers() -> dict[str, Case]:
    """Yield every layer of the four frameworks."""

    def linen(name: str, key: jax.Array) -> Any:
        settings, inputs = FAMILY[name][0], INPUTS.get(name, (X,))
        layer = getattr(regjax.linen, name)(0.3, deterministic=False, **settings)
        call = lambda x: layer.apply({}, x, *inputs[1:], rngs={"dropout": key})
        return through(call, inputs[0])

    def of_nnx(name: str, key: jax.Array) -> Any:
        settings, inputs = FAMILY[name][0], INPUTS.get(name, (X,))
        layer = getattr(regjax.nnx, name)(0.3, rngs=nnx.Rngs(key), **settings)
        return layer(*inputs)

    def equinox(name: str, key: jax.Array) -> Any:
        inputs = INPUTS.get(name, (X,))
        options = {"block_size": 3} if name == "DropBlock" else {}
        layer = getattr(regjax.equinox, name)(0.3, **options)
        return through(lambda x: layer(x, *inputs[1:], key=key), inputs[0])

    def haiku(name: str, key: jax.Array) -> Any:
        options = {"feature_dropout": (1,), "feature_alpha_dropout": (1,), "drop_block": (3, 1)}
        options |= {"drop_path": ("batch",), "variational_dropout": (0,), "drop_connect": ("**",)}
        inputs = {f.__name__: INPUTS.get(n, (X,)) for n, (_, _, f) in FAMILY.items()}[name]
        function = getattr(regjax.haiku, name)
        tree = {"linear": inputs[0]} if name == "drop_connect" else inputs[0]
        call = lambda x: function(key, 0.3, x, *inputs[1:], *options.get(name, ()))
        return through(call, tree)

    cases = {}
    for name, (_, _, function) in FAMILY.items():
        for layer in (linen, of_nnx, equinox):
            cases[f"{layer.__name__.removeprefix('of_')} {name}"] = partial(layer, name)
        cases[f"haiku {function.__name__}"] = partial(haiku, function.__name__)
    return cases


def site_key(key: jax.Array) -> Any:
    key = regjax.site_key(key, 3, "hidden")
    return jax.random.key_data(key), regjax.bernoulli(key, 0.5, (5, 7))


def penalties(key: jax.Array) -> Any:
    del key
    far = jax.tree.map(jnp.zeros_like, PARAMS)
    losses = (
        lambda p: regjax.l1_penalty(p, 0.1),
        lambda p: regjax.l2_penalty(p, 0.1, mask=regjax.decay_mask),
        lambda p: regjax.elastic_net_penalty(p, 0.1, 0.2),
        lambda p: regjax.l2_sp_penalty(p, far, 0.1),
    )
    return [jax.value_and_grad(loss)(PARAMS) for loss in losses]


def schedules(key: jax.Array) -> Any:
    del key
    schedules = regjax.linear_rate(0.1, 0.5, 10), regjax.cosine_rate(0.1, 0.5, 10)
    return [schedule(step) for schedule in schedules for step in jnp.arange(3, dtype=jnp.int32)]


def step_of(name: str, key: jax.Array) -> Any:
    """Return a function that takes two steps of an optimizer."""
    del key
    decay = {} if name == "rprop" else {"weight_decay": 0.1}
    optimizer = getattr(regjax.optim, name)(0.01, **decay)
    params = {"w": X} if name == "muon" else PARAMS
    state = optimizer.init(params)
    for _ in range(2):
        updates, state = optimizer.update(params, state, params)
        params = optax.apply_updates(params, updates)
    return params


def mc_dropout(key: jax.Array) -> Any:
    predict = lambda x, *, key: regjax.dropout(x, 0.5, key=key)
    prediction = regjax.mc_dropout(predict, X, key=key, outputs="logits", samples=4)
    return prediction.mean, prediction.std


def check_dropout(key: jax.Array) -> Any:
    @jax.jit
    def train_step(x: jax.Array, key: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        return regjax.dropout(x, 0.5, key=regjax.site_key(key, step, "hidden")), key

    return jnp.int32(len(regjax.check_dropout(train_step, X, key).findings))


def observing(key: jax.Array) -> Any:
    drawn: list[Any] = []
    with regjax.observing(drawn.append):
        y = jax.jit(lambda x, key: regjax.dropout(x, 0.5, key=key))(X, key)
        jax.block_until_ready(y)
    return y


# The public names of `regjax.optim` that are neither a decay nor a scale by leaf.
OPTIMIZERS = [
    name
    for name in regjax.optim.__all__
    if name.islower() and not name.startswith(("add_", "layerwise_", "scale_"))
]
GROUPS: dict[str, dict[str, Case]] = {
    "functions": of_functions() | {"site_key": site_key},
    "layers": of_layers(),
    "decay": {name: partial(step_of, name) for name in OPTIMIZERS}
    | {"penalties": penalties, "schedules": schedules},
}
# Sums, and operations that XLA contracts if it compiles them together.
ROUNDED = ("attention whole", "attention blockwise", "adafactor", "adam", "adamw", "nadam")


@dataclass(frozen=True)
class Setting:
    """A setting of JAX.

    Attributes:
        enter: Returns the context in which it is active.
        sees: Runs code that the setting affects, and returns whether it did; or raises.
        error: The exception of a setting that raises, and a part of its message.
        at_run_time: Whether it affects the run of a program in addition to its tracing.
    """

    enter: Callable[[], AbstractContextManager]
    sees: Callable[[], Any]
    error: tuple[type[Exception], str] | None = None
    at_run_time: bool = False


def _used_twice() -> None:
    jax.jit(lambda key: regjax.dropout(X, 0.5, key=key) + regjax.dropout(X, 0.3, key=key))(KEY)


def _leaks() -> None:
    leaked = []
    jax.jit(lambda x: (leaked.append(regjax.dropout(x, 0.5, key=KEY)), x)[1])(X)


KEY = jax.random.key(3)
BITS = np.asarray(jax.random.bits(KEY, (8,)))
LOGARITHM = jax.jit(jnp.log).lower(X).compile()
SETTINGS = {
    "x64": Setting(
        lambda: jax.enable_x64(True), lambda: jnp.arange(2.0).dtype == np.dtype("float64")
    ),
    # These are the defaults of JAX; the tests run under strict promotion.
    "standard promotion": Setting(
        lambda: jax.numpy_dtype_promotion("standard"), lambda: (X + jnp.int32(1)).dtype == X.dtype
    ),
    "rank promotion": Setting(
        lambda: jax.numpy_rank_promotion("allow"), lambda: (X + X[0]).shape == X.shape
    ),
    "debug_nans": Setting(
        lambda: jax.debug_nans(True),
        lambda: LOGARITHM(X),
        (Exception, "nan"),  # a private method of compiled programs
        at_run_time=True,
    ),
    "tracer leaks": Setting(
        lambda: jax.check_tracer_leaks(True), _leaks, (Exception, "Leaked trace")
    ),
    "key reuse": Setting(
        lambda: jax.debug_key_reuse(True), _used_twice, (jax.errors.KeyReuseError, "consumed")
    ),
    "partitionable off": Setting(
        lambda: jax.threefry_partitionable(False),
        lambda: bool((jax.random.bits(KEY, (8,)) != BITS).any()),
    ),
    "rbg keys": Setting(
        lambda: jax.default_prng_impl("rbg"),
        lambda: str(jax.random.key_impl(jax.random.key(0))) == "rbg",
    ),
    "transfer guard": Setting(
        lambda: jax.transfer_guard("disallow"),
        lambda: jnp.sin(np.ones(3)),
        (jax.errors.JaxRuntimeError, "Disallowed host-to-device transfer"),
        at_run_time=True,
    ),
}


def lowered(group: str, given: jax.Array) -> jax.stages.Lowered:
    """Return all cases of a group as one program, in which each case is jitted."""
    cases = GROUPS[group]
    run = lambda keys: {name: case(keys[i]) for i, (name, case) in enumerate(cases.items())}
    return jax.jit(run).lower(given)


def keys(impl: str | None = None) -> jax.Array:
    """Return a key for each case."""
    return jax.random.split(jax.random.key(3, impl=impl), 64)


def text(program: jax.stages.Lowered) -> str:
    """Return the text of a program, whose functions are renumbered in order."""
    text = program.as_text()
    names = dict.fromkeys(re.findall(r"func\.func \w+ (@\w+)", text))
    numbers = {name: f"@{number}" for number, name in enumerate(names)}
    return re.sub(r"@\w+", lambda name: numbers.get(name[0], name[0]), text)


@functools.cache
def program(group: str, impl: str | None) -> jax.stages.Lowered:
    """Return the program under JAX's defaults."""
    return lowered(group, keys(impl))


@functools.cache
def compiled(group: str) -> jax.stages.Compiled:
    """Return the same program, compiled."""
    return program(group, None).compile()


def run(compiled: jax.stages.Compiled, given: jax.Array) -> dict[str, Any]:
    return jax.block_until_ready(compiled(given))


@functools.cache
def expected(group: str) -> dict[str, Any]:
    """Return the results under JAX's defaults."""
    return run(compiled(group), keys())


def assert_same(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compare the bits of the cases; those that sum or divide in another order must be close."""
    for name, values in actual.items():
        tolerance = 1e-6 if name in ROUNDED else 0
        for a, b in zip(*map(jax.tree.leaves, (values, expected[name])), strict=True):
            assert (a.dtype, a.shape) == (b.dtype, b.shape), name
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=name)


# A second compilation of the layers would take as long as all other tests of this file.
COMPILED_TWICE = {("layers", "x64"), ("layers", "partitionable off"), ("layers", "rbg keys")}
# Decay draws no random numbers, and the layers are traced but not run.
WITHOUT_EFFECT = {"decay": ("key reuse", "partitionable off", "rbg keys")}
WITHOUT_EFFECT |= {"layers": ("debug_nans", "transfer guard")}
MATRIX = [
    pytest.param(group, name, marks=[pytest.mark.slow] * ((group, name) in COMPILED_TWICE))
    for group in GROUPS
    for name in SETTINGS
    if name not in WITHOUT_EFFECT.get(group, ())
]


@pytest.mark.parametrize(("group", "name"), MATRIX)
@pytest.mark.sample(2)
def test_no_setting_changes_results(group, name):
    setting, impl = SETTINGS[name], "rbg" if name == "rbg keys" else None
    reference, given = program(group, impl), keys()
    execute = setting.at_run_time and compiled(group)
    with setting.enter():
        actual = lowered(group, keys() if impl else given)
        if execute:
            run(execute, given)
        if text(actual) == text(reference):
            return
        results = run(actual.compile(), given)
    assert_same(results, expected(group))


QUICK = ("dropout", "gaussian_dropout")


@pytest.mark.parametrize(
    ("group", "names"),
    [("functions", QUICK), *(pytest.param(group, (), marks=pytest.mark.slow) for group in GROUPS)],
)
def test_without_jit_the_results_are_the_same(group, names):
    cases, given = GROUPS[group], dict(zip(GROUPS[group], keys(), strict=False))
    reference = expected(group)
    with jax.disable_jit(True):
        actual = {name: cases[name](given[name]) for name in names or cases}
    assert_same(actual, reference)


# These compile a function of the caller as they run; `check_dropout` passes the number of the step
# as a Python integer, which the transfer guard rejects.
QUICK_ALONE = list(itertools.product((check_dropout, observing), ("tracer leaks", "key reuse")))
QUICK_ALONE.append((mc_dropout, "key reuse"))
ALONE = [
    pytest.param(case, name, marks=[pytest.mark.slow] * ((case, name) not in QUICK_ALONE))
    for case in (mc_dropout, check_dropout, observing)
    for name in SETTINGS
    if (case, name) != (check_dropout, "transfer guard")
]


@pytest.mark.parametrize(("case", "name"), ALONE)
@pytest.mark.sample(2)
def test_no_setting_changes_functions_of_functions(case, name):
    reference, key = case(KEY), jax.random.clone(KEY)
    with SETTINGS[name].enter():
        actual = case(key)
    assert_same({"": actual}, {"": reference})


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "tracer leaks")) for n in SETTINGS]
)
def test_a_setting_is_in_force(name):
    """Test of the test: each setting has its documented effect."""
    setting = SETTINGS[name]
    if setting.error:
        error, message = setting.error
        with setting.enter(), pytest.raises(error, match=message):
            setting.sees()
    else:
        with setting.enter():
            assert setting.sees()
