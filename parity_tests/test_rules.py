"""Decay rules are the same in both packages: the same leaves decay, and training runs agree."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch import nn

import regjax
import regtorch
from parity_tests.compare import FLOAT64, assert_same_at_every_step, deviation
from parity_tests.trajectories import Run
from regjax._decay.paths import named_leaves

STEPS = 20
LR = 0.01
WEIGHT_DECAY = 0.1
# The gradients of a bias before a batch norm and of the bias of attention keys are rounding errors,
# which Adam would amplify with its default eps of 1e-8.
EPS = 1e-3
RNG = np.random.default_rng(0)


@dataclass(frozen=True)
class Model:
    """One model in both frameworks.

    Attributes:
        module: Returns the PyTorch module.
        forward: The same in JAX, a function of parameters and a batch.
        names: The PyTorch name of each path of the JAX parameters; several may share a packed one.
        batch: The input.
        decaying: The paths that must decay.
    """

    module: Callable[[], nn.Module]
    forward: Callable[[Any, Any], jax.Array]
    names: Mapping[str, str]
    batch: np.ndarray
    decaying: frozenset[str]

    def to_jax(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {path: _layout(path, arrays[name]) for path, name in self.names.items()}


def _layout(path: str, array: np.ndarray) -> np.ndarray:
    """Convert a PyTorch array to the layout of the JAX path."""
    parts = [i for i, part in enumerate(("/query/", "/key/", "/value/")) if part in path]
    if parts:  # packed in torch
        array = np.split(array, 3)[parts[0]]
    if path.endswith("kernel"):
        return array.transpose(*range(2, array.ndim), 1, 0)
    return array


def _nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = jnp.asarray(leaf)
    return tree


def _row(vector: jax.Array, like: jax.Array) -> jax.Array:
    return vector.reshape(*[1] * (like.ndim - 1), -1)


def _dense(layer: Any, x: jax.Array) -> jax.Array:
    return x @ layer["kernel"] + _row(layer["bias"], x)


def _normed(layer: Any, x: jax.Array, axis: int | tuple[int, ...]) -> jax.Array:
    x = jax.nn.standardize(x, axis=axis, epsilon=1e-5)
    return x * _row(layer["scale"], x) + _row(layer["bias"], x)


class _Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.out = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(nn.functional.silu(self.bn(self.conv(x[:, None]))).mean((2, 3)))


def _convolutional(params: Any, x: jax.Array) -> jax.Array:
    layer = params["Conv_0"]
    dimensions = ("NHWC", "HWIO", "NHWC")
    x = jax.lax.conv_general_dilated(
        x[..., None], layer["kernel"], (1, 1), "SAME", dimension_numbers=dimensions
    )
    x = _normed(params["BatchNorm_0"], x + _row(layer["bias"], x), (0, 1, 2))
    return _dense(params["Dense_0"], jax.nn.silu(x).mean((1, 2)))


class _Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.cls_token = nn.Embedding(7, 8), nn.Parameter(torch.randn(1, 1, 8))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True) for _ in range(2)
        )
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens.long())
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x)[:, 0])


def _attention(layer: Any, x: jax.Array) -> jax.Array:
    q, k, v = (
        _dense(layer[name], x).reshape(*x.shape[:2], 2, -1) for name in ("query", "key", "value")
    )
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5)
    return _dense(layer["out"], jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape))


def _encoder(params: Any, tokens: jax.Array) -> jax.Array:
    x = params["tokens"]["embedding"][tokens]
    x = jnp.concatenate([jnp.repeat(params["cls_token"], len(x), 0), x], 1)
    for layer in params["layers"].values():
        x = _normed(layer["norm1"], x + _attention(layer["attention"], x), -1)
        hidden = jax.nn.relu(_dense(layer["up"], x))
        x = _normed(layer["norm2"], x + _dense(layer["down"], hidden), -1)
    return _dense(params["head"], _normed(params["norm"], x, -1)[:, 0])


def _pair(path: str, name: str, weight: str = "kernel") -> dict[str, str]:
    return {f"{path}/{weight}": f"{name}.weight", f"{path}/bias": f"{name}.bias"}


def _encoder_names() -> Iterator[tuple[str, str]]:
    yield from {"tokens/embedding": "tokens.weight", "cls_token": "cls_token"}.items()
    yield from (_pair("norm", "norm", "scale") | _pair("head", "head")).items()
    for path, name in (("layers/0", "layers.0"), ("layers/1", "layers.1")):
        for in_jax, in_torch in {"up": "linear1", "down": "linear2"}.items():
            yield from _pair(f"{path}/{in_jax}", f"{name}.{in_torch}").items()
        yield from _pair(f"{path}/attention/out", f"{name}.self_attn.out_proj").items()
        for part in ("query", "key", "value"):
            yield f"{path}/attention/{part}/kernel", f"{name}.self_attn.in_proj_weight"
            yield f"{path}/attention/{part}/bias", f"{name}.self_attn.in_proj_bias"
        for norm in ("norm1", "norm2"):
            yield from _pair(f"{path}/{norm}", f"{name}.{norm}", "scale").items()


MODELS = {
    "mlp": Model(
        module=lambda: nn.Sequential(nn.Linear(5, 8), nn.SiLU(), nn.Linear(8, 3)),
        forward=lambda params, x: _dense(
            params["Dense_1"], jax.nn.silu(_dense(params["Dense_0"], x))
        ),
        names=_pair("Dense_0", "0") | _pair("Dense_1", "2"),
        batch=RNG.standard_normal((16, 5)),
        decaying=frozenset({"Dense_0/kernel", "Dense_1/kernel"}),
    ),
    "cnn": Model(
        module=_Convolutional,
        forward=_convolutional,
        names=_pair("Conv_0", "conv")
        | _pair("BatchNorm_0", "bn", "scale")
        | _pair("Dense_0", "out"),
        batch=RNG.standard_normal((16, 6, 6)),
        decaying=frozenset({"Conv_0/kernel", "Dense_0/kernel"}),
    ),
    "encoder": Model(
        module=_Encoder,
        forward=_encoder,
        names=dict(_encoder_names()),
        batch=RNG.integers(0, 7, (16, 5)),
        decaying=frozenset(
            f"layers/{layer}/{name}/kernel"
            for layer in (0, 1)
            for name in (
                "attention/query",
                "attention/key",
                "attention/value",
                "attention/out",
                "up",
                "down",
            )
        )
        | {"head/kernel"},
    ),
}
LABELS = RNG.integers(0, 3, 16)
# The same rules in both frameworks, with names that both have.
PAIRS = [("head/bias", 0.5), ("norm*/**", 0.25), ("**/norm*/*", True), ("**", "default")]


def _make(model: Model) -> nn.Module:
    torch.manual_seed(0)
    module = model.module().double()
    with torch.no_grad():
        # Zeros and ones would hide whether a bias or a scale decays.
        for parameter in module.parameters():
            parameter.add_(torch.rand_like(parameter))
    return module


def _arrays(module: nn.Module) -> dict[str, np.ndarray]:
    return {name: p.detach().numpy().copy() for name, p in module.named_parameters()}


def _torch_run(model: Model, groups: Callable[[nn.Module], Any]) -> Run:
    module, run = _make(model), []
    optimizer = torch.optim.AdamW(groups(module), lr=LR, eps=EPS)
    batch, labels = torch.tensor(model.batch), torch.tensor(LABELS)
    for _ in range(STEPS):
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(batch), labels).backward()
        optimizer.step()
        run.append(model.to_jax(_arrays(module)))
    return run


def _jax_run(model: Model, make: Callable[[Any], optax.GradientTransformation]) -> Run:
    with jax.enable_x64(True):
        params = _nested(model.to_jax(_arrays(_make(model))))
        optimizer = make(params)
        batch, labels = jnp.asarray(model.batch), jnp.asarray(LABELS)

        def loss(params: Any) -> jax.Array:
            logits = jax.nn.log_softmax(model.forward(params, batch))
            return -jnp.take_along_axis(logits, labels[:, None], axis=1).mean()

        def train_step(carry: Any, _: None) -> Any:
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), params

        walk = jax.jit(lambda carry: jax.lax.scan(train_step, carry, None, length=STEPS))
        _, visited = walk((params, optimizer.init(params)))
        leaves = {name: np.asarray(leaf) for name, leaf in named_leaves(visited)}
    return [{name: leaf[step] for name, leaf in leaves.items()} for step in range(STEPS)]


def _adamw(mask: Any) -> optax.GradientTransformation:
    return regjax.optim.adamw(LR, eps=EPS, weight_decay=WEIGHT_DECAY, mask=mask)


def _by_leaf(rates: Any) -> optax.GradientTransformation:
    return optax.chain(
        regjax.optim.adam(1.0, eps=EPS),
        optax.scale(-1.0),
        regjax.optim.add_decay_by_leaf(rates),
        optax.scale_by_learning_rate(LR),
    )


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]


@pytest.mark.parametrize(
    "rule",
    [
        "default",
        "*bias",
        lambda path, leaf, kind: kind == "norm" or path.endswith("bias") or len(leaf.shape) > 1,
    ],
    ids=["default", "glob", "function"],
)
def test_the_same_leaves_decay(model, rule):
    module = _make(model)
    params = _nested(model.to_jax(_arrays(module)))
    in_jax = dict(named_leaves(regjax.decay_mask(params, rule)))
    in_torch = regtorch.decay_mask(module, rule)
    assert set(in_torch) == set(model.names.values())
    assert in_jax == {path: in_torch[name] for path, name in model.names.items()}
    grouped = {
        name: group["weight_decay"]
        for group in regtorch.decay_groups(module, WEIGHT_DECAY, rule)
        for name, _ in group["params"]
    }
    assert in_jax == {path: grouped[name] > 0 for path, name in model.names.items()}
    if rule == "default":
        assert {path for path, decays in in_jax.items() if decays} == model.decaying


def test_tables_agree(model):
    module = _make(model)
    in_jax = regjax.decay_table(_nested(model.to_jax(_arrays(module))), WEIGHT_DECAY)
    in_torch = regtorch.decay_table(module, WEIGHT_DECAY)
    assert in_jax.decaying.parameters == in_torch.decaying.parameters
    assert in_jax.exempt.parameters == in_torch.exempt.parameters
    reasons = {row.path: (row.rule, row.weight_decay) for row in in_torch}
    # A packed projection has one row in PyTorch and three in JAX.
    assert {row.path: (row.rule, row.weight_decay) for row in in_jax} == {
        path: reasons[name] for path, name in model.names.items()
    }


@pytest.mark.sample(1)
def test_training_agrees(model):
    in_jax = _jax_run(model, lambda params: _adamw(regjax.decay_mask(params)))
    in_torch = _torch_run(model, lambda module: regtorch.decay_groups(module, WEIGHT_DECAY))
    assert_same_at_every_step(in_jax, in_torch, FLOAT64, names=("JAX", "PyTorch"))


def test_training_agrees_with_a_rate_for_each_leaf():
    model = MODELS["encoder"]
    in_jax = _jax_run(
        model, lambda params: _by_leaf(regjax.decay_rates(params, WEIGHT_DECAY, PAIRS))
    )
    in_torch = _torch_run(model, lambda module: regtorch.decay_groups(module, WEIGHT_DECAY, PAIRS))
    assert_same_at_every_step(in_jax, in_torch, FLOAT64, names=("JAX", "PyTorch"))


# Common wrong rules.
DEFECTS: dict[str, Callable[[str, Any, str], bool]] = {
    "everything": lambda path, leaf, kind: True,
    "scales": lambda path, leaf, kind: not path.endswith("bias"),
    "inverted": lambda path, leaf, kind: path.endswith("bias"),
}


@pytest.mark.parametrize("defect", DEFECTS)
@pytest.mark.sample(2)
def test_a_wrong_rule_is_caught(defect):
    """Test of the test."""
    model = MODELS["cnn"]
    in_jax = _jax_run(model, lambda params: _adamw(regjax.decay_mask(params, DEFECTS[defect])))
    in_torch = _torch_run(model, lambda module: regtorch.decay_groups(module, WEIGHT_DECAY))
    assert deviation(in_jax, in_torch) > 1e-3
    with pytest.raises(AssertionError, match="diverge at step 1"):
        assert_same_at_every_step(in_jax, in_torch, FLOAT64)


def test_frozen_layers_agree():
    model = MODELS["encoder"]

    def freeze(module: nn.Module) -> Any:
        module.get_submodule("layers.0").requires_grad_(False)
        return regtorch.decay_groups(module, WEIGHT_DECAY)

    def frozen(params: Any) -> optax.GradientTransformation:
        mask = regjax.decay_mask(params, frozen="layers/0/**")
        still = {**dict.fromkeys(params, False), "layers": {"0": True, "1": False}}
        return optax.chain(optax.masked(optax.set_to_zero(), still), _adamw(mask))

    assert_same_at_every_step(_jax_run(model, frozen), _torch_run(model, freeze), FLOAT64)
