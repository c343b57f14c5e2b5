"""The masks of JAX, sharded over devices, are those of PyTorch's ranks, each with its rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import regjax
import regtorch

ROWS, STEP = 12, 3
X = np.linspace(-2.0, 3.0, ROWS * 5 * 8, dtype=np.float32).reshape(ROWS, 5, 8)


class Model(torch.nn.Module):
    """Dropout of elements, of channels and of rows, as a layer and as functions."""

    def __init__(self):
        super().__init__()
        self.hidden, self.channels = torch.nn.Dropout(0.4), torch.nn.Dropout1d(0.5)

    def forward(self, x):
        x = self.channels(self.hidden(x))
        return x * x.new_empty(len(x), 1, 1).bernoulli_(0.5)


@jax.jit
def in_jax(x, root):
    x = regjax.dropout(x, 0.4, key=regjax.site_key(root, STEP, "hidden"))
    key = regjax.site_key(root, STEP, "channels")
    x = regjax.feature_dropout(x, 0.5, key=key, channel_axis=1)
    key = regjax.site_key(root, STEP, "")
    return regjax.drop_path(x, 0.5, key=key, scale_by_keep=False)


@pytest.fixture(scope="module", params=[AxisType.Explicit, AxisType.Auto], ids=str)
def sharded(request):
    """Return the result of JAX on two devices."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(request.param,))
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.asarray(X), jax.NamedSharding(mesh, P("data")))
        y = in_jax(x, jax.random.key(7))
        assert y.sharding.spec[0] == "data"
    return np.asarray(y)


@pytest.mark.parametrize("split", ["rows in order", "alternating rows", "micro-batches"])
@pytest.mark.sample(2)
def test_ranks_draw_the_rows_of_a_sharded_batch(sharded, split):
    rows = torch.arange(ROWS)
    parts = {
        "rows in order": rows.tensor_split(2),
        "alternating rows": [rows[::2], rows[1::2]],  # as DistributedSampler splits
        "micro-batches": [part for half in rows.tensor_split(2) for part in half.split(4)],
    }[split]
    for part in parts:
        model = regtorch.keyed.convert(Model())
        regtorch.keyed.set_key(model, regtorch.key(7), STEP, examples=part)
        y = model(torch.from_numpy(X)[part])
        np.testing.assert_array_equal(y.numpy(), sharded[part.numpy()])
    assert 0.05 < (sharded != 0).mean() < 0.3
