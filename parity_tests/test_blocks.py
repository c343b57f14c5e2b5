"""DropBlock: equal bits in both frameworks, which follow the published formula."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parity_tests import reference, tables
from parity_tests.frameworks import FRAMEWORKS, JAX, TORCH, Framework
from parity_tests.tables import FLOATS, assert_same_bits, both_frameworks, inputs

DTYPES = [*FLOATS[1:], np.dtype(np.complex64)]


@dataclass(frozen=True)
class Case:
    """A feature map, channels last, and its blocks."""

    shape: tuple[int, ...]
    block_size: int
    share_channels: bool = False
    gamma_scale: float = 1.0

    @property
    def block(self) -> int:
        """Return the size of a block, at most the shortest dimension."""
        return min(self.block_size, *self.shape[1:-1])

    @property
    def starts(self) -> tuple[int, ...]:
        """Return the numbers of possible starts of a block: row, channel, then each dimension."""
        channels = 1 if self.share_channels else self.shape[-1]
        return (self.shape[0], channels, *(size - self.block + 1 for size in self.shape[1:-1]))

    def gamma(self, rate: float) -> float:
        """Return the probability that a block starts at a position, as in the paper."""
        fraction = math.prod(self.shape[1:-1]) / math.prod(self.starts[2:])
        return min(1.0, self.gamma_scale * rate / self.block ** (len(self.shape) - 2) * fraction)


CASES = [
    Case((2, 9, 8, 3), 3),
    Case((2, 9, 8, 3), 3, share_channels=True),
    Case((3, 6, 10, 2), 4),  # an even block
    Case((2, 4, 9, 3), 7),  # larger than the map in one dimension
    Case((2, 5, 5, 3), 1),
    Case((3, 20, 4), 5),  # one dimension
    Case((2, 5, 6, 4, 2), 2),  # three
]
each_case = pytest.mark.parametrize("case", CASES, ids=str)


def channels_first(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(array, -1, 1))


def run(
    framework: Framework,
    x: np.ndarray,
    ct: np.ndarray,
    rate: Any,
    case: Case,
    seed: int = 11,
    **options: Any,
):
    """Return result and gradient of a channels-last array, in the layout of each framework."""
    there = channels_first if framework is TORCH else np.asarray
    options |= {name: getattr(case, name) for name in ("block_size", "share_channels")}
    options["gamma_scale"] = case.gamma_scale
    function = functools.partial(framework.library.drop_block, key=framework.key(seed), **options)
    arrays = map(there, (x, ct))
    back = (lambda a: np.moveaxis(a, 1, -1)) if framework is TORCH else np.asarray
    return [*map(back, tables.vjp(framework, function, rate, *arrays))]


def oracle(case: Case, rate: float, seed: int = 11) -> np.ndarray:
    """Return the mask of the published algorithm, block by block, channels last."""
    starts = ~reference.bernoulli((0, seed), 1 - case.gamma(rate), case.starts)
    keep = np.ones((*case.starts[:2], *case.shape[1:-1]), bool)
    for row, channel, *place in np.argwhere(starts):
        block = (slice(start, start + case.block) for start in place)
        keep[(row, channel, *block)] = False
    return np.broadcast_to(np.moveaxis(keep, 1, -1), case.shape)


@each_case
@both_frameworks
@pytest.mark.sample(8)
def test_the_mask_and_the_scale_are_those_of_the_published_formula(framework: Framework, case):
    x, ct = inputs(case.shape)
    keep = oracle(case, 0.3)
    assert 0 < keep.sum() < keep.size
    counted = keep[..., :1] if case.share_channels else keep
    scale = np.float32(counted.size) / np.float32(counted.sum())
    for result, array in zip(run(framework, x, ct, 0.3, case), (x, ct), strict=True):
        np.testing.assert_array_equal(result, np.where(keep, array * scale, np.float32(0)))


@both_frameworks
@pytest.mark.parametrize(
    ("rate", "gamma_scale", "options"),
    [
        (0.3, 0.5, {}),
        (0.3, 100.0, {}),  # gamma above 1 drops everything
        (np.float32(0.3), 2.0, {"scale_by_keep": False}),
        (0.3, 1.0, {"scale_by_keep": False}),
        (0.3, 2.0, {"with_noise": True}),
        (np.float32(0.3), 1.0, {"with_noise": True}),
        (1.0, 0.5, {"with_noise": True}),
        (np.float32(1), 0.0, {"with_noise": True}),
    ],
)
@pytest.mark.sample(10)
def test_the_options_of_timm(framework: Framework, rate, gamma_scale, options):
    """Scaled gamma, no scale of kept elements, and noise instead of zeros."""
    case = Case((2, 9, 8, 3), 3, gamma_scale=gamma_scale)
    x, ct = inputs(case.shape)
    keep = oracle(case, float(rate)) if rate < 1 else np.zeros(case.shape, bool)
    scale = 1 if options else np.float32(keep.size) / np.float32(max(1, keep.sum()))
    noise = np.zeros(case.shape, np.float32)
    if "with_noise" in options:
        own_key = reference.threefry2x32((0, 11), (2**32 - 1, 2**32 - 1))
        first = framework.library.normal(raw_key(framework, own_key), (2, 3, 9, 8))
        noise = np.moveaxis(framework.numpy(first), 1, -1)
    y, gradient = run(framework, x, ct, rate, case, **options)
    np.testing.assert_array_equal(y, np.where(keep, x * np.float32(scale), noise))
    np.testing.assert_array_equal(gradient, np.where(keep, ct * np.float32(scale), np.float32(0)))


def raw_key(framework: Framework, words: tuple[int, int]) -> Any:
    return framework.array(np.array(words, np.uint32))


@both_frameworks
def test_noise_is_left_out_in_evaluation_and_needs_a_key_in_training(framework: Framework):
    x = framework.array(np.ones((1, 5, 5, 3), np.float32))
    drop = functools.partial(framework.library.drop_block, x, with_noise=True, block_size=2)
    assert drop(0) is x
    assert drop(0.5, deterministic=True) is x
    at = framework.traced(lambda flag: drop(0.5, key=framework.key(0), deterministic=flag))
    assert (framework.numpy(at(np.bool_(True))) == 1).all()
    np.testing.assert_array_equal(
        framework.numpy(at(np.bool_(False))), framework.numpy(drop(0.5, key=framework.key(0)))
    )
    with pytest.raises(ValueError, match="key must be a random key in training"):
        drop(1)


@both_frameworks
def test_an_error_of_a_thousandth_in_gamma_is_seen(framework: Framework):
    """A relative error of 1e-3 in gamma changes a few of 100,000 possible starts."""
    case = Case((1, 100, 102, 10), 3)
    x, ct = inputs(case.shape)
    y, _ = run(framework, x, ct, 0.5, case)
    threshold = np.float32(1 - case.gamma(0.5))
    draws = np.asarray(regjax_bits(case.starts)) >> 9
    starts = draws >= math.ceil(float(threshold) * 2**23)
    pad = [(0, 0), (0, 0), (2, 2), (2, 2)]
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(starts, pad), (3, 3), axis=(2, 3))
    dropped = np.asarray(windows.any((-1, -2)))
    np.testing.assert_array_equal(y == 0, np.moveaxis(dropped, 1, -1))
    moved = draws >= math.ceil(float(np.float32(1 - 1.001 * case.gamma(0.5))) * 2**23)
    assert (moved != starts).any()  # test of the test


def regjax_bits(shape: tuple[int, ...]) -> Any:
    return jax.random.bits(JAX.key(11), shape, "uint32")


@both_frameworks
def test_the_scale_is_one_exact_division_of_the_counts(framework: Framework):
    x = framework.array(np.ones((1, 7, 7, 3), np.float32))
    for seed in range(12):
        drop = functools.partial(framework.library.drop_block, block_size=2, channel_axis=-1)
        y = framework.numpy(drop(x, 0.3, key=framework.key(seed)))
        assert y.max() == np.float32(y.size) / np.float32(np.count_nonzero(y))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_backward_agree_in_every_bit_of_every_type(dtype):
    case = CASES[2]
    with jax.enable_x64(dtype.itemsize == 8):
        runs = (run(framework, *inputs(case.shape, dtype), 0.4, case) for framework in FRAMEWORKS)
        assert_same_bits(dtype, *runs)


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.9])
def test_a_changing_rate_draws_the_mask_of_the_number(rate):
    case = CASES[0]
    x, ct = inputs(case.shape)
    numbers = run(JAX, x, ct, rate, case)
    for framework in FRAMEWORKS:
        for array, twin in zip(run(framework, x, ct, np.float32(rate), case), numbers, strict=True):
            np.testing.assert_array_equal(array, twin)


@both_frameworks
def test_channels_first_and_channels_last_draw_the_same_mask(framework: Framework):
    x, _ = inputs((2, 9, 8, 3))
    drop = functools.partial(
        framework.library.drop_block, rate=0.3, block_size=3, key=framework.key(5)
    )
    first = framework.numpy(drop(framework.array(channels_first(x)), channel_axis=1))
    last = framework.numpy(drop(framework.array(x), channel_axis=-1))
    np.testing.assert_array_equal(first, channels_first(last))


@both_frameworks
def test_whoever_watches_sees_what_is_kept(framework: Framework):
    drawn = []
    case = CASES[1]
    x, ct = inputs(case.shape)
    with framework.library.observing(drawn.append):
        y, _ = run(framework, x, ct, 0.3, case)
        jax.effects_barrier()
    mask = framework.numpy(drawn[0].mask) if framework is TORCH else drawn[0].mask
    mask = np.moveaxis(mask, 1, -1) if framework is TORCH else mask
    np.testing.assert_array_equal(np.broadcast_to(mask, y.shape), y != 0)
    assert (drawn[0].rate, drawn[0].key) == (0.3, (0, 11))


@both_frameworks
def test_the_corners_are_those_of_dropout(framework: Framework):
    drop = framework.library.drop_block
    x = framework.array(np.full((4, 6, 6, 6), np.inf, np.float32))
    key = framework.key(0)
    assert drop(x, 0) is x
    assert drop(x, 0.5, deterministic=True) is x
    assert not framework.numpy(drop(x, 1)).any()
    at = framework.traced(lambda rate: drop(x, rate, block_size=3, key=key))
    assert not framework.numpy(at(np.float32(1))).any()
    np.testing.assert_array_equal(framework.numpy(at(np.float32(0))), framework.numpy(x))
    for rate in (-0.1, 1.5, np.nan):
        assert np.isnan(framework.numpy(at(np.float32(rate)))).all()
    y = framework.numpy(drop(x, 0.3, block_size=3, key=key))
    assert set(np.unique(y)) == {0, np.inf}
    for shape in ((0, 5, 5, 3), (2, 0, 5, 3), (2, 5, 0, 3), (2, 5, 5, 0)):
        empty = framework.array(np.ones(shape, np.float32))
        assert drop(empty, 0.3, key=key).shape == shape


@both_frameworks
def test_where_nothing_is_left_there_are_zeros_and_zero_gradients(framework: Framework):
    case = Case((1, 5, 5, 1), 5)  # one place for a block, which covers the map
    results = [run(framework, *inputs(case.shape), 0.9, case, seed) for seed in range(8)]
    emptied = [not y.any() for y, _ in results]
    assert any(emptied)
    for is_empty, (y, gradient) in zip(emptied, results, strict=True):
        assert np.isfinite(y).all()
        assert gradient.any() != is_empty


@both_frameworks
@pytest.mark.parametrize(
    ("shape", "options", "error", "message"),
    [
        ((2, 5, 5, 3), {"block_size": 0}, ValueError, "block_size must be at least 1; got 0"),
        ((2, 5, 5, 3), {"block_size": 2.5}, TypeError, "integer"),
        ((2, 5, 5, 3), {"gamma_scale": -1.0}, ValueError, "gamma_scale must be at least 0"),
        ((2, 5, 5, 3), {"gamma_scale": np.nan}, ValueError, "gamma_scale must be a finite scalar"),
        ((2, 5, 5, 3), {"gamma_scale": "2"}, TypeError, "gamma_scale must be a real number"),
        ((2, 5, 5, 3), {"with_noise": True, "dtype": np.complex64}, TypeError, "x must be real"),
        ((2, 5, 5, 3), {"channel_axis": 4}, ValueError, "channel_axis .* has 4; got 4"),
        ((2, 5, 5, 3), {"channel_axis": 0}, ValueError, "x must have a batch dimension"),
        ((5, 3), {}, ValueError, r"at least one spatial dimension; got shape \(5, 3\)"),
        ((2, 5, 5, 3), {"rate": 2}, ValueError, r"rate must lie in \[0, 1\]; got 2"),
        ((2, 5, 5, 3), {"key": None}, ValueError, "key must be a random key in training"),
        ((2, 5, 5, 3), {"dtype": np.int32}, TypeError, "x must be floating"),
    ],
)
def test_wrong_arguments_are_refused(framework: Framework, shape, options, error, message):
    options = {"rate": 0.3, "key": framework.key(0), **options}
    x = framework.array(np.ones(shape, options.pop("dtype", np.float32)))
    with pytest.raises(error, match=message):
        framework.library.drop_block(x, **options)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_the_share_of_zeros_and_their_shape(rate):
    """The fraction of zeros in 4000 maps is within 5 sigma (p < 6e-7), and zeros form squares.

    An element is kept if none of the blocks that cover it starts. The variance is that of maps,
    which are independent.
    """
    case = Case((1000, 10, 12, 4), 3)
    y = np.asarray(
        JAX.library.drop_block(np.ones(case.shape, np.float32), rate, block_size=3, key=JAX.key(2))
    )
    down, across = (np.convolve(np.ones(size - 2), np.ones(3)) for size in (10, 12))
    reach = np.outer(down, across)  # the number of blocks that cover an element
    expected = 1 - ((1 - case.gamma(rate)) ** reach).mean()
    shares = (y == 0).mean((1, 2))
    sigma = shares.std() / shares.size**0.5
    assert abs(shares.mean() - expected) < 5 * sigma
    # With the paper's gamma, `rate` blocks cover an element on average.
    assert case.gamma(rate) * reach.mean() == pytest.approx(rate)
    # Planted: a gamma without the correction for the border.
    uncorrected = 1 - ((1 - rate / 9) ** reach).mean()
    assert abs(shares.mean() - uncorrected) > 5 * sigma
    assert y.mean() == pytest.approx(1, abs=1e-5)
    assert all_zeros_lie_in_blocks(y[:50], 3)


def all_zeros_lie_in_blocks(y: np.ndarray, block: int) -> bool:
    """Return whether every zero is in a square of zeros of this size."""
    windows = functools.partial(
        np.lib.stride_tricks.sliding_window_view, window_shape=(block, block), axis=(1, 2)
    )
    starts = windows(y == 0).all((-1, -2))
    around = np.pad(starts, [(0, 0), (block - 1, block - 1), (block - 1, block - 1), (0, 0)])
    return bool((windows(around).any((-1, -2)) == (y == 0)).all())


def test_under_vmap_every_row_has_its_own_scale():
    """Each row is a batch of its own, so the sum of a row of ones does not change."""
    keys = jax.random.split(jax.random.key(0), 5)
    drop = functools.partial(JAX.library.drop_block, rate=0.4, block_size=3)
    rows = jax.vmap(lambda x, key: drop(x[None], key=key)[0])(jnp.ones((5, 8, 8, 3)), keys)
    np.testing.assert_allclose(rows.mean((1, 2, 3)), 1, rtol=1e-5)
    whole = drop(jnp.ones((5, 8, 8, 3)), key=keys[0])
    assert np.ptp(np.asarray(whole).mean((1, 2, 3))) > 0.01
    assert float(whole.mean()) == pytest.approx(1, rel=1e-5)
