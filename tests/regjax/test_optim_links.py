"""The links of the optimizers one by one, on trees of numbers."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from regjax.optim import _links as links
from tests.regjax.optimizers import assert_close, dtypes

PARAMS = {"a": jnp.array([4.0]), "b": jnp.array([-8.0])}
STEP = {"a": jnp.array([1.0]), "b": jnp.array([-2.0])}
ONLY_A = {"a": True, "b": False}
RISING = lambda count: 0.25 * (1 + count.astype(float))


def _walk(link, updates=STEP, params=PARAMS, steps=1):
    state = link.init(params)
    for _ in range(steps):
        new, state = link.update(updates, state, params)
    return new, state


def test_a_default_is_nothing():
    assert links.OFF == 0.0


ORDER = {
    False: ["weight_decay", "moments", "learning_rate"],
    True: ["moments", "learning_rate", "weight_decay"],
}


@pytest.mark.parametrize("decoupled", [False, True])
def test_four_named_links(decoupled):
    double = lambda by: optax.chain(optax.scale(2.0), optax.trace(by))
    options = {"maximize": True, "decoupled": decoupled, "step": double(0.0)}
    link = links.chain_links(double(0.0), 0.5, 0.25, **options)
    updates, state = _walk(link, steps=2)
    # 4 times the negated gradient plus 0.25 w; decoupled, minus 0.5 * 0.25 w.
    expected = (-4.5, 9.0) if decoupled else (0.0, 0.0)
    assert_close(updates, dict(zip("ab", map(jnp.atleast_1d, expected), strict=True)))
    assert [*state] == ["maximize", *ORDER[decoupled]]
    assert type(state) is type(link.init(PARAMS)) is dict
    assert jax.tree.structure({**state}) == jax.tree.structure(link.init(PARAMS))
    updates, state = _walk(links.chain_links(optax.identity(), 0.5))
    assert_close(updates, optax.tree.scale(-0.5, STEP))
    assert [*state] == ["maximize", *ORDER[False]]


def test_ascend():
    for maximize, sign in ((True, -1.0), (False, 1.0)):
        updates, _ = _walk(links.ascend(maximize))
        assert_close(updates, jax.tree.map(lambda u, s=sign: s * u, STEP))


@pytest.mark.parametrize(
    ("decay", "mask", "steps", "expected"),
    [
        (0.0, None, 1, (1.0, -2.0)),
        (0.25, None, 2, (2.0, -4.0)),
        (jnp.float32(0.25), None, 1, (2.0, -4.0)),
        (0.25, ONLY_A, 1, (2.0, -2.0)),
        (0.25, lambda params: ONLY_A, 1, (2.0, -2.0)),
        (RISING, None, 1, (2.0, -4.0)),
        (RISING, ONLY_A, 2, (3.0, -2.0)),
    ],
)
def test_coupled_decay(decay, mask, steps, expected):
    updates, _ = _walk(links.decay_weights(decay, mask), steps=steps)
    assert_close(updates, dict(zip("ab", map(jnp.atleast_1d, expected), strict=True)))


# The remaining fraction of a parameter is 1 - 0.5 * decay.
@pytest.mark.parametrize(
    ("rate", "decay", "mask", "steps", "expected"),
    [
        (0.5, 0.0, None, 1, (1.0, -2.0)),
        (lambda count: 0.5, 0.0, None, 1, (1.0, -2.0)),
        (0.5, 0.25, None, 1, (0.5, -1.0)),
        (0.5, jnp.float32(0.25), ONLY_A, 1, (0.5, -2.0)),
        (0.5, 0.25, lambda params: ONLY_A, 2, (0.5, -2.0)),
        (0.5, RISING, None, 2, (0.0, 0.0)),
        (RISING, 0.5, ONLY_A, 2, (0.0, -2.0)),
        (RISING, RISING, None, 2, (0.0, 0.0)),
    ],
)
@pytest.mark.parametrize("early", [0.0, 1.0])
def test_decoupled_decay(rate, decay, mask, steps, expected, early):
    terms = jax.tree.map(lambda u: links.Terms(jnp.full(1, early), u), STEP)
    link = links.add_in_turn(rate, decay, mask)
    updates, state = _walk(link, terms if early else STEP, steps=steps)
    assert_close(updates, dict(zip("ab", (jnp.full(1, x + early) for x in expected), strict=True)))
    scheduled = callable(decay) or (callable(rate) and decay != 0.0)
    assert isinstance(state, optax.ScaleByScheduleState) == scheduled
    assert state == ((steps,) if scheduled else ())
    assert type(state) is type(link.init(PARAMS))


def test_terms_are_added_without_parameters_and_beside_infinite_ones():
    link, terms = links.add_in_turn(0.5, 0.0, None), links.Terms(jnp.ones(1), jnp.ones(1))
    assert_close(link.update({"a": terms, "b": jnp.ones(1)}, ())[0], {"a": [2.0], "b": [1.0]})
    assert link.update(jnp.ones(1), (), jnp.array([jnp.inf]))[0] == 1.0


@pytest.mark.parametrize("make", [links.decay_weights, lambda c, m: links.add_in_turn(0.5, c, m)])
def test_a_decay_checks_its_mask_and_needs_parameters(make):
    wrong = make(0.25, {"a": True})
    with pytest.raises(ValueError, match=r"mask must have .* got nothing at 'b'"):
        wrong.init(PARAMS)
    with pytest.raises(ValueError, match=r"^params must be given, since weight_decay=0\.25 needs"):
        make(0.25, None).update(STEP, make(0.25, None).init(PARAMS))
    with pytest.raises(ValueError, match="mask must be True for some"):
        make(0.25, False)
    make(0.0, False).update(STEP, make(0.0, False).init(PARAMS))
    # The placeholder of optax.tree.map_params has no leaves, and matches no mask.
    link = make(RISING, ONLY_A)
    state = link.init(PARAMS)
    mapped = optax.tree.map_params(link, lambda leaf: leaf, state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)


@pytest.mark.parametrize(
    ("mask", "decay", "message"),
    [
        (False, 0.5, "mask must be True for some parameter, .* got False, with which"),
        ({"a": False, "b": np.False_}, 0.5, "mask must be True for some .* static_args"),
        ({"a": [False] * 20}, 0.5, r"got {'a': \[False, .*\.\.\., with which nothing decays"),
        (True, jnp.float32(0.5), "mask must be a tree of bools .* got True. If"),
        (np.True_, jnp.float32(0.5), "mask must be a tree of bools"),
    ],
)
def test_a_mask_that_is_none_is_refused(mask, decay, message):
    with pytest.raises(ValueError, match=message):
        links.check_mask(mask, decay)


@pytest.mark.parametrize("mask", [None, {}, ONLY_A, lambda params: False, {"a": jnp.array(False)}])
def test_a_mask_passes(mask):
    for decay in (0.5, jnp.float32(0.5), RISING):
        links.check_mask(mask, decay)
    links.check_mask(True, 0.5)
    links.check_mask(np.True_, RISING)


def test_a_long_text_is_shortened():
    assert links._shortened("x" * 78) == "'" + "x" * 78 + "'"
    assert links._shortened("x" * 79) == "'" + "x" * 76 + "..."


@pytest.mark.parametrize("b2", [0.0, 0, 0.5, 0.9, 0.999, 0.99999, jnp.float32(0.5)])
def test_bias_correction_is_exact_in_float32(b2):
    for count in (1, 2, 3, 10, 1000, 10**6):
        correction = links.bias_correction(b2, jnp.int32(count))
        assert correction.dtype == "float32"
        exact = -np.expm1(count * np.log(float(b2) or 1e-300))
        np.testing.assert_allclose(correction, exact, rtol=4e-7)


@pytest.mark.parametrize("factor", [0.3, 2, jnp.float32(0.3)])
def test_rounded_product(factor):
    x = jnp.array([1.5, -3.0])
    np.testing.assert_array_equal(links.rounded_product(x, factor), x * jnp.float32(factor))


def test_rounded_once():
    seen = []

    def negate(updates, params=None):
        seen.append([leaf.dtype for leaf in jax.tree.leaves((updates, params))])
        return jax.tree.map(jnp.negative, updates)

    inner = optax.stateless(negate)
    for given in (inner, lambda params: inner):
        for dtype, wide in (("bfloat16", "float32"), ("float16", "float32"), ("float32",) * 2):
            updates, _ = _walk(links.rounded_once(given), *optax.tree.cast((STEP, PARAMS), dtype))
            assert_close(optax.tree.cast(updates, "float32"), optax.tree.scale(-1.0, STEP))
            assert dtypes(updates) == {"a": dtype, "b": dtype}
            assert set(seen[-1]) == {jnp.dtype(wide)}
    link = links.rounded_once(inner)
    updates, _ = _walk(link, {**STEP, "a": None})
    assert updates == {"a": None, "b": 2.0}
    for number in (1, 1.0, np.float32(1.0), np.ones(())):
        updates, _ = _walk(link, 1.0, number if isinstance(number, np.ndarray) else 1.0)
        assert updates == -1.0
        assert isinstance(updates, jax.Array)
    assert link.update(1j, link.init(1j), 1j)[0] == -1j
    with jax.enable_x64(True):
        _walk(link, *optax.tree.cast((STEP, PARAMS), "float64"))
        assert set(seen[-1]) == {jnp.dtype("float64")}


def test_a_parameter_without_a_gradient_keeps_its_state():
    link = links.rounded_once(optax.chain(optax.trace(0.5), optax.add_decayed_weights(0.5)))
    before = link.init(PARAMS)[0].trace
    updates, state = _walk(link, {**STEP, "a": None}, steps=2)
    assert_close(updates, {"a": None, "b": -7.0})
    assert_close(state[0].trace, {"a": before["a"], "b": -3.0})


def test_coefficients_take_the_dtype_that_they_meet():
    half, single = jnp.ones(1, "bfloat16"), jnp.ones(1)
    for coefficient in (1, 0.5, jnp.float32(0.5), jnp.bfloat16(0.5)):
        for x in (half, single):
            assert links.in_dtype_of(x, coefficient).dtype == x.dtype
    assert jax.jit(lambda c: links.in_dtype_of(half, c))(0.5).dtype == half.dtype
    assert links.widest(0.5) == 0.5
    assert isinstance(links.widest(0.5), float)
    assert links.widest(jnp.bfloat16(0.5)).dtype == "float32"


def test_zeros_like():
    half = optax.tree.cast(PARAMS, "bfloat16")
    for params, dtype, expected in (
        (PARAMS, None, "float32"),
        (half, None, "bfloat16"),
        (half, "float32", "float32"),
        (PARAMS, jnp.bfloat16, "bfloat16"),
        (optax.tree.cast(PARAMS, "complex64"), None, "complex64"),
    ):
        zeros = links.zeros_like(params, dtype)
        assert dtypes(zeros) == {"a": expected, "b": expected}
        assert_close(zeros, {"a": [0.0], "b": [0.0]})
    with pytest.raises(TypeError, match=r"params must be real .* got complex64 at 'b'"):
        links.zeros_like({"a": jnp.ones(1), "b": jnp.ones(1, complex)}, "float32")


@pytest.mark.parametrize(
    ("of_update", "of_moment", "expected"),
    [
        ("float32", "float32", "float32"),
        ("float32", "bfloat16", "float32"),
        ("bfloat16", "float32", "float32"),
        ("float16", "bfloat16", "float32"),
    ],
)
def test_promoted(of_update, of_moment, expected):
    trees = {"a": jnp.ones(1, of_update), "b": STEP["b"]}, {"a": jnp.ones(1, of_moment), **ONLY_B}
    updates, moments = links.promoted(*trees)
    assert dtypes(updates) == dtypes(moments) == {"a": expected, "b": "float32"}
    assert_close((updates, moments), trees)
    assert dtypes(links.promoted(trees[0]["a"], trees[1]["a"])) == (expected, expected)


ONLY_B = {"b": jnp.array([3.0])}


@pytest.mark.parametrize("value", [(1, 2), [1.0, 2.0], np.ones(2), jnp.ones(2)])
def test_a_pair_passes(value):
    links.check_pair("x", value, fix="")
    links.check_pair("x", (*value, 3.0), fix="", length=3)


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ((1.0,), ValueError),
        ([1, 2, 3], ValueError),
        (np.ones(3), ValueError),
        (jnp.ones((2, 2)), ValueError),
        (0.5, TypeError),
        ("ab", TypeError),
        ({1, 2}, TypeError),
    ],
)
def test_what_is_no_pair_is_refused(value, error):
    with pytest.raises(error, match=r"(?s)^x must be two numbers; got .*\. Fix\.$"):
        links.check_pair("x", value, fix="Fix.")
    with pytest.raises((TypeError, ValueError), match=r"^x must be three numbers; got"):
        links.check_pair("x", (1.0, 2.0), fix="Fix.", length=3)


def test_float_dtypes():
    for dtype in (None, "float32", jnp.bfloat16, np.dtype("float16")):
        links.check_float_dtype("x", dtype)
    for dtype in ("int32", "complex64", "no dtype", 3.0):
        with pytest.raises(TypeError, match=r"^x must be a float dtype or None; got"):
            links.check_float_dtype("x", dtype)
    assert not links.is_dtype_of(jnp.floating, None)


@pytest.mark.parametrize("value", [1, 1.0, 2.5, 3.0, np.float32(2), np.array(2.0), jnp.array(2)])
def test_a_number_in_bounds_passes(value):
    links.check_bounds("x", value, low=1.0, high=3.0, fix="")
    links.check_bounds("x", value, low=1.0, fix="")
    links.check_bounds("x", -value, high=-1.0, fix="")
    assert jax.jit(lambda x: links.check_bounds("x", x, low=9.0, fix="") or x)(value) == value


@pytest.mark.parametrize("value", [0.5, 3.5, math.nan, np.float32(4), jnp.array(-2.0)])
def test_a_number_out_of_bounds_is_refused(value):
    with pytest.raises(ValueError, match=r"x must lie in \[1, 3\]; got .*\. Fix it"):
        links.check_bounds("x", value, low=1.0, high=3.0, fix="Fix it.")


@pytest.mark.parametrize("value", [True, None, "0.5", 1j, np.ones(1), jnp.ones(1), [1.0]])
def test_a_bounded_number_must_be_one(value):
    with pytest.raises(TypeError, match=r"x must be a real number; got .*\. Fix it"):
        links.check_bounds("x", value, fix="Fix it.")


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay"])
def test_rates_are_numbers_or_schedules(name):
    fine = {"learning_rate": 0.1, "weight_decay": 0.0}
    links.check_rates(**fine | {name: RISING})
    with pytest.raises(ValueError, match=f"^{name} must be finite and not negative"):
        links.check_rates(**fine | {name: -1.0})


def test_what_is_known_and_what_is_zero():
    known = []
    jax.jit(lambda x: known.append(links.is_known(1.0, x)) or x)(1.0)
    assert known == [False]
    assert links.is_known(1.0, jnp.ones(()))
    assert all(links.is_zero(x) for x in (0, 0.0, np.float32(0)))
    assert not any(links.is_zero(x) for x in (1, -1, 0.5, jnp.array(0.0), None, RISING))
