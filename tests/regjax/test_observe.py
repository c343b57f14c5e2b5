from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import regjax
from regjax._observe import Draw, SiteKey

KEY = jax.random.key(0)
X = jnp.arange(1.0, 9.0)


def watch(run):
    """What `run` draws, in the order of the program."""
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
def test_every_draw_is_told_once(run, draws):
    before = run(X)
    drawn, _ = watch(lambda: np.testing.assert_array_equal(run(X), before))
    assert len(drawn) == draws
    assert np.array_equal(run(X), before)


def test_what_is_told_is_what_was_drawn():
    y = drop(X, rate=0.25)
    ((event,), _) = watch(lambda: drop(X, rate=0.25))
    assert (event.key, event.rate) == ((0, 0), 0.25)
    np.testing.assert_array_equal(event.entering, X)
    np.testing.assert_array_equal(np.where(event.mask, X * np.float32(1 / 0.75), 0), y)


def test_a_shared_mask_is_told_as_it_is():
    ((event,), _) = watch(lambda: drop(X.reshape(2, 4), broadcast_dims=(0,)))
    assert event.mask.shape == (1, 4)


def test_keys_of_sites_are_told_with_what_they_were_derived_from():
    root = jax.random.key(7)
    _, events = watch(lambda: jax.jit(lambda s: regjax.site_key(root, s, "hidden"))(5))
    words = jax.random.key_data(regjax.site_key(root, 5, "hidden"))
    assert events == [SiteKey("hidden", (0, 7), 5, tuple(int(word) for word in words))]


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


def test_of_two_observers_the_inner_one_is_told():
    outer, inner = [], []
    with regjax.observing(outer.append):
        with regjax.observing(inner.append):
            drop(X)
            jax.effects_barrier()
        drop(X, rate=0.1)
        jax.effects_barrier()
    assert [event.rate for event in outer] == [0.1]
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
    """Also under vmap of the flag, where both branches run."""

    def at(flag):
        return regjax.dropout(X, 0.5, key=KEY, deterministic=flag)

    events = []
    with regjax.observing(events.append):
        run = jax.vmap(at) if len(flags) > 1 else lambda flags: at(flags[0])
        jax.jit(run)(jnp.array(flags))
        jax.effects_barrier()
    assert len(events) == flags.count(False)
