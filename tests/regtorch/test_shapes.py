"""Memory layouts and shapes: regtorch preserves and accepts those of PyTorch's dropout."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import regtorch
from regtorch import keyed

KEY = regtorch.key(0)
X = torch.linspace(1.0, 2.0, 2 * 4 * 3 * 5).reshape(2, 4, 3, 5)
LAYOUTS = {
    "contiguous": X,
    "channels_last": X.to(memory_format=torch.channels_last),
    "one_row": X[:1].to(memory_format=torch.channels_last),
    "transposed": X.transpose(1, 3),
    "permuted": X.permute(3, 1, 0, 2),
    "sliced": X[:, ::2],
    "expanded": X[:, :1].expand(2, 4, 3, 5),
    "volumes": X[..., None].expand(2, 4, 3, 5, 2).to(memory_format=torch.channels_last_3d),
}
ids = lambda x: torch.arange(x[..., 0].numel()).reshape(x.shape[:-1])
FUNCTIONS = {
    "dropout": lambda x: regtorch.dropout(x, 0.4, key=KEY),
    "dropout-1": lambda x: regtorch.dropout(x, 1, key=KEY),
    "dropout-tensor": lambda x: regtorch.dropout(x, torch.tensor(0.4), key=KEY),
    "dropout-shared": lambda x: regtorch.dropout(x, 0.4, key=KEY, broadcast_dims=(0, 3)),
    "dropout-half": lambda x: regtorch.dropout(x.bfloat16(), 0.4, key=KEY),
    "dropout-complex": lambda x: regtorch.dropout(torch.complex(x, x), 0.4, key=KEY),
    "alpha_dropout": lambda x: regtorch.alpha_dropout(x, 0.4, key=KEY),
    "feature_dropout": lambda x: regtorch.feature_dropout(x, 0.4, key=KEY),
    "feature_alpha": lambda x: regtorch.feature_alpha_dropout(x, 0.4, key=KEY),
    "drop_path": lambda x: regtorch.drop_path(x, 0.4, key=KEY),
    "drop_block": lambda x: regtorch.drop_block(x, 0.4, key=KEY, block_size=2),
    "variational": lambda x: regtorch.variational_dropout(x, 0.4, key=KEY),
    "drop_connect": lambda x: regtorch.drop_connect(x, 0.4, key=KEY),
    "embedding": lambda x: regtorch.embedding_dropout(x, ids(x), 0.4, key=KEY),
    "gaussian_dropout": lambda x: regtorch.gaussian_dropout(x, 0.4, key=KEY),
    "gaussian_noise": lambda x: regtorch.gaussian_noise(x, 0.4, key=KEY),
    "nn.Dropout": lambda x: regtorch.nn.Dropout(0.4)(x, key=KEY),
    "converted": lambda x: converted(nn.Dropout(0.4))(x),
}


def converted(layer):
    model = keyed.convert(layer)
    keyed.set_key(model, KEY, 0)
    return model


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_and_gradients_have_the_layout_that_pytorch_gives_them(name, layout):
    x, function = LAYOUTS[layout], FUNCTIONS[name]

    def strides(function):
        leaf = x.detach().requires_grad_()
        y = function(leaf)
        gradient = torch.autograd.grad(y, leaf, torch.ones_like(y))[0]
        # The stride of a dimension of size 1 has no effect.
        return [
            [s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1] for t in (y, gradient)
        ]

    assert strides(function) == strides(lambda x: F.dropout(x, 0.4))
    plain = function(x.clone(memory_format=torch.contiguous_format))
    torch.testing.assert_close(function(x), plain, rtol=0, atol=0)


def test_layouts_are_kept_under_vmap():
    x, keys = LAYOUTS["channels_last"], regtorch.split(KEY, 2)
    y = torch.func.vmap(lambda key: regtorch.dropout(x, 0.4, key=key))(keys)
    assert y[1].stride() == x.stride()
    assert torch.equal(y[1], regtorch.dropout(x, 0.4, key=keys[1]))


SHAPES = [(), (6,), (4, 8), (3, 4, 8), (2, 3, 4, 5), (2, 3, 4, 5, 2), (2, 1, 3, 4, 5, 2)]
LAYERS = [nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout]
LAYERS += [nn.FeatureAlphaDropout]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.__name__)
def test_a_converted_layer_accepts_and_shares_what_pytorch_does(layer, shape):
    """Errors, warnings and the elements that are dropped together are the same."""

    def run(model):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                y = torch.stack([model(torch.ones(shape)).flatten() for _ in range(30)])
            except RuntimeError:
                return RuntimeError, None
        # The groups of elements that are dropped together in all of 30 masks.
        together = (y[:, None, :] == y[:, :, None]).all(0)
        return {str(each.message) for each in caught}, together

    torch.manual_seed(0)
    of_regtorch, of_torch = run(converted(layer(0.5))), run(layer(0.5))
    assert of_regtorch[0] == of_torch[0]
    assert of_torch[1] is None or torch.equal(of_regtorch[1], of_torch[1])
