"""A keyword that another library has for an argument is refused with the name to pass."""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import haiku as hk
import jax.numpy as jnp
import optax
import pytest
import torch
import torch.nn.functional as F

import regjax
import regjax.equinox
import regjax.haiku
import regjax.linen
import regjax.nnx
import regtorch
from regshared.spellings import explain_names

LAYERS = (regjax.linen, regjax.nnx, regjax.equinox, regtorch.nn)
OPTIMIZERS = ("SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta")
OPTIMIZERS += ("RMSprop", "ASGD", "Rprop", "Adafactor", "Muon")
SDPA = ("attn_mask", "dropout_p", "enable_gqa")  # a builtin without a signature
ADVICE = r"must be passed to \w+ by this name; got|must not be passed to \w+; got"


def parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def pairs() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Return each argument of another library, and the function that must explain it."""
    functions: list[tuple[Callable[..., Any], Callable[..., Any]]] = [
        (getattr(torch.optim, name), getattr(regjax.optim, name.lower())) for name in OPTIMIZERS
    ]
    for package in (regjax, regtorch):
        functions += [
            (getattr(F, name), getattr(package, name))
            for name in ("dropout", "alpha_dropout", "feature_alpha_dropout")
        ]
        functions += [(F.dropout2d, package.feature_dropout), (eqx.nn.Dropout, package.dropout)]
        functions += [(hk.dropout, package.dropout)]
        yield from ((name, package.dot_product_attention) for name in SDPA)
        for name in ("drop_path", "drop_block", "variational_dropout", "drop_connect"):
            yield from ((other, getattr(package, name)) for other in ("drop_prob", "p", "training"))
        for name in ("embedding_dropout", "gaussian_dropout", "gaussian_noise"):
            yield from ((other, getattr(package, name)) for other in ("seed", "training"))
    functions += [(torch.nn.Dropout, layers.Dropout) for layers in LAYERS]
    functions += [(torch.nn.AlphaDropout, layers.AlphaDropout) for layers in LAYERS]
    yield from ((other, regjax.haiku.dropout) for other in ("p", "key"))
    yield from (("training", layers.DropPath) for layers in LAYERS[:3])
    yield from (("rate", regjax.equinox.Dropout), ("deterministic", regjax.equinox.DropPath))
    yield from ((name, regjax.optim.adamw) for name in ("b1", "b2"))
    yield from (("decay", regjax.optim.rmsprop), ("weight_decay_mask", regjax.optim.adadelta))
    for other, own in functions:
        yield from ((name, own) for name in parameters(other) if name not in names_of(own))


def names_of(function: Callable[..., Any]) -> list[str]:
    """Return the arguments, of a class those of its constructor."""
    return parameters(function.__init__ if isinstance(function, type) else function)


PAIRS = sorted(set(pairs()), key=lambda pair: (pair[1].__module__, pair[1].__name__, pair[0]))


@pytest.mark.parametrize(
    ("name", "function"), PAIRS, ids=[f"{f.__module__}.{f.__name__}-{name}" for name, f in PAIRS]
)
def test_a_foreign_name_is_refused_with_advice(name, function):
    with pytest.raises(TypeError, match=ADVICE) as raised:
        function(**{name: None})
    message = str(raised.value)
    assert f"got {name}." in message or message.startswith(f"{name} must not")
    if "got None" not in message:
        own = message.partition(" ")[0]
        assert own in names_of(function)
        assert f"Pass {own}=" in message


def test_the_table_covers_every_optimizer():
    names = {n for n in regjax.optim.__all__ if not n.startswith(("add_", "Scale", "scale", "lay"))}
    assert {name.lower() for name in OPTIMIZERS} == names
    assert len(PAIRS) > 100


@pytest.mark.parametrize("layers", LAYERS)
def test_every_layer_explains(layers):
    for name in set(layers.__all__) - {"Layer", "GaussianNoise", "DropConnect"}:
        with pytest.raises(TypeError, match=ADVICE):
            getattr(layers, name)(drop_prob=0.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: regjax.optim.sgd(lr=0.1), "Pass learning_rate=lr"),  # pyright: ignore
        (lambda: regjax.dropout(jnp.ones(3), p=0.5), "Pass rate=p"),  # pyright: ignore
        (
            lambda: regjax.dropout(jnp.ones(3), 0.5, training=True),  # pyright: ignore
            "Pass deterministic=not training",
        ),
        (lambda: regjax.optim.adam(b1=0.9), r"Pass betas=\(b1, b2\)"),  # pyright: ignore
        (lambda: regjax.optim.sgd(bogus=1), "unexpected keyword argument 'bogus'"),  # pyright: ignore
        (lambda: regjax.linen.Dropout(0.5, bogus=1), "unexpected keyword argument 'bogus'"),  # pyright: ignore
    ],
)
def test_the_error_names_the_argument(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_a_decorated_function_keeps_its_signature_and_its_name():
    def plain(x: int, *, rate: float = 0.5) -> float:
        """Return something."""
        return x * rate

    decorated = explain_names(plain)
    assert inspect.signature(decorated) == inspect.signature(plain)
    assert decorated.__doc__ == plain.__doc__
    assert decorated(2, rate=2.0) == 4.0
    assert pickle.loads(pickle.dumps(regjax.dropout)) is regjax.dropout
    optax.inject_hyperparams(regjax.optim.sgd)(0.1)  # reads the signature


def test_an_undecorated_function_is_detected():
    with pytest.raises(TypeError) as raised:
        regjax.optim.sgd.__wrapped__(lr=0.1)  # pyright: ignore
    assert "must be passed" not in str(raised.value)
