"""The names and arguments that a library has, and masks that agree between frameworks."""

from __future__ import annotations

import importlib
import inspect
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

import regjax
import regtorch
from benchmarks.probes.in_jax import DROPOUTS, X, keras, mask


def takes_key(library: str) -> bool:
    """Return whether the dropout of a library takes its source of randomness in each call."""
    names = {"key", "rng", "rngs", "seed", "generator"}
    return all(names & inspect.signature(call).parameters.keys() for call in _calls(library))


def _calls(library: str) -> Iterator[Callable[..., Any]]:
    if library == "regjax":
        yield regjax.dropout
    elif library == "Flax":
        from flax import linen, nnx

        yield from (linen.Dropout.__call__, nnx.Dropout.__call__)
    elif library == "Equinox":
        import equinox

        yield equinox.nn.Dropout.__call__
    elif library == "Haiku":
        import haiku

        yield haiku.dropout
    elif library == "Keras":
        yield keras().random.dropout
    elif library == "PyTorch":
        yield torch.nn.functional.dropout
    else:
        from timm.layers import drop_path  # pyright: ignore[reportMissingImports]

        yield drop_path


def agrees_with_torch() -> bool:
    """Return whether regjax and regtorch draw the same mask from the same key."""
    x, key = torch.tensor(X), regtorch.key(0)
    return np.array_equal(
        mask(DROPOUTS["regjax"][0]), regtorch.dropout(x, 0.5, key=key).numpy() != 0
    )


def keras_agrees() -> bool:
    """Return whether Keras draws the same mask on JAX and on PyTorch from the same seed."""
    code = (
        "import keras; y = keras.random.dropout(keras.ops.ones(64), 0.5, seed=1);"
        "print((keras.ops.convert_to_numpy(y) != 0).tolist())"
    )
    masks = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "KERAS_BACKEND": backend},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for backend in ("jax", "torch")
    ]
    return masks[0] == masks[1]


# The kinds of dropout, and the names that provide them.
KINDS: Mapping[str, Mapping[str, str]] = {
    "whole channels": {
        "regjax": "regjax.feature_dropout",
        "Flax": "flax.linen.Dropout.broadcast_dims",
        "Haiku": "haiku.dropout(broadcast_dims)",
        "Keras": "keras.layers.SpatialDropout2D",
        "PyTorch": "torch.nn.Dropout2d",
    },
    "whole branches": {  # one mask for all axes but that of the samples
        "regjax": "regjax.drop_path",
        "Flax": "flax.linen.Dropout.broadcast_dims",
        "Haiku": "haiku.dropout(broadcast_dims)",
        "Keras": "keras.layers.Dropout(noise_shape)",
        "timm": "timm.layers.DropPath",
    },
    "alpha": {
        "regjax": "regjax.alpha_dropout",
        "Keras": "keras.layers.AlphaDropout",
        "PyTorch": "torch.nn.AlphaDropout",
    },
    "one mask for all timesteps": {
        "regjax": "regjax.variational_dropout",
        "Flax": "flax.linen.Dropout.broadcast_dims",
        "Haiku": "haiku.dropout(broadcast_dims)",
        "Keras": "keras.layers.Dropout(noise_shape)",
    },
    "whole words": {"regjax": "regjax.embedding_dropout"},
    "Gaussian": {
        "regjax": "regjax.gaussian_dropout",
        "Keras": "keras.layers.GaussianDropout",
    },
    "blocks": {"regjax": "regjax.drop_block", "timm": "timm.layers.DropBlock2d"},
    "weights": {"regjax": "regjax.drop_connect"},
}


def count_kinds(library: str) -> str:
    """Count the kinds of dropout that a library has, besides the elementwise one."""
    places = [kinds[library] for kinds in KINDS.values() if library in kinds]
    missing = [place for place in places if not _exists(place)]
    if missing:
        raise RuntimeError(f"{library} must have {missing}.")
    return f"{len(places)} of {len(KINDS)}"


def _exists(place: str) -> bool:
    if place.startswith("keras."):
        keras()
    path, _, argument = place.rstrip(")").partition("(")
    module, _, rest = path.partition(".")
    target: Any = importlib.import_module(module)
    for name in rest.split("."):
        if not hasattr(target, name):
            try:
                importlib.import_module(f"{target.__name__}.{name}")
            except (ImportError, AttributeError):
                return False
        target = getattr(target, name)
    return not argument or argument in inspect.signature(target).parameters


# Parts of models in haiku.nets, which other libraries also have, as in equinox.nn.MLP.
BLOCKS = {"MLP", "VectorQuantizer", "VectorQuantizerEMA"}


def count_models(library: str) -> str:
    """Count the ready-made models of a library."""
    if library == "timm":
        import timm  # pyright: ignore[reportMissingImports]

        return f"{len(timm.list_models()):,}"
    if library == "Keras":
        members = vars(keras().applications).items()
        return str(sum(callable(member) for name, member in members if name[0].isupper()))
    if library == "Haiku":
        from haiku import nets

        names = {name for name, member in vars(nets).items() if isinstance(member, type)}
        return str(len(names - BLOCKS))
    return "no"
