"""Wrong calls, and the class and the argument of the error that each must raise."""

from __future__ import annotations

import builtins
import re
from pathlib import Path
from typing import Any

import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import regjax
import regjax.equinox
import regjax.haiku
import regjax.linen
import regjax.nnx
import regtorch


def predict(x: Any, *, key: Any) -> Any:
    """Predict with dropout, in JAX."""
    return regjax.dropout(x, 0.5, key=key)


def tpredict(x: Any, *, key: Any) -> Any:
    """Predict with dropout, in PyTorch."""
    return regtorch.dropout(x, 0.5, key=key)


LINEAR = torch.nn.Linear(2, 2)
NAMES = {
    "regjax": regjax,
    "regtorch": regtorch,
    "jax": jax,
    "jnp": jnp,
    "np": np,
    "torch": torch,
    "linen": regjax.linen,
    "nnx": regjax.nnx,
    "equinox": regjax.equinox,
    "flax": flax,
    "haiku": regjax.haiku,
    "optim": regjax.optim,
    "interop": regjax.interop,
    "key": jax.random.key(0),
    "keys": jax.random.split(jax.random.key(0)),
    "x": jnp.ones((2, 3)),
    "image": jnp.ones((2, 4, 4, 3)),
    "q": jnp.ones((1, 4, 2, 8)),
    "tkey": regtorch.key(0),
    "t": torch.ones(2, 3),
    "timage": torch.ones(2, 3, 4, 4),
    "tq": torch.ones(1, 4, 2, 8),
    "predict": predict,
    "tpredict": tpredict,
    "linear": LINEAR,
    "torch_sgd": torch.optim.SGD(LINEAR.named_parameters(), lr=0.1),
}
LINES = Path(__file__).with_name("wrong_calls.txt").read_text().splitlines()
ROWS = [line.split(" | ") for line in LINES if line and not line.startswith("#")]


@pytest.mark.parametrize(("error", "words", "call"), ROWS, ids=[row[-1] for row in ROWS])
def test_a_wrong_call_is_rejected_by_name(error, words, call):
    kind = getattr(builtins, error)
    with pytest.raises(kind, match=re.escape(words)) as raised:
        eval(call, NAMES.copy())
    assert type(raised.value) is kind  # not a subclass, such as JAX's errors about tracers


def test_the_table_is_whole():
    """The table has calls of every part of both packages."""
    calls = [call for _, _, call in ROWS]
    assert len(calls) == len(set(calls)) >= 300
    parts = ("regjax.", "regtorch.", "regtorch.nn.", "regtorch.keyed.", "regtorch.optim.")
    parts += ("linen.", "nnx.", "equinox.", "haiku.", "optim.", "interop.")
    assert all(any(call.startswith(part) for call in calls) for part in parts)
