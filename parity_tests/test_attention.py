"""Attention with dropout: equal masks in both frameworks and algorithms, values at stated tiers.

One table of cases serves every test: splitting the file would split the table.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen

import regjax
import regtorch
from parity_tests import reference
from parity_tests.frameworks import JAX, TORCH, Framework, to_torch
from parity_tests.tables import both_frameworks

BATCH, QUERIES, KEYS, HEADS, DEPTH = 2, 7, 11, 4, 8
RATE, SEED = 0.3, 5

RNG = np.random.default_rng(0)
PADDING = np.arange(KEYS)[None, None, None] < np.array([KEYS, 6])[:, None, None, None]
NOTHING_TO_SEE = np.broadcast_to(np.arange(QUERIES)[:, None] != 2, (QUERIES, KEYS))
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "padding": {"mask": PADDING},
    "a query that sees nothing": {"mask": NOTHING_TO_SEE},
    "bias": {"bias": RNG.normal(size=(1, HEADS, QUERIES, KEYS))},
    "bias of -inf": {"bias": np.where(PADDING, 0.0, -np.inf)},
    "grouped": {"kv_heads": 2, "is_causal": True},
    "eight heads over two": {"heads": 8, "kv_heads": 2},
    "one key head": {"kv_heads": 1},
    "no batch": {"batch": ()},
    "two batches": {"batch": (2, 3), "bias": RNG.normal(size=(QUERIES, KEYS))},
    "shared mask": {"broadcast_dropout": True},
    "scale": {"scale": 0.2},
    "rate 0.9": {"dropout_rate": 0.9},
    "no dropout": {"dropout_rate": 0.0},
    "evaluation": {"deterministic": True},
}
BLOCKS = (None, 1, 4, KEYS, 100)
case = pytest.mark.parametrize("name", CASES)


def inputs(
    batch=(BATCH,), heads=HEADS, kv_heads=HEADS, **options: Any
) -> tuple[list[np.ndarray], dict]:
    """Return query, key, value and a cotangent, and the other arguments."""
    rng = np.random.default_rng(1)
    shapes = [
        (*batch, QUERIES, heads, DEPTH),
        (*batch, KEYS, kv_heads, DEPTH),
        (*batch, KEYS, kv_heads, 3),
        (*batch, QUERIES, heads, 3),
    ]
    return [rng.normal(size=shape) for shape in shapes], {"dropout_rate": RATE} | options


def run(
    framework: Framework,
    arrays: list[np.ndarray],
    options: dict,
    dtype: str,
    *,
    gradients=True,
    **how: Any,
):
    """Return the result and the gradients of query, key, value and, if present, bias."""
    *qkv, ct = (framework.array(array.astype(dtype)) for array in arrays)
    options = dict(options)
    if "mask" in options:
        options["mask"] = framework.array(np.array(options["mask"]))
    bias = [framework.array(options.pop("bias").astype(dtype))] if "bias" in options else []
    how = options | {"dropout_rng": framework.key(SEED)} | how

    def attend(*differentiated):
        return framework.library.dot_product_attention(*differentiated, **how)

    if not gradients:
        return [framework.numpy(attend(*qkv, *bias))]
    if framework is JAX:

        def both(ct, *differentiated):
            y, pull_back = jax.vjp(attend, *differentiated)
            return y, *pull_back(ct)

        return [np.asarray(x) for x in jax.jit(both)(ct, *qkv, *bias)]
    leaves = [x.requires_grad_() for x in (*qkv, *bias)]
    y = attend(*leaves)
    gradients = torch.autograd.grad(y, leaves, ct)
    return [framework.numpy(x) for x in (y, *gradients)]


def assert_close(actual, expected, bound: float) -> None:
    """Assert that the largest difference over the largest magnitude is within the bound."""
    for array, twin in zip(actual, expected, strict=True):
        assert np.abs(array - twin).max() <= bound * max(1, np.abs(twin).max())


def expected(arrays: list[np.ndarray], options: dict, seed: int = SEED) -> np.ndarray:
    """Return attention in NumPy, in double, with the mask of the reference."""
    q, k, v, _ = arrays
    groups = q.shape[-2] // k.shape[-2]
    k, v = (np.repeat(x, groups, axis=-2) for x in (k, v))
    scores = np.einsum("...qhd,...khd->...hqk", q, k) * options.get("scale", DEPTH**-0.5)
    scores = scores + options.get("bias", 0.0)
    seen = np.broadcast_to(options.get("mask", True), scores.shape)
    if options.get("is_causal"):
        seen = seen & np.tri(QUERIES, KEYS, dtype=bool)
    powers = np.where(seen, np.exp(scores), 0)
    total = powers.sum(-1, keepdims=True)
    weights = powers / np.where(total > 0, total, 1)
    rate = 0 if options.get("deterministic") else options["dropout_rate"]
    shape = (*[1] * (scores.ndim - 2), *scores.shape[-2:])
    shape = shape if options.get("broadcast_dropout") else scores.shape
    words: Any = JAX.words(JAX.key(seed))
    keep = reference.bernoulli(words, 1 - rate, shape)
    return np.einsum("...hqk,...khd->...qhd", np.where(keep, weights / (1 - rate), 0), v)


@case
@both_frameworks
@pytest.mark.sample(3)
def test_it_is_attention(framework: Framework, name):
    """Compare with NumPy, whole and blockwise, in float64 within 1e-12 in norm."""
    arrays, options = inputs(**CASES[name])
    with jax.enable_x64(True):
        for block_size in (None, 4):
            (y,) = run(
                framework, arrays, options, "float64", gradients=False, block_size=block_size
            )
            assert_close([y], [expected(arrays, options)], 1e-12)
    if not options.get("deterministic") and options["dropout_rate"]:
        # Another key gives another result, so the comparison depends on the mask.
        assert np.abs(expected(arrays, options, SEED + 1) - y).max() > 0.1


BACKWARD = ("a query that sees nothing", "two batches", "eight heads over two")


@pytest.mark.parametrize(
    "name",
    [*BACKWARD, *(pytest.param(n, marks=pytest.mark.slow) for n in CASES if n not in BACKWARD)],
)
@pytest.mark.sample(1)
def test_the_frameworks_agree_forward_and_backward(name):
    """Float64 agrees within 1e-12 in norm and float32 within 2e-6, whole and blockwise."""
    arrays, options = inputs(**CASES[name])
    with jax.enable_x64(True):
        whole = run(JAX, arrays, options, "float64")
        for framework, block_size in ((TORCH, None), (JAX, 4), (TORCH, 4)):
            assert_close(
                run(framework, arrays, options, "float64", block_size=block_size), whole, 1e-12
            )
    for framework, block_size in ((JAX, 4), (TORCH, None)):
        found = run(framework, arrays, options, "float32", block_size=block_size)
        assert_close(found, [array.astype(np.float32) for array in whole], 2e-6)


@both_frameworks
@pytest.mark.parametrize("shared", [False, True], ids=["each", "shared"])
@pytest.mark.sample(2)
def test_every_form_drops_the_same_weights(framework: Framework, shared):
    """With unit vectors as values, zeros are dropped weights; the false-alarm rate is 2e-7."""
    arrays, options = inputs(broadcast_dropout=shared)
    unit = np.eye(KEYS)[None, :, None].repeat(BATCH, 0).repeat(HEADS, 2)
    shape = (1, 1, QUERIES, KEYS) if shared else (BATCH, HEADS, QUERIES, KEYS)
    keep = np.broadcast_to(
        framework.bernoulli(SEED, 1 - RATE, shape), (BATCH, HEADS, QUERIES, KEYS)
    )
    for block_size in BLOCKS:
        y = framework.library.dot_product_attention(
            *(framework.array(x.astype(np.float32)) for x in (*arrays[:2], unit)),
            dropout_rng=framework.key(SEED),
            block_size=block_size,
            **options,
        )
        np.testing.assert_array_equal(framework.numpy(y).transpose(0, 2, 1, 3) != 0, keep)


@both_frameworks
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("block_size", [None, 4])
@pytest.mark.sample(4)
def test_half_types_have_their_softmax_in_float32(framework: Framework, dtype, block_size):
    """Scores above 40 would overflow the softmax in half types."""
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(1, 64, 2, 16)) * size for size in (4, 4, 1)]
    arrays = [array.astype(jnp.dtype(dtype)) for array in arrays]
    how = {"dropout_rng": framework.key(SEED), "dropout_rate": RATE, "block_size": block_size}
    attend = framework.library.dot_product_attention
    y = framework.numpy(attend(*map(framework.array, arrays), **how))
    wide = framework.numpy(attend(*(framework.array(x.astype(np.float32)) for x in arrays), **how))
    assert y.dtype == jnp.dtype(dtype)
    eps = float(jnp.finfo(dtype).eps)
    assert np.abs(y.astype(np.float32) - wide).max() < 2 * eps * np.abs(wide).max()


@both_frameworks
def test_gradients_of_half_types_do_not_wear_with_the_number_of_blocks(framework: Framework):
    """Every block adds to the gradient of a query; a sum in bfloat16 would be 4 times worse."""
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(1, 256, 1, 16)).astype(jnp.bfloat16) for _ in range(4)]
    options = {"dropout_rate": RATE}
    exact = run(framework, arrays, options, "float32")
    once, often = (
        [
            np.linalg.norm(x.astype(np.float32) - y) / np.linalg.norm(y)
            for x, y in zip(found, exact, strict=True)
        ]
        for found in (run(framework, arrays, options, "bfloat16", block_size=n) for n in (256, 2))
    )
    assert max(once) < float(jnp.finfo(jnp.bfloat16).eps)
    np.testing.assert_array_less(often, 2 * np.array(once))


@both_frameworks
@pytest.mark.parametrize("block_size", [None, 4])
@pytest.mark.parametrize("sizes", [(0, 5, 7), (2, 0, 7), (2, 5, 0)], ids=str)
def test_where_nothing_is_there_the_result_is_zeros(framework: Framework, block_size, sizes):
    batch, queries, keys = sizes
    shapes = [
        (batch, queries, 2, 4),
        *((batch, keys, 1, d) for d in (4, 3)),
        (batch, queries, 2, 3),
    ]
    arrays = [np.ones(shape) for shape in shapes]
    y, *gradients = run(framework, arrays, {"dropout_rate": RATE}, "float32", block_size=block_size)
    assert y.shape == shapes[3]
    assert [x.shape for x in gradients] == shapes[:3]
    assert not any(x.any() for x in (y, *gradients))


@pytest.mark.parametrize("name", ["plain", "causal", "padding", "a query that sees nothing"])
def test_without_dropout_it_is_the_attention_of_pytorch(name):
    arrays, options = inputs(**CASES[name], dropout_rate=0.0)
    q, k, v = (to_torch(x).transpose(1, 2) for x in arrays[:3])
    mask = to_torch(np.array(np.broadcast_to(options.get("mask", True), (BATCH, 1, QUERIES, KEYS))))
    if options.get("is_causal"):
        mask = mask & torch.ones(QUERIES, KEYS, dtype=torch.bool).tril()
    in_torch = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    with jax.enable_x64(True):
        in_jax = run(JAX, arrays, options, "float64", gradients=False)
    assert_close(in_jax, [in_torch.transpose(1, 2).numpy()], 1e-12)


def test_a_layer_of_pytorch_is_a_layer_of_flax():
    """Compare a converted torch.nn.MultiheadAttention with Linen's, which calls regjax."""
    torch.manual_seed(0)
    width = HEADS * DEPTH
    in_torch = torch.nn.MultiheadAttention(width, HEADS, dropout=RATE, batch_first=True)
    torch.nn.init.normal_(in_torch.in_proj_bias)
    regtorch.keyed.set_key(regtorch.keyed.convert(in_torch), regtorch.key(SEED), 3)
    x = np.random.default_rng(0).normal(size=(BATCH, QUERIES, width)).astype(np.float32)
    y, _ = in_torch(*[to_torch(x)] * 3)

    in_jax = linen.MultiHeadDotProductAttention(
        HEADS,
        dropout_rate=RATE,
        broadcast_dropout=False,
        deterministic=False,
        attention_fn=regjax.dot_product_attention,
    )
    params = {}
    kernels = in_torch.in_proj_weight.detach().numpy().reshape(3, HEADS, DEPTH, width)
    biases = in_torch.in_proj_bias.detach().numpy().reshape(3, HEADS, DEPTH)
    for name, kernel, bias in zip(("query", "key", "value"), kernels, biases, strict=True):
        params[name] = {"kernel": kernel.transpose(2, 0, 1), "bias": bias}
    out = in_torch.out_proj.weight.detach().numpy().T.reshape(HEADS, DEPTH, width)
    params["out"] = {"kernel": out, "bias": in_torch.out_proj.bias.detach().numpy()}
    key = regjax.site_key(jax.random.key(SEED), 3, "")
    with jax.numpy_rank_promotion("allow"):  # Linen's own layers depend on it
        z = in_jax.apply({"params": params}, x, dropout_rng=key)
    np.testing.assert_allclose(np.asarray(z), y.detach().numpy(), atol=1e-6)


BAD: dict[str, tuple[dict[str, Any], str, type[Exception]]] = {
    "key's depth": (
        {"key": (2, 11, 4, 7)},
        r"query and key must have the same batch and depth; got shapes",
        ValueError,
    ),
    "key's batch": (
        {"key": (3, 11, 4, 8)},
        r"query and key must have the same batch .*; got shapes \(2, .* and \(3, ",
        ValueError,
    ),
    "value": ({"value": (2, 10, 4, 8)}, "value must have key's shape", ValueError),
    "heads": (
        {"key": (2, 11, 3, 8), "value": (2, 11, 3, 8)},
        "query must have a multiple of key's 3 heads; got 4",
        ValueError,
    ),
    "rank": ({"query": (7, 8)}, r"query must have shape \(..., length, heads", ValueError),
    "mask": ({"mask": np.ones((7, 10), bool)}, "mask must broadcast", ValueError),
    "bias": ({"bias": np.ones((1, 2, 4, 7, 11))}, "bias must broadcast", ValueError),
    "mask of numbers": ({"mask": np.full((7, 11), -np.inf)}, "mask must be boolean", TypeError),
    "integers": ({"query": np.ones((2, 7, 4, 8), np.int32)}, "query must be floating", TypeError),
    "no key": ({"dropout_rng": None}, "dropout_rng must be a random key in training", ValueError),
    "not a key": ({"dropout_rng": 0}, "dropout_rng: key must be a", TypeError),
    "rate": ({"dropout_rate": 1.5}, r"dropout_rate must lie in \[0, 1\]; got 1.5", ValueError),
    "block": ({"block_size": 0}, "block_size must be at least 1; got 0", ValueError),
    "flag": ({"deterministic": 1}, "deterministic must be a boolean", TypeError),
    "residual": ({"return_residual": 1}, "return_residual must be True or False", TypeError),
    "window's type": ({"local_window_size": 1.5}, "local_window_size must be an int", TypeError),
    "window's side": ({"local_window_size": [1, "2"]}, r"local_window_size\[1\] must", TypeError),
    "window's sides": (
        {"local_window_size": [1, 2, 3]},
        r"local_window_size must be a size or a pair .*; got \[1, 2, 3\]",
        ValueError,
    ),
    "negative window": (
        {"local_window_size": [-1, 0]},
        r"local_window_size must be .*at least 0; got \[-1, 0\]\. For no limit .* number of keys",
        ValueError,
    ),
    "lengths' dtype": (
        {"query_seq_lengths": np.ones(2, np.float32)},
        "query_seq_lengths must be integers; got dtype .*float32. Cast them",
        TypeError,
    ),
    "lengths of booleans": (
        {"key_value_seq_lengths": np.ones(2, bool)},
        "key_value_seq_lengths must be integers; got dtype .*bool",
        TypeError,
    ),
    "lengths' shape": (
        {"key_value_seq_lengths": np.ones((2, 4), np.int32)},
        r"key_value_seq_lengths must have one number for each .*shape \(2,\); got shape \(2, 4\)",
        ValueError,
    ),
    "one length": (
        {"query_seq_lengths": np.ones(1, np.int32)},
        r"query_seq_lengths must have one number for each example, shape \(2,\); got shape \(1,\)",
        ValueError,
    ),
}


@both_frameworks
@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("block_size", [None, 4])
def test_what_does_not_fit_is_named(framework: Framework, name, block_size):
    change, message, error = BAD[name]
    shapes = {"query": (2, 7, 4, 8), "key": (2, 11, 4, 8), "value": (2, 11, 4, 8)}
    how: dict[str, Any] = {"dropout_rng": framework.key(0), "dropout_rate": RATE}
    how |= {"block_size": block_size} | {n: np.ones(s, np.float32) for n, s in shapes.items()}
    how |= {n: np.ones(c, np.float32) if isinstance(c, tuple) else c for n, c in change.items()}
    how = {n: framework.array(x) if isinstance(x, np.ndarray) else x for n, x in how.items()}
    with pytest.raises(error, match=message):
        framework.library.dot_product_attention(**how)


@both_frameworks
@pytest.mark.parametrize("block_size", [None, 4])
@pytest.mark.sample(2)
def test_a_changing_rate(framework: Framework, block_size):
    """A traced rate equals the number to float32, and gives NaN out of range; 0 and 1 are exact."""
    arrays, _ = inputs()
    q, k, v = (framework.array(x.astype(np.float32)) for x in arrays[:3])

    def at(rate):
        return framework.library.dot_product_attention(
            q, k, v, dropout_rng=framework.key(SEED), dropout_rate=rate, block_size=block_size
        )

    changing = framework.traced(at)
    for rate in (0.25, 0.5):
        np.testing.assert_allclose(
            framework.numpy(changing(np.float32(rate))), framework.numpy(at(rate)), atol=1e-6
        )
    for rate in (-0.5, 1.5, np.nan):
        assert np.isnan(framework.numpy(changing(np.float32(rate)))).all()
    assert not framework.numpy(changing(np.float32(1))).any()
    assert not framework.numpy(at(1)).any()
    np.testing.assert_allclose(
        framework.numpy(changing(np.float32(0))), framework.numpy(at(0)), atol=1e-6
    )


@both_frameworks
@pytest.mark.parametrize("block_size", [None, 4])
def test_who_watches_is_told_the_whole_mask(framework: Framework, block_size):
    arrays, options = inputs()
    draws = []
    with framework.library.observing(draws.append):
        run(framework, arrays, options, "float32", gradients=False, block_size=block_size)
        jax.effects_barrier()
    shape = (BATCH, HEADS, QUERIES, KEYS)
    assert len(draws) == 1
    assert draws[0].function == "dot_product_attention"
    np.testing.assert_array_equal(
        np.asarray(draws[0].mask), framework.bernoulli(SEED, 1 - RATE, shape)
    )
    # The whole matrix has the same weights, which previous tests compare with PyTorch.
    whole = []
    with framework.library.observing(whole.append):
        run(framework, arrays, options, "float32", gradients=False, block_size=None)
        jax.effects_barrier()
    entering = (np.asarray(draw.entering) for draw in (draws[0], whole[0]))
    np.testing.assert_allclose(*entering, rtol=1e-5, atol=1e-7)
    assert np.asarray(draws[0].entering).shape == shape
    assert draws[0].rate == RATE


@both_frameworks
@pytest.mark.parametrize("block_size", [None, 4])
def test_who_watches_is_not_told_what_a_changing_flag_turns_off(framework: Framework, block_size):
    arrays, options = inputs()
    qkv = [framework.array(x.astype(np.float32)) for x in arrays[:3]]
    options |= {"dropout_rng": framework.key(SEED), "block_size": block_size}
    attend = framework.library.dot_product_attention
    changing = framework.traced(lambda flag: attend(*qkv, deterministic=flag, **options))
    draws = []
    with framework.library.observing(draws.append):
        for flag, times in ((True, 0), (False, 1)):
            changing(flag)
            jax.effects_barrier()
            assert len(draws) == times


@both_frameworks
@pytest.mark.parametrize(
    ("scale", "error"),
    [
        (np.nan, ValueError),
        (np.inf, ValueError),
        (-np.inf, ValueError),
        (np.ones(2), (TypeError, ValueError)),
        ("0.5", TypeError),
        (True, TypeError),
        (1j, TypeError),
    ],
)
def test_a_scale_that_is_no_finite_number_is_refused(framework: Framework, scale, error):
    (q, k, v, _), _ = inputs()
    with pytest.raises(error, match="scale must be"):
        framework.library.dot_product_attention(*map(framework.array, (q, k, v)), scale=scale)


@both_frameworks
@pytest.mark.parametrize("block_size", [None, 4])
@pytest.mark.sample(3)
def test_a_changing_scale_is_that_of_the_number_and_of_nan_nan(framework: Framework, block_size):
    q, k, v = (framework.array(x.astype(np.float32)) for x in inputs()[0][:3])
    attend = lambda scale: framework.library.dot_product_attention(
        q, k, v, scale=scale, block_size=block_size
    )
    for scale in (0.2, -1.0, 0.0):
        y = framework.numpy(framework.traced(attend)(np.float32(scale)))
        np.testing.assert_allclose(y, framework.numpy(attend(scale)), rtol=1e-4, atol=1e-5)
    assert np.isnan(framework.numpy(framework.traced(attend)(np.float32(np.nan)))).all()
