"""Monte Carlo dropout: the same passes and statistics in both frameworks and NumPy."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import regjax
import regtorch
from parity_tests.frameworks import JAX, TORCH, Framework
from parity_tests.tables import both_frameworks

KINDS = ("logits", "probabilities", "values")
FIELDS = ("mean", "std", "entropy", "expected_entropy", "mutual_information", "samples")
SAMPLES = 13
# Relative to the largest entry. In float32 matrix products round differently in each framework.
BOUNDS = {np.dtype(np.float64): 1e-12, np.dtype(np.float32): 2e-6}


def sizes(dtype: np.dtype) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return images, and the weights, biases and running averages of a network."""
    rng = np.random.default_rng(0)
    shapes = {"w0": (6, 16), "b0": (16,), "mean": (16,), "w1": (16, 4), "b1": (4,)}
    params = {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}
    params["var"] = rng.uniform(0.5, 2, 16).astype(dtype)
    return rng.normal(size=(5, 6)).astype(dtype), params


def in_jax(params: Any, x: Any, *, key: Any, kind: str, shared: bool = False) -> Any:
    """Apply the network with running averages, and dropout before and after the norm."""
    root = jax.random.key(0) if shared else key
    y = x @ params["w0"] + params["b0"][None]
    y = regjax.dropout(y, 0.3, key=regjax.site_key(root, 0, "1"))
    y = (y - params["mean"][None]) * jax.lax.rsqrt(params["var"] + 1e-5)[None]
    y = regjax.dropout(jax.nn.relu(y), 0.5, key=regjax.site_key(root, 0, "4"))
    y = y @ params["w1"] + params["b1"][None]
    return jax.nn.softmax(y) if kind == "probabilities" else y


def in_torch(params: dict[str, np.ndarray], kind: str) -> torch.nn.Module:
    """Return the same network as a model in training mode."""
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 16),
        torch.nn.Dropout(0.3),
        torch.nn.BatchNorm1d(16),
        torch.nn.ReLU(),
        torch.nn.Dropout(0.5),
        torch.nn.Linear(16, 4),
        torch.nn.Softmax(-1) if kind == "probabilities" else torch.nn.Identity(),
    ).to(TORCH.array(params["w0"]).dtype)
    names = {"0.bias": "b0", "2.running_mean": "mean", "2.running_var": "var", "5.bias": "b1"}
    state = {name: TORCH.array(params[key]) for name, key in names.items()}
    kernels = {"0.weight": "w0", "5.weight": "w1"}
    state |= {name: TORCH.array(params[key].T) for name, key in kernels.items()}
    model.load_state_dict(state, strict=False)
    return regtorch.keyed.convert(model)


def predictions(dtype: np.dtype, kind: str, chunk_size: int | None) -> tuple[Any, Any]:
    """Return the predictions of both frameworks, as NumPy arrays."""
    x, params = sizes(dtype)
    options = {"outputs": kind, "samples": SAMPLES, "keep_samples": True}
    predict = functools.partial(in_jax, kind=kind)
    of_jax = regjax.mc_dropout(predict, params, x, key=JAX.key(7), chunk_size=chunk_size, **options)
    model = in_torch(params, kind)
    of_torch = regtorch.mc_dropout(model, TORCH.array(x), key=TORCH.key(7), **options)
    return as_numpy(JAX, of_jax), as_numpy(TORCH, of_torch)


def as_numpy(framework: Framework, prediction: Any) -> dict[str, np.ndarray | None]:
    fields = {name: getattr(prediction, name) for name in FIELDS}
    return {name: None if v is None else framework.numpy(v) for name, v in fields.items()}


def in_numpy(samples: np.ndarray, kind: str) -> dict[str, np.ndarray | None]:
    """Return the reference, computed in double from all passes."""
    y = samples.astype(np.float64)
    if kind == "logits":
        y = np.exp(y - y.max(-1, keepdims=True))
        y /= y.sum(-1, keepdims=True)
    whole = {"mean": y.mean(0), "std": y.std(0), "samples": samples}
    if kind == "values":
        return whole | dict.fromkeys(("entropy", "expected_entropy", "mutual_information"))
    entropy, expected = -(y.mean(0) * np.log(y.mean(0))).sum(-1), -(y * np.log(y)).sum(-1).mean(0)
    more = {"entropy": entropy, "expected_entropy": expected}
    return whole | more | {"mutual_information": entropy - expected}


def assert_close(one: dict[str, Any], other: dict[str, Any], bound: float) -> None:
    assert one.keys() == other.keys() == set(FIELDS)
    for name, array in one.items():
        twin = other[name]
        assert (array is None) == (twin is None), name
        if array is not None:
            assert array.shape == twin.shape, name
            assert np.abs(array - twin).max() <= bound * max(1, np.abs(twin).max()), name


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [*((kind, np.dtype(np.float64)) for kind in KINDS), ("logits", np.dtype(np.float32))],
    ids=str,
)
@pytest.mark.sample(2)
def test_the_frameworks_agree_with_each_other_and_with_numpy(kind, dtype):
    with jax.enable_x64(dtype.itemsize == 8):
        # 13 passes in chunks of 4 are three chunks and one pass.
        for chunk_size in (4, None) if kind == "logits" else (4,):
            of_jax, of_torch = predictions(dtype, kind, chunk_size)
            assert of_jax["std"].max() > 0.1
            assert of_jax["mean"].dtype == of_torch["mean"].dtype == dtype
            assert_close(of_jax, of_torch, BOUNDS[dtype])
            assert_close(of_jax, in_numpy(of_jax["samples"], kind), BOUNDS[dtype])


def shares_one_key(params: Any, x: Any, *, key: Any) -> Any:
    return in_jax(params, x, key=key, kind="logits", shared=True)


def test_passes_that_share_a_key_are_an_error():
    x, params = sizes(np.dtype(np.float32))
    with pytest.raises(ValueError, match=r"^predict must depend on its key"):
        regjax.mc_dropout(shares_one_key, params, x, key=JAX.key(7), outputs="logits")
    fixed = lambda x, *, key: regtorch.dropout(x, 0.5, key=TORCH.key(7))
    with pytest.raises(ValueError, match=r"^predict must depend on its key"):
        regtorch.mc_dropout(fixed, TORCH.array(x), key=TORCH.key(0), outputs="values")


def test_a_norm_in_training_mode_gives_another_prediction():
    """Test of the previous tests, which would detect statistics of the batch."""
    x, params = sizes(np.dtype(np.float32))
    model, options = in_torch(params, "logits"), {"key": TORCH.key(7), "outputs": "logits"}
    right = regtorch.mc_dropout(model, TORCH.array(x), **options)

    def wrong(x: torch.Tensor, *, key: torch.Tensor) -> torch.Tensor:
        regtorch.keyed.set_key(model.train(), key, 0)
        return model(x)

    y = regtorch.mc_dropout(wrong, TORCH.array(x), **options)
    assert (y.mean - right.mean).abs().max() > 0.01


def noise(
    framework: Framework, shape: tuple[int, ...], scale: float = 1.0, shift: float = 0.0
) -> Any:
    """Return a pass whose output is a mask with values 0 and 2, scaled and shifted."""
    ones = np.ones(shape, np.float32)
    return lambda *, key: (
        framework.library.dropout(framework.array(ones), 0.5, key=key) * scale + shift
    )


def run(framework: Framework, predict: Any, **options: Any) -> Any:
    options = {"key": framework.key(3), "outputs": "values", "samples": 10} | options
    return framework.library.mc_dropout(predict, **options)


def test_masks_do_not_depend_on_chunks_or_the_number_of_passes():
    keys = [regtorch.site_key(TORCH.key(3), i, "mc_dropout") for i in range(10)]
    masks = np.stack([2.0 * TORCH.numpy(regtorch.bernoulli(key, 0.5, (4, 9))) for key in keys])
    torch_samples = run(TORCH, noise(TORCH, (4, 9)), keep_samples=True).samples
    np.testing.assert_array_equal(TORCH.numpy(torch_samples), masks)
    for options in ({"chunk_size": 1}, {"chunk_size": 3}, {"samples": 4}):
        samples = run(JAX, noise(JAX, (4, 9)), keep_samples=True, **options).samples
        np.testing.assert_array_equal(samples, masks[: options.get("samples")])


@both_frameworks
def test_the_deviation_of_nearly_equal_values_is_accurate(framework: Framework):
    """Values near 1,000 that differ by 1e-3; a sum of squares in float32 would lose all digits."""
    scale, shift, n = 2.0**-11, 1000.0, 500
    y = run(framework, noise(framework, (50,), scale, shift), samples=n, keep_samples=True)
    exact = framework.numpy(y.samples).astype(np.float64)
    assert set(np.unique(exact)) == {shift, shift + 2 * scale}
    np.testing.assert_allclose(framework.numpy(y.std), exact.std(0), rtol=1e-5)
    np.testing.assert_allclose(framework.numpy(y.mean), exact.mean(0), rtol=1e-7)
    rounded = exact.astype(np.float32)
    naive = np.square(rounded).mean(0) - np.square(rounded.mean(0))
    assert np.abs(naive - exact.var(0)).max() > exact.var(0).max()


@both_frameworks
def test_half_types_are_summed_in_single(framework: Framework):
    def half(*, key: Any) -> Any:
        y = noise(framework, (3, 5))(key=key)
        return y.astype(jnp.bfloat16) if framework is JAX else y.bfloat16()

    y = run(framework, half, outputs="logits", keep_samples=True)
    assert framework.numpy(y.mean).dtype == np.float32
    assert str(y.samples.dtype).endswith("bfloat16")
    np.testing.assert_allclose(framework.numpy(y.mean).sum(-1), 1, rtol=1e-6)


@both_frameworks
def test_mutual_information_of_passes_that_disagree(framework: Framework):
    """The entropy of passes that contradict each other is mutual information alone."""

    def contradict(*, key: Any) -> Any:
        one = noise(framework, (200, 1), 500.0)(key=key)
        zero = one * 0 + 500
        return jnp.concatenate([one, zero], 1) if framework is JAX else torch.cat([one, zero], 1)

    y = run(framework, contradict, outputs="logits", samples=64)
    np.testing.assert_allclose(framework.numpy(y.expected_entropy), 0, atol=1e-6)
    np.testing.assert_array_equal(framework.numpy(y.mutual_information), framework.numpy(y.entropy))
    # Fewer than 12 of 64 fair coins show one side with probability 3e-8, here for each of 200.
    assert framework.numpy(y.entropy).min() > -(12 / 64) * np.log(12 / 64) - (52 / 64) * np.log(
        52 / 64
    )
    one_pass = run(framework, contradict, outputs="logits", samples=1)
    assert not framework.numpy(one_pass.std).any()
    assert not framework.numpy(one_pass.mutual_information).any()


@both_frameworks
@pytest.mark.parametrize("axis", [1, -3])
def test_classes_may_be_any_axis(framework: Framework, axis):
    y = run(framework, noise(framework, (2, 4, 3, 5)), outputs="logits", class_axis=axis)
    assert y.mean.shape == (2, 4, 3, 5)
    assert y.entropy.shape == (2, 3, 5)
    np.testing.assert_allclose(framework.numpy(y.mean).sum(1), 1, rtol=1e-6)


CORNERS = [
    ({"samples": 0}, ValueError, "samples must be at least 1; got 0"),
    ({"samples": True}, TypeError, "samples must be an integer; got True"),
    ({"samples": 1.5}, TypeError, "samples must be an integer"),
    ({"outputs": "softmax"}, ValueError, 'outputs must be "logits", "probabilities" or "values"'),
    ({"outputs": "probabilities"}, ValueError, "sum 1 along class_axis=-1"),
    ({"outputs": "logits", "class_axis": 2}, ValueError, "class_axis must be a dimension"),
    ({"outputs": "logits", "class_axis": 1}, ValueError, "at least two classes"),
    ({"key": None}, TypeError, "key must be a"),
    ({"key": "batch"}, ValueError, "got a batch of keys"),
]


@both_frameworks
@pytest.mark.parametrize(
    ("options", "error", "message"), CORNERS, ids=[message for *_, message in CORNERS]
)
def test_wrong_arguments_are_rejected(framework: Framework, options, error, message):
    if options.get("key") == "batch":
        split = jax.random.split if framework is JAX else regtorch.split
        options = {"key": split(framework.key(0), 3)}
    with pytest.raises(error, match=message):
        run(
            framework,
            noise(framework, (2, 1) if options.get("class_axis") == 1 else (2, 3)),
            **options,
        )


def several(framework: Framework) -> Any:
    return lambda *, key: (noise(framework, (2, 3))(key=key),) * 2


def classes(framework: Framework) -> Any:
    return lambda *, key: noise(framework, (2, 3))(key=key).argmax(-1)


@both_frameworks
@pytest.mark.parametrize("make", [several, classes])
def test_a_pass_returns_one_floating_array(framework: Framework, make):
    with pytest.raises(TypeError, match="predict must return one floating"):
        run(framework, make(framework), outputs="logits")


@both_frameworks
def test_negative_probabilities_are_rejected(framework: Framework):
    def negative(*, key: Any) -> Any:
        y = noise(framework, (2, 1))(key=key)
        pair = (y, 1 - y)
        return jnp.concatenate(pair, 1) if framework is JAX else torch.cat(pair, 1)

    with pytest.raises(ValueError, match="predict must return probabilities, at least 0"):
        run(framework, negative, outputs="probabilities")


@both_frameworks
def test_mutual_information_is_never_negative(framework: Framework):
    """For nearly equal passes the difference of entropies is rounding, of either sign."""
    x = np.random.default_rng(0).normal(size=(500, 4)).astype(np.float32)
    x, small = framework.array(x), framework.array(np.full((500, 4), 1e-6, np.float32))

    def predict(x: Any, *, key: Any) -> Any:
        return x + framework.library.dropout(small, 0.5, key=key)

    y = framework.library.mc_dropout(predict, x, key=framework.key(0), outputs="logits", samples=4)
    entropy, expected, mutual = map(
        framework.numpy, (y.entropy, y.expected_entropy, y.mutual_information)
    )
    assert (entropy - expected).min() < 0
    assert mutual.min() == 0


# Uses of the key of a pass, and whether the outputs depend on it.
KEY_USES = {
    "dropped": (lambda framework, x, key: framework.library.dropout(x, 0.5, key=key), True),
    "site": (
        lambda framework, x, key: framework.library.dropout(
            x, 0.5, key=framework.library.site_key(key, 0, "a")
        ),
        True,
    ),
    "evaluation": (
        lambda framework, x, key: framework.library.dropout(x, 0.5, key=key, deterministic=True),
        False,
    ),
    "rate 0": (lambda framework, x, key: framework.library.dropout(x, 0.0, key=key), False),
    "rate 1": (lambda framework, x, key: framework.library.dropout(x, 1.0, key=key), False),
    "unused": (lambda framework, x, key: x * 2, False),
    "another key": (
        lambda framework, x, key: framework.library.dropout(x, 0.5, key=framework.key(7)),
        False,
    ),
}


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize(("use", "depends"), KEY_USES.values(), ids=KEY_USES)
@both_frameworks
def test_a_predict_that_ignores_its_key_is_rejected(framework: Framework, use, depends, samples):
    def predict(x, *, key):
        return use(framework, x, key)

    x = framework.array(np.ones((4, 8), np.float32))
    options: Any = {"key": framework.key(0), "outputs": "values", "samples": samples}
    if depends:
        assert bool((framework.library.mc_dropout(predict, x, **options).std > 0).any()) == (
            samples > 1
        )
        return
    with pytest.raises(ValueError, match=r"^predict must depend on its key"):
        framework.library.mc_dropout(predict, x, **options)


@both_frameworks
def test_an_empty_batch_has_an_empty_prediction(framework: Framework):
    def predict(x, *, key):
        return framework.library.dropout(x, 0.5, key=key)

    x = framework.array(np.ones((0, 8), np.float32))
    y = framework.library.mc_dropout(predict, x, key=framework.key(0), outputs="logits", samples=2)
    assert tuple(y.mean.shape) == (0, 8)
