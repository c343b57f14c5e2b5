"""The scripts of `parity_tests.torch_scripts` in JAX, from the seed alone and without PyTorch."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

import regjax.optim
from regjax import torch_random
from regjax.torch_random import Layer, TorchGenerator

BATCH, EPOCHS, CLASSES, WORDS = 8, 2, 3, 20
# PyTorch's attention in an encoder layer returns a transpose of (sequence, batch, features).
SEQUENCE_FIRST = (1, 0, 2)

Params = dict[str, jax.Array]
Drawn = tuple[jax.Array, TorchGenerator]
Forward = Callable[[Params, jax.Array, TorchGenerator], Drawn]


@dataclasses.dataclass(frozen=True, eq=False)
class Port:
    """A script in JAX.

    Attributes:
        forward: Compute the logits of a batch, and the next state of the generator.
        structure: The layers, in the order in which the script constructs them.
        optimizer: The script's.
        tolerance: The largest accepted difference of losses and parameters.
        dtype: The dtype to which the parameters and the inputs are converted.
        evaluations: The loops over another DataLoader after each epoch.
    """

    forward: Forward
    structure: dict[str, Any]
    optimizer: optax.GradientTransformation
    tolerance: float = 1e-6
    dtype: Any = jnp.float32
    evaluations: int = 0

    @functools.cached_property
    def step(self) -> Callable[..., Any]:
        """The compiled training step."""

        def loss(params: Params, x: jax.Array, y: jax.Array, g: TorchGenerator) -> Drawn:
            logits, g = self.forward(params, x, g)
            logits = logits.astype(jnp.float32)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), g

        @jax.jit
        def step(params, state, g, x, y):
            x = x.astype(self.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
            (value, g), grads = jax.value_and_grad(loss, has_aux=True)(params, x, y, g)
            updates, state = self.optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state, g, value

        return step


def run(port: Port, seed: int, inputs: Any, labels: Any) -> Iterator[Any]:
    """Yield the initial parameters; then loss, parameters and generator of each step."""
    params, g = torch_random.init_like(port.structure, torch_random.generator(seed))
    params = {name: value.astype(port.dtype) for name, value in params.items()}
    yield params
    state = port.optimizer.init(params)
    for _ in range(EPOCHS):
        batches, g = torch_random.shuffled_batches(g, len(labels), BATCH)
        for number, batch in enumerate(batches, 1):
            params, state, g, loss = port.step(params, state, g, inputs[batch], labels[batch])
            for _ in range(port.evaluations * (number == len(batches))):
                _, g = torch_random.loader_seed(g)
            yield loss, params, g


def linear_layer(inputs: int, outputs: int, *, bias: bool = True) -> Layer:
    """Describe `nn.Linear`."""
    return Layer("Linear", {"weight": (outputs, inputs)} | ({"bias": (outputs,)} if bias else {}))


def conv_layer(inputs: int, outputs: int) -> Layer:
    """Describe `nn.Conv2d` with a kernel of 3."""
    return Layer("Conv2d", {"weight": (outputs, inputs, 3, 3), "bias": (outputs,)})


def norm_layer(size: int) -> Layer:
    """Describe `nn.LayerNorm`."""
    return Layer("LayerNorm", {"weight": (size,), "bias": (size,)})


def along(vector: jax.Array, x: jax.Array, axis: int = -1) -> jax.Array:
    """Give a vector along an axis of `x` the axes of `x`."""
    return jnp.expand_dims(vector, [i for i in range(x.ndim) if i != axis % x.ndim])


def linear(params: Params, name: str, x: jax.Array) -> jax.Array:
    """Apply `nn.Linear`."""
    y = x @ params[f"{name}.weight"].T
    return y + along(params[f"{name}.bias"], y) if f"{name}.bias" in params else y


def conv(params: Params, name: str, x: jax.Array, stride: int = 1) -> jax.Array:
    """Apply `nn.Conv2d` in PyTorch's order of axes."""
    y = lax.conv_general_dilated(x, params[f"{name}.weight"], (stride, stride), "VALID")
    return y + along(params[f"{name}.bias"], y, 1)


def norm(params: Params, name: str, x: jax.Array) -> jax.Array:
    """Apply `nn.LayerNorm`."""
    x = jax.nn.standardize(x, epsilon=1e-5)
    return x * along(params[f"{name}.weight"], x) + along(params[f"{name}.bias"], x)


def attend(heads: jax.Array, rate: float, g: TorchGenerator, mask: Any = None) -> Drawn:
    """Attend to queries, keys and values: (3, batch, heads, sequence, features)."""
    q, k, v = heads
    scores = q @ k.swapaxes(-1, -2) / q.shape[-1] ** 0.5
    weights = jax.nn.softmax(
        scores if mask is None else jnp.where(mask[None, None], scores, -jnp.inf)
    )
    weights, g = torch_random.dropout(weights, rate, g)
    return weights @ v, g


def perceptron(
    params: Params,
    x: jax.Array,
    g: TorchGenerator,
    *,
    rates: tuple[float, float],
    activation: Callable[[jax.Array], jax.Array] = jnp.tanh,
    alpha: bool = False,
) -> Drawn:
    """Compute the logits of `mlp`, `alpha_dropout` and `bfloat16`."""
    for name, rate in zip(("0", "3"), rates, strict=True):
        dropout = torch_random.alpha_dropout if alpha else torch_random.dropout
        x, g = dropout(activation(linear(params, name, x)), rate, g)
    return linear(params, "6", x), g


def convolutional(
    params: Params, x: jax.Array, g: TorchGenerator, *, rates: tuple[float, float], features: bool
) -> Drawn:
    """Compute the logits of `cnn` and `channels_last`."""
    for name, stride, rate in zip(("0", "3"), (1, 2), rates, strict=True):
        x = jax.nn.relu(conv(params, name, x, stride))
        if features:
            x, g = torch_random.feature_dropout(x, rate, g)
        else:
            x, g = torch_random.dropout(x, rate, g, memory_order="channels_last")
    return linear(params, "7", x.reshape(len(x), -1)), g


def encoder_layer(
    params: Params,
    name: str,
    x: jax.Array,
    g: TorchGenerator,
    *,
    rate: float,
    batch_first: bool,
    activation: Callable[[jax.Array], jax.Array],
) -> Drawn:
    """Apply `nn.TransformerEncoderLayer`."""

    def apply(part: str, x: jax.Array) -> jax.Array:
        return linear(params, f"{name}.{part}", x)

    weight, bias = (params[f"{name}.self_attn.in_proj_{kind}"] for kind in ("weight", "bias"))
    heads = (x @ weight.T + along(bias, x)).reshape(*x.shape[:2], 3, 2, -1)
    # To (3, batch, heads, sequence, features), and back.
    y, g = attend(heads.transpose(2, *((0, 3, 1) if batch_first else (1, 3, 0)), 4), rate, g)
    y = y.transpose(*((0, 2, 1) if batch_first else (2, 0, 1)), 3).reshape(x.shape)
    order = SEQUENCE_FIRST if batch_first else None
    y, g = torch_random.dropout(apply("self_attn.out_proj", y), rate, g, memory_order=order)
    x = norm(params, f"{name}.norm1", x + y)
    y, g = torch_random.dropout(activation(apply("linear1", x)), rate, g)
    y, g = torch_random.dropout(apply("linear2", y), rate, g)
    return norm(params, f"{name}.norm2", x + y), g


def encoder(params: Params, x: jax.Array, g: TorchGenerator) -> Drawn:
    """Compute the logits of `transformer`."""
    x, g = encoder_layer(
        *(params, "batch_first", x, g), rate=0.1, batch_first=True, activation=jax.nn.relu
    )
    exact_gelu = functools.partial(jax.nn.gelu, approximate=False)
    x = x.transpose(1, 0, 2)
    x, g = encoder_layer(
        *(params, "sequence_first", x, g), rate=0.2, batch_first=False, activation=exact_gelu
    )
    return linear(params, "head", x.mean(0)), g


def encoder_structure() -> dict[str, Any]:
    """Describe `nn.TransformerEncoderLayer`."""
    attention = {
        "in_proj_weight": (24, 8),
        "in_proj_bias": (24,),
        "out_proj.weight": (8, 8),
        "out_proj.bias": (8,),
    }
    return {
        "self_attn": Layer("MultiheadAttention", attention),
        "linear1": linear_layer(8, 16),
        "linear2": linear_layer(16, 8),
        "norm1": norm_layer(8),
        "norm2": norm_layer(8),
    }


def recurrent(params: Params, suffix: str, x: jax.Array) -> jax.Array:
    """Run one direction of one layer of an LSTM over (sequence, batch, features)."""
    w_ih, w_hh, b_ih, b_hh = (
        params[f"lstm.{kind}_{suffix}"] for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )

    def cell(carry, x):
        h, c = carry
        i, f, new, o = jnp.split(
            x @ w_ih.T + along(b_ih, h) + h @ w_hh.T + along(b_hh, h), 4, axis=-1
        )
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(new)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    zeros = jnp.zeros((x.shape[1], w_hh.shape[1]))
    return lax.scan(cell, (zeros, zeros), x, reverse=suffix.endswith("_reverse"))[1]


def tagger(params: Params, x: jax.Array, g: TorchGenerator) -> Drawn:
    """Compute the logits of `lstm`."""
    x, g = torch_random.dropout(params["embedding.weight"][x], 0.2, g)
    x = x.transpose(1, 0, 2)
    for layer in range(3):
        if layer:
            x, g = torch_random.dropout(x, 0.3, g)
        directions = (f"l{layer}", f"l{layer}_reverse")
        x = jnp.concatenate([recurrent(params, suffix, x) for suffix in directions], -1)
    # PyTorch's batch-first output is a transpose, too.
    x, g = torch_random.dropout(x.transpose(1, 0, 2), 0.2, g, memory_order=SEQUENCE_FIRST)
    return linear(params, "head", x.mean(1)), g


def lstm_layer() -> Layer:
    """Describe the `nn.LSTM` of `lstm`."""
    return Layer(
        "LSTM",
        {
            f"{kind}_l{layer}{suffix}": shape
            for layer in range(3)
            for suffix in ("", "_reverse")
            for kind, shape in {
                "weight_ih": (24, 12 if layer else 8),
                "weight_hh": (24, 6),
                "bias_ih": (24,),
                "bias_hh": (24,),
            }.items()
        },
    )


def checkpointed(params: Params, x: jax.Array, g: TorchGenerator) -> Drawn:
    """Compute the logits of `checkpointing`."""

    @jax.checkpoint
    def block(layer: Params, x: jax.Array, g: TorchGenerator) -> Drawn:
        x = jax.nn.gelu(linear(layer, "0", x), approximate=False)
        return torch_random.dropout(x, 0.4, g)

    for number in "012":
        layer = {f"0.{kind}": params[f"{number}.0.{kind}"] for kind in ("weight", "bias")}
        x, g = block(layer, x, g)
    return linear(params, "3", x), g


def attention(params: Params, x: jax.Array, g: TorchGenerator) -> Drawn:
    """Compute the logits of `sdpa`."""
    heads = linear(params, "projections", x).reshape(*x.shape[:2], 3, 2, 4)
    mask = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
    y, g = attend(heads.transpose(2, 0, 3, 1, 4), 0.3, g, mask)
    y = linear(params, "output", y.transpose(0, 2, 1, 3).reshape(x.shape))
    y, g = torch_random.dropout(y, 0.1, g)
    return linear(params, "head", (x + y).mean(1)), g


def sequential(params: Params, x: jax.Array, g: TorchGenerator) -> Drawn:
    """Compute the logits of `nested`."""
    x = jax.nn.silu(norm(params, "0.1.0", linear(params, "0.0", x)))
    x, g = torch_random.dropout(x, 0.25, g)
    x, g = torch_random.dropout(x, 0.1, g)
    return linear(params, "2", jnp.tanh(linear(params, "1.1.0", x))), g


adamw = functools.partial(regjax.optim.adamw, 1e-2, weight_decay=1e-2)
sgd = regjax.optim.sgd
MLP = {"0": linear_layer(10, 32), "3": linear_layer(32, 16), "6": linear_layer(16, CLASSES)}
CNN = {"0": conv_layer(3, 8), "3": conv_layer(8, 8), "7": linear_layer(32, CLASSES)}
ENCODER = encoder_structure()

PORTS = {
    "mlp": Port(functools.partial(perceptron, rates=(0.5, 0.2)), MLP, adamw()),
    "cnn": Port(
        functools.partial(convolutional, rates=(0.3, 0.3), features=True), CNN, sgd(0.1, 0.9)
    ),
    "transformer": Port(
        encoder,
        {"batch_first": ENCODER, "sequence_first": ENCODER, "head": linear_layer(8, CLASSES)},
        # Adam would amplify the rounding errors of the bias of the keys, whose gradient is zero.
        sgd(0.1, 0.9),
    ),
    "lstm": Port(
        tagger,
        {
            "embedding": Layer("Embedding", {"weight": (WORDS, 8)}),
            "lstm": lstm_layer(),
            "head": linear_layer(12, CLASSES),
        },
        sgd(0.5),
    ),
    "alpha_dropout": Port(
        functools.partial(perceptron, rates=(0.1, 0.3), activation=jax.nn.selu, alpha=True),
        MLP,
        sgd(0.1, weight_decay=1e-3),
    ),
    "checkpointing": Port(
        checkpointed,
        {str(n): {"0": linear_layer(10, 10)} for n in range(3)} | {"3": linear_layer(10, CLASSES)},
        adamw(),
    ),
    "sdpa": Port(
        attention,
        {
            "projections": linear_layer(8, 24, bias=False),
            "output": linear_layer(8, 8),
            "head": linear_layer(8, CLASSES),
        },
        sgd(0.5),
    ),
    "channels_last": Port(
        functools.partial(convolutional, rates=(0.3, 0.1), features=False), CNN, sgd(0.1)
    ),
    "bfloat16": Port(
        functools.partial(perceptron, rates=(0.3, 0.1)),
        *(MLP, sgd(0.25)),
        tolerance=2**-8,
        dtype=jnp.bfloat16,
    ),
    "nested": Port(
        sequential,
        {
            "0": {"0": linear_layer(10, 16), "1": {"0": norm_layer(16)}},
            "1": {"1": {"0": linear_layer(16, 16, bias=False)}},
            "2": linear_layer(16, CLASSES),
        },
        regjax.optim.rmsprop(1e-3),
        evaluations=1,
    ),
}
