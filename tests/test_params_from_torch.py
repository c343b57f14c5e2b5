"""PyTorch parameters in Linen, NNX, Equinox and Haiku give the same outputs, or an error.

One model is ported to four frameworks: the ports are compared side by side, hence in one file.
`test_params_from_torch_errors.py` has the errors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from parity_tests.compare import FLOAT32
from parity_tests.frameworks import from_torch
from regjax._decay.paths import named_leaves
from regjax.interop._leaves import Leaf
from regjax.interop._params import leaves_from_torch, params_from_torch

WORDS, WIDTH, HEADS, LENGTH = 11, 8, 2, 5
KEY = jax.random.key(0)
TOLERANCES = {"float32": FLOAT32.tolerance, "float64": 1e-10}


@pytest.fixture(autouse=True)
def _as_the_frameworks_need_it() -> Iterator[None]:
    """Allow promotion, which the layers of Flax and Equinox require."""
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        torch.random.fork_rng(),
        torch.no_grad(),
    ):
        torch.manual_seed(0)
        yield


def randomized(module: torch.nn.Module, dtype: str = "float32") -> torch.nn.Module:
    """Return the module in evaluation, with no parameter or statistic equal to zero or one."""
    module = module.to(getattr(torch, dtype)).eval()
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) - 0.4)
    for name, tensor in module.named_buffers():
        if name.endswith("running_var"):
            tensor.copy_(torch.rand_like(tensor) + 0.5)
    return module


class Original(torch.nn.Module):
    """A model in which axes that could be confused have the same length."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(WORDS, WIDTH)
        self.attention = torch.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.hidden = torch.nn.Linear(WIDTH, WIDTH)
        self.conv = torch.nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.batch_norm = torch.nn.BatchNorm1d(WIDTH)
        self.out = torch.nn.Linear(WIDTH, 3)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        x = self.embedding(words)
        x = self.norm(x + self.attention(x, x, x)[0])
        x = torch.tanh(self.hidden(x)).transpose(1, 2)
        return self.out(torch.tanh(self.batch_norm(self.conv(x))).mean(2))


class InLinen(nn.Module):
    dtype: Any

    @nn.compact
    def __call__(self, words: jax.Array) -> jax.Array:
        of = {"param_dtype": self.dtype}
        x = nn.Embed(WORDS, WIDTH, **of)(words)
        attended = nn.MultiHeadDotProductAttention(HEADS, deterministic=True, **of)(x)
        x = nn.LayerNorm(1e-5, **of)(x + attended)
        x = jnp.tanh(nn.Dense(WIDTH, **of)(x))
        x = nn.Conv(WIDTH, (3,), **of)(x)
        x = jnp.tanh(nn.BatchNorm(use_running_average=True, **of)(x))
        return nn.Dense(3, **of)(x.mean(1))


class InNNX(nnx.Module):
    def __init__(self, dtype: Any, rngs: nnx.Rngs) -> None:
        of = {"param_dtype": dtype, "rngs": rngs}
        self.embed = nnx.Embed(WORDS, WIDTH, **of)
        # NNX calls jax.nn.dot_product_attention, which computes in float32 internally.
        attend = lambda q, k, v, **_: nn.dot_product_attention(q, k, v, deterministic=True)
        self.attention = nnx.MultiHeadAttention(
            HEADS, WIDTH, decode=False, attention_fn=attend, **of
        )
        self.norm = nnx.LayerNorm(WIDTH, epsilon=1e-5, **of)
        self.hidden = nnx.Linear(WIDTH, WIDTH, **of)
        self.conv = nnx.Conv(WIDTH, WIDTH, (3,), **of)
        self.batch_norm = nnx.BatchNorm(WIDTH, use_running_average=True, **of)
        self.drop = nnx.Dropout(0.5, deterministic=True, rngs=rngs)
        self.out = nnx.Linear(WIDTH, 3, **of)

    def __call__(self, words: jax.Array) -> jax.Array:
        x = self.embed(words)
        x = self.drop(self.norm(x + self.attention(x)))
        x = self.conv(jnp.tanh(self.hidden(x)))
        return self.out(jnp.tanh(self.batch_norm(x)).mean(1))


class InEquinox(eqx.Module):
    embedding: eqx.nn.Embedding
    attention: eqx.nn.MultiheadAttention
    norm: eqx.nn.LayerNorm
    hidden: eqx.nn.Linear
    conv: eqx.nn.Conv1d
    batch_norm: eqx.nn.BatchNorm
    out: eqx.nn.Linear
    activation: Callable[[Any], Any]

    def __init__(self, dtype: Any, mode: Any = "batch") -> None:
        of = {"dtype": dtype, "key": KEY}
        bias = {f"use_{name}_bias": True for name in ("query", "key", "value", "output")}
        self.embedding = eqx.nn.Embedding(WORDS, WIDTH, **of)
        self.attention = eqx.nn.MultiheadAttention(HEADS, WIDTH, **bias, **of)
        self.norm = eqx.nn.LayerNorm(WIDTH, dtype=dtype)
        self.hidden = eqx.nn.Linear(WIDTH, WIDTH, **of)
        self.conv = eqx.nn.Conv1d(WIDTH, WIDTH, 3, padding=1, **of)
        self.batch_norm = eqx.nn.BatchNorm(WIDTH, "batch", momentum=0.9, dtype=dtype, mode=mode)
        self.out = eqx.nn.Linear(WIDTH, 3, **of)
        self.activation = jnp.tanh

    def __call__(self, words: jax.Array, state: Any) -> jax.Array:
        x = jax.vmap(self.embedding)(words)
        x = jax.vmap(self.norm)(x + self.attention(x, x, x))
        x = self.conv(self.activation(jax.vmap(self.hidden)(x)).T)
        x, _ = self.batch_norm(x, state, inference=True)
        return self.out(self.activation(x).mean(1))


@dataclasses.dataclass(frozen=True)
class Port:
    """A model of one framework.

    Attributes:
        params: Returns the tree to fill, for a dtype.
        forward: A function of the filled tree and the words.
        names: The names in PyTorch.
    """

    params: Callable[[str], Any]
    forward: Callable[[Any, Any], jax.Array]
    names: dict[str, str]


def _nnx_forward(state: Any, words: jax.Array) -> jax.Array:
    graph = nnx.graphdef(InNNX(state["hidden"]["kernel"][...].dtype, nnx.Rngs(0)))
    return nnx.merge(graph, state)(words)


def _equinox_forward(model: Any, words: jax.Array) -> jax.Array:
    model, state = eqx.nn.make_with_state(lambda: model)()
    return jax.vmap(model, in_axes=(0, None))(words, state)


TOKENS = np.random.default_rng(0).integers(0, WORDS, (4, LENGTH)).astype(np.int32)
LINEN = Port(
    lambda dtype: jax.eval_shape(InLinen(dtype).init, KEY, TOKENS),
    lambda variables, words: jnp.asarray(InLinen(jnp.float32).apply(variables, words)),
    {
        "Embed_0": "embedding",
        "MultiHeadDotProductAttention_0": "attention",
        "LayerNorm_0": "norm",
        "Dense_0": "hidden",
        "Conv_0": "conv",
        "BatchNorm_0": "batch_norm",
        "Dense_1": "out",
    },
)
PORTS = {
    "linen": LINEN,
    "nnx": Port(
        lambda dtype: nnx.state(InNNX(dtype, nnx.Rngs(0))), _nnx_forward, {"embed": "embedding"}
    ),
    "nnx module": Port(
        lambda dtype: InNNX(dtype, nnx.Rngs(0)),
        lambda model, words: model(words),
        {"embed": "embedding"},
    ),
    "equinox": Port(InEquinox, _equinox_forward, {}),
    "equinox ema": Port(lambda dtype: InEquinox(dtype, "ema"), _equinox_forward, {}),
}


def _cast(leaf: Any, dtype: str) -> Any:
    """Convert the running statistics of Flax, which are float32 for any dtype of parameters."""
    if not hasattr(leaf, "dtype") or leaf.dtype != np.float32:
        return leaf
    return jax.ShapeDtypeStruct(leaf.shape, dtype)


# Every port in float64, where a wrong layout is furthest from rounding, and one in float32.
OUTPUTS = [
    pytest.param(name, dtype, marks=[pytest.mark.slow] * (dtype == "float32" and name != "linen"))
    for name in PORTS
    for dtype in TOLERANCES
]


@pytest.mark.parametrize(("name", "dtype"), OUTPUTS)
@pytest.mark.sample(2)
def test_the_same_outputs(name, dtype):
    port = PORTS[name]
    model = randomized(Original(), dtype)
    with jax.enable_x64(dtype == "float64"):
        params = jax.tree.map(lambda leaf: _cast(leaf, dtype), port.params(dtype))
        filled = params_from_torch(model, params, port.names)
        in_jax = eqx.filter_jit(port.forward)(filled, jnp.asarray(TOKENS))
        assert jax.tree.structure(filled) == jax.tree.structure(params)
    in_torch = from_torch(model(torch.from_numpy(TOKENS)))
    assert in_jax.dtype == in_torch.dtype
    np.testing.assert_allclose(in_jax, in_torch, rtol=0, atol=TOLERANCES[dtype])


# The strides of each axis, by the number of axes.
SIZES = {1: (7,), 2: (5, 6), 3: (4, 3, 5)}
CONVOLUTIONS = [
    (framework, axes, groups)
    for framework, tried in {
        "linen": (1, 2, 3),
        "nnx": (2,),
        "equinox": (1, 2, 3),
        "haiku": (2,),
    }.items()
    for axes in tried
    for groups in (1, 2)
]


def _channels_first(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x, -1, 1)


@pytest.mark.parametrize(("framework", "axes", "groups"), CONVOLUTIONS)
@pytest.mark.sample(3)
def test_convolutions(framework, axes, groups):
    # With two groups, the kernel has as many input channels as elements along its axes.
    channels, size = 4, (2, 3, 2)[:axes]
    model = randomized(getattr(torch.nn, f"Conv{axes}d")(channels, channels, size, groups=groups))
    x = np.random.default_rng(1).standard_normal((2, *SIZES[axes], channels)).astype(np.float32)
    in_torch = model(torch.from_numpy(_channels_first(x))).numpy()
    options = {"feature_group_count": groups, "padding": "VALID"}
    if framework == "equinox":
        layer = getattr(eqx.nn, f"Conv{axes}d")(channels, channels, size, groups=groups, key=KEY)
        in_jax = jax.vmap(params_from_torch(model, layer))(_channels_first(x))
    elif framework == "nnx":
        layer = nnx.Conv(channels, channels, size, **options, rngs=nnx.Rngs(0))
        in_jax = _channels_first(np.asarray(params_from_torch(model, layer)(x)))
    else:
        if framework == "linen":
            layer = nn.Conv(channels, size, **options)
            names = {}
        else:
            layer = hk.without_apply_rng(
                hk.transform(lambda x: hk.Conv2D(channels, size, **options)(x))
            )
            names = {"conv2_d": ""}
        params = params_from_torch(model, jax.eval_shape(layer.init, KEY, x), names)
        in_jax = _channels_first(np.asarray(layer.apply(params, x)))
    np.testing.assert_allclose(in_jax, in_torch, rtol=0, atol=1e-5)


LAYERS = {
    "GroupNorm": (torch.nn.GroupNorm(2, WIDTH), nn.GroupNorm(2, epsilon=1e-5)),
    "RMSNorm": (torch.nn.RMSNorm(WIDTH, eps=1e-6), nn.RMSNorm()),
    "DenseGeneral": (torch.nn.Linear(WIDTH, 6), nn.DenseGeneral((2, 3))),
    "Dense": (torch.nn.Linear(WIDTH, WIDTH), nn.Dense(WIDTH)),
    "Dense without bias": (
        torch.nn.Linear(WIDTH, 2, bias=False),
        nn.Dense(2, use_bias=False),
    ),
}


@pytest.mark.parametrize(("in_torch", "layer"), LAYERS.values(), ids=LAYERS)
def test_layers_of_linen(in_torch, layer):
    x = np.random.default_rng(1).standard_normal((3, WIDTH)).astype(np.float32)
    model = randomized(in_torch)
    params = params_from_torch(model, jax.eval_shape(layer.init, KEY, x))
    in_jax = np.asarray(layer.apply(params, x))
    expected = model(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(in_jax.reshape(expected.shape), expected, rtol=0, atol=1e-5)


def test_haiku():
    def forward(words):
        x = hk.Embed(WORDS, WIDTH)(words)
        mixed = hk.MultiHeadAttention(HEADS, WIDTH // HEADS, w_init=hk.initializers.Constant(1.0))
        x = hk.LayerNorm(-1, create_scale=True, create_offset=True)(x + mixed(x, x, x))
        return hk.Linear(WIDTH)(x)

    class Torch(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(WORDS, WIDTH)
            self.multi_head_attention = torch.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
            self.layer_norm, self.linear = torch.nn.LayerNorm(WIDTH), torch.nn.Linear(WIDTH, WIDTH)

        def forward(self, words):
            x = self.embed(words)
            return self.linear(self.layer_norm(x + self.multi_head_attention(x, x, x)[0]))

    haiku, model = hk.transform(forward), randomized(Torch())
    template = jax.eval_shape(haiku.init, KEY, TOKENS)
    params = params_from_torch(model.state_dict(), template)
    in_torch = model(torch.from_numpy(TOKENS)).numpy()
    np.testing.assert_allclose(haiku.apply(params, None, TOKENS), in_torch, rtol=0, atol=1e-5)


@pytest.mark.parametrize("framework", ["linen", "equinox"])
def test_attention_of_other_widths(framework):
    """PyTorch has three weights in this case, but stacked biases."""
    rng = np.random.default_rng(2)
    q, k, v = (rng.standard_normal((LENGTH, w)).astype(np.float32) for w in (WIDTH, 3, 4))
    model = randomized(torch.nn.MultiheadAttention(WIDTH, HEADS, kdim=3, vdim=4))
    if framework == "linen":
        layer = nn.MultiHeadDotProductAttention(HEADS)
        params = params_from_torch(model, jax.eval_shape(layer.init, KEY, q, k, v))
        in_jax = np.asarray(layer.apply(params, q, k, v))
    else:
        bias = {f"use_{name}_bias": True for name in ("query", "key", "value", "output")}
        sizes = {"query_size": WIDTH, "key_size": 3, "value_size": 4, "output_size": WIDTH}
        layer = eqx.nn.MultiheadAttention(HEADS, **sizes, qk_size=4, vo_size=4, **bias, key=KEY)
        in_jax = params_from_torch(model, layer)(q, k, v)
    in_torch = model(*map(torch.from_numpy, (q, k, v)))[0].numpy()
    np.testing.assert_allclose(in_jax, in_torch, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["ema", "batch"])
def test_statistics_of_equinox_continue_those_of_pytorch(mode):
    model: Any = randomized(torch.nn.BatchNorm1d(WIDTH))
    layer = eqx.nn.BatchNorm(WIDTH, "batch", momentum=0.9, mode=mode)
    filled = params_from_torch(model, layer)
    layer, state = eqx.nn.make_with_state(lambda: filled)()
    x = np.random.default_rng(3).standard_normal((6, WIDTH)).astype(np.float32)
    model.train()(torch.from_numpy(x))
    mapped = {"in_axes": (0, None), "out_axes": (0, None), "axis_name": "batch"}
    _, state = jax.vmap(layer, **mapped)(x, state)
    in_jax, _ = jax.vmap(eqx.nn.inference_mode(layer), **mapped)(x, state)
    # PyTorch uses the sample variance, the layers in JAX the population variance.
    model.running_var -= torch.from_numpy(0.1 * x.var(0) / (len(x) - 1))
    in_torch = model.eval()(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(in_jax, in_torch, rtol=0, atol=1e-5)


def test_transposed_convolution_of_flax_with_a_leaf():
    x = np.random.default_rng(1).standard_normal((2, 5, 6, 4)).astype(np.float32)
    model = randomized(torch.nn.ConvTranspose2d(4, 4, (2, 3), stride=2))
    layer = nn.ConvTranspose(4, (2, 3), (2, 2), padding="VALID", transpose_kernel=True)
    names = {"kernel": Leaf("weight", (2, 3, 1, 0))}
    params = params_from_torch(model, jax.eval_shape(layer.init, KEY, x), names)
    in_torch = model(torch.from_numpy(_channels_first(x))).numpy()
    in_jax = _channels_first(np.asarray(layer.apply(params, x)))
    np.testing.assert_allclose(in_jax, in_torch, rtol=0, atol=1e-5)


@pytest.mark.parametrize("plant", ["transposed", "key for query", "statistics"])
def test_a_planted_defect_is_detected(plant):
    """Test of the test: each defect has valid shapes."""
    model = randomized(Original())
    names: dict[str, Any] = dict(LINEN.names)
    entries = model.state_dict()
    if plant == "transposed":
        names["Dense_0/kernel"] = Leaf("hidden.weight")
    elif plant == "key for query":
        for name in ("attention.in_proj_weight", "attention.in_proj_bias"):
            q, k, v = entries[name].chunk(3)
            entries[name] = torch.cat([q, v, k])
    else:
        names["BatchNorm_0/mean"] = "batch_norm.running_var"
        names["BatchNorm_0/var"] = "batch_norm.running_mean"
    filled = params_from_torch(entries, LINEN.params("float32"), names)
    in_torch = model(torch.from_numpy(TOKENS)).numpy()
    assert not np.abs(LINEN.forward(filled, TOKENS) - in_torch).max() < 1e-2


class Plain(torch.nn.Module):
    """A model with a Leaf for every parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(WORDS, WIDTH)
        self.hidden = torch.nn.Linear(WIDTH, WIDTH)
        self.conv = torch.nn.Conv2d(WIDTH, WIDTH, 3)
        self.batch_norm = torch.nn.BatchNorm2d(WIDTH)


def _plain_linen() -> Any:
    kernel = lambda *shape: np.zeros(shape, np.float32)
    vectors = {"bias": kernel(WIDTH)}
    return {
        "embedding": {"embedding": kernel(WORDS, WIDTH)},
        "hidden": {"kernel": kernel(WIDTH, WIDTH), **vectors},
        "conv": {"kernel": kernel(3, 3, WIDTH, WIDTH), **vectors},
        "batch_norm": {"scale": kernel(WIDTH), **vectors},
    }


def _plain_equinox() -> Any:
    return {
        "embedding": eqx.nn.Embedding(WORDS, WIDTH, key=KEY),
        "hidden": eqx.nn.Linear(WIDTH, WIDTH, key=KEY),
        "conv": eqx.nn.Conv2d(WIDTH, WIDTH, 3, key=KEY),
        "batch_norm": eqx.nn.LayerNorm(WIDTH),
    }


@pytest.mark.parametrize("make", [_plain_linen, _plain_equinox], ids=["linen", "equinox"])
def test_leaves_convert_moments(make):
    model, params = randomized(Plain()), make()
    parameters = {name: tensor.numpy() for name, tensor in model.named_parameters()}
    statistics = ("batch_norm.running_mean", "batch_norm.running_var")
    entries = {name: t for name, t in model.state_dict().items() if name not in statistics}
    leaves = leaves_from_torch(model, params)
    filled = dict(named_leaves(eqx.filter(params_from_torch(entries, params), eqx.is_array)))
    assert leaves.keys() == filled.keys()
    assert {leaf.name for leaf in leaves.values()} == parameters.keys()
    for path, leaf in leaves.items():
        there = leaf.to_jax(parameters[leaf.name])
        np.testing.assert_array_equal(there, filled[path])
        np.testing.assert_array_equal(leaf.to_torch(there), parameters[leaf.name])


def test_leaves_are_plain_if_axes_are_only_permuted():
    leaves = leaves_from_torch(Plain(), _plain_linen())
    assert leaves["hidden/kernel"] == Leaf("hidden.weight", (1, 0))
    assert leaves["conv/kernel"] == Leaf("conv.weight", (2, 3, 1, 0))
    assert leaves["conv/bias"] == Leaf("conv.bias")


def test_an_unfolded_leaf_converts_in_both_directions():
    weight = np.arange(24, dtype=np.float32).reshape(6, 4)
    params = {"kernel": np.zeros((4, 2, 3), np.float32)}
    leaf = leaves_from_torch({"weight": weight}, params)["kernel"]
    np.testing.assert_array_equal(leaf.to_jax(weight), weight.T.reshape(4, 2, 3))
    np.testing.assert_array_equal(leaf.to_torch(leaf.to_jax(weight)), weight)


def test_two_leaves_of_one_tensor_have_no_leaf():
    entries = {"a.weight": np.zeros((2, 2), np.float32)}
    params = {name: {"kernel": np.zeros((2, 2), np.float32)} for name in ("a", "b")}
    assert params_from_torch(entries, params, {"b": "a"})["b"]["kernel"].shape == (2, 2)
    message = "'a/kernel', 'b/kernel' must not share a tensor; got 'a.weight' for each"
    with pytest.raises(ValueError, match=message):
        leaves_from_torch(entries, params, {"b": "a"})


def test_fused_attention_has_a_leaf_for_each_part():
    leaves = leaves_from_torch(Original(), LINEN.params("float32"), LINEN.names)
    sections = {path.split("/")[-2]: leaf.section for path, leaf in leaves.items() if leaf.section}
    assert sections == {
        name: (WIDTH * index, WIDTH * (index + 1))
        for index, name in enumerate(("query", "key", "value"))
    }


def test_no_memory_is_shared():
    model = torch.nn.Linear(2, 2)
    layer = eqx.nn.Linear(2, 2, key=KEY)
    filled = params_from_torch(model, layer)
    before = np.array(filled.weight)
    model.weight.add_(1.0)
    np.testing.assert_array_equal(filled.weight, before)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn"])
def test_small_types(dtype):
    model = torch.nn.Linear(4, 4, bias=False).to(getattr(torch, dtype))
    params = {"kernel": jax.ShapeDtypeStruct((4, 4), getattr(jnp, dtype))}
    filled = params_from_torch(model, params)["kernel"]
    assert filled.dtype == dtype
    np.testing.assert_array_equal(np.asarray(filled), from_torch(model.weight).T)


def test_other_leaves_are_unchanged():
    model = randomized(torch.nn.Linear(2, 2))
    params = {
        "weight": np.zeros((2, 2), np.float32),
        "bias": np.zeros(2, np.float32),
        "activation": jnp.tanh,
        "rate": 0.5,
        "none": None,
        "rngs": {"key": jax.random.key(3), "count": jnp.uint32(7)},
    }
    filled = params_from_torch(model, params)
    assert filled["activation"] is jnp.tanh
    assert (filled["rate"], filled["none"], int(filled["rngs"]["count"])) == (0.5, None, 7)
    assert filled["rngs"]["key"] == params["rngs"]["key"]


def test_names_of_a_wrapped_model():
    wrapped = {"module.fc.weight": np.ones((3, 2), "f"), "module.fc.bias": np.zeros(3, "f")}
    layer = {"kernel": np.zeros((2, 3), "f"), "bias": np.zeros(3, "f")}
    filled = params_from_torch(wrapped, {"params": {"fc": layer}}, {"": "module"})
    np.testing.assert_array_equal(filled["params"]["fc"]["kernel"], np.ones((2, 3)))
