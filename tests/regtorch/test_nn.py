"""The modules of the dropout family agree with their functions and with PyTorch's modules."""

from __future__ import annotations

import copy
import functools
import warnings

import pytest
import torch

import regtorch

KEY = regtorch.key(4)
NAMES = ("Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout")
every_layer = pytest.mark.parametrize("name", NAMES)


def layers(name: str, rate: float = 0.5):
    """Return the module of regtorch and that of PyTorch."""
    return getattr(regtorch.nn, name)(rate), getattr(torch.nn, name)(rate)


def an_input(name: str) -> torch.Tensor:
    return torch.ones((64, 32, 2, 2, 2)[: 5 if name == "Dropout3d" else 4 if "2" in name else 3])


@every_layer
def test_evaluation_is_the_input_and_training_needs_a_key(name):
    layer, _ = layers(name)
    x = an_input(name)
    with pytest.raises(ValueError, match="key must be a random key in training"):
        layer(x)
    assert layer.eval()(x) is x
    assert not layer.state_dict()


@every_layer
def test_the_generator_serves_calls_without_a_key(name):
    layer = getattr(regtorch.nn, name)(0.5, generator=torch.Generator().manual_seed(0))
    x = an_input(name)
    first, second = layer(x), layer(x)
    assert not torch.equal(first, second)
    key = copy.deepcopy(layer)
    assert torch.equal(layer(x, key=KEY), key(x, key=KEY))


@every_layer
def test_the_rate_is_checked_and_printed(name):
    with pytest.raises(ValueError, match=r"rate must lie in \[0, 1\]; got -0\.5"):
        layers(name, -0.5)
    assert repr(layers(name, 0.25)[0]) == f"{name}(rate=0.25)"


SHARED = {  # the shape of the mask
    "Dropout1d": {(6, 5): (6, 1), (3, 6, 5): (3, 6, 1)},
    "Dropout2d": {(3, 6, 5): (3, 6, 1), (3, 6, 5, 4): (3, 6, 1, 1)},
    "Dropout3d": {(6, 5, 4, 3): (6, 1, 1, 1), (2, 6, 5, 4, 3): (2, 6, 1, 1, 1)},
    "FeatureAlphaDropout": {(3, 6): (3, 6), (3, 6, 5, 4): (3, 6, 1, 1)},
}
CASES = [(name, shape, mask) for name, shapes in SHARED.items() for shape, mask in shapes.items()]


@pytest.mark.parametrize(("name", "shape", "mask"), CASES)
def test_whole_channels_go_as_in_pytorch(name, shape, mask):
    of_regtorch, of_torch = layers(name)
    keep = regtorch.bernoulli(KEY, 0.5, mask).expand(shape)
    y = of_regtorch(torch.ones(shape), key=KEY)
    assert torch.equal(y > 1, keep)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a 3-D input to Dropout2d
        z = of_torch(torch.ones(shape))
    for dim, size in enumerate(mask):
        if size == 1:
            assert torch.equal(z, z.narrow(dim, 0, 1).expand(shape))


def test_in_a_batch_every_row_and_channel_draws_for_itself():
    y = regtorch.nn.Dropout2d(0.5)(torch.ones(64, 32, 2, 2), key=KEY)[:, :, 0, 0]
    assert len(torch.unique(y, dim=0)) == 64
    assert len(torch.unique(y, dim=1).T) == 32


@pytest.mark.parametrize(
    ("name", "ndim"),
    [("Dropout1d", 1), ("Dropout1d", 4), ("Dropout2d", 2), ("Dropout2d", 5), ("Dropout3d", 3)],
)
def test_an_input_of_another_rank_is_refused(name, ndim):
    with pytest.raises(RuntimeError, match=rf"x must be \d-D or \d-D for {name}; got a {ndim}-D"):
        layers(name)[0](torch.ones([2] * ndim), key=KEY)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("name", ["AlphaDropout", "FeatureAlphaDropout"])
def test_alpha_constants_are_those_of_pytorch(name, rate):
    """Return PyTorch's two values at x = 0 and its slope, from its output."""
    of_regtorch, of_torch = layers(name, rate)
    for x in (torch.zeros(400, 4, dtype=torch.float64), torch.ones(400, 4, dtype=torch.float64)):
        values = [torch.unique(y) for y in (of_regtorch(x, key=KEY), of_torch(x))]
        assert len(values[0]) == 2
        torch.testing.assert_close(*values, rtol=1e-12, atol=0)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("which", ["regtorch", "torch"])
def test_alpha_dropout_keeps_mean_0_and_variance_1(rate, which):
    """Within 5 sigma (p < 6e-7 each), with the fourth moment of the sample."""
    torch.manual_seed(0)
    layer = layers("AlphaDropout", rate)[which == "torch"]
    x = torch.randn(200_000, dtype=torch.float64)
    y = layer(x, key=KEY) if which == "regtorch" else layer(x)
    n = len(y)
    assert abs(y.mean()) < 5 * y.std() / n**0.5
    assert abs((y**2).mean() - 1) < 5 * (y**2).std() / n**0.5
    # Planted: plain dropout is detected.
    z = regtorch.dropout(x, rate, key=KEY)
    assert abs((z**2).mean() - 1) > 5 * (z**2).std() / n**0.5


def test_alpha_dropout_refuses_complex_and_its_gradient_is_the_slope():
    with pytest.raises(TypeError, match="x must be real for alpha dropout; got dtype"):
        regtorch.alpha_dropout(torch.ones(3, dtype=torch.complex64), 0.5, key=KEY)
    x = torch.randn(50, dtype=torch.float64, requires_grad=True)
    f = lambda x: regtorch.alpha_dropout(x, 0.3, key=KEY)
    assert torch.autograd.gradcheck(f, x)
    assert torch.autograd.gradcheck(f, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, x)


def test_alpha_dropout_saves_nothing_but_the_key():
    saved = []
    x = torch.randn(1000, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        regtorch.alpha_dropout(x, 0.3, key=KEY)
    assert [tensor.numel() for tensor in saved] == [2]


@pytest.mark.parametrize("function", [regtorch.feature_dropout, regtorch.feature_alpha_dropout])
@pytest.mark.parametrize("axis", [4, -5])
def test_a_wrong_channel_axis_is_refused(function, axis):
    with pytest.raises(ValueError, match=rf"channel_axis .* has 4; got {axis}"):
        function(torch.ones(2, 3, 4, 5), 0.5, key=KEY, channel_axis=axis)


LAYERS = [kind for kind in vars(regtorch.nn).values() if isinstance(kind, type)]


@pytest.mark.parametrize("kind", LAYERS, ids=lambda kind: kind.__name__)
def test_a_generator_is_a_generator(kind):
    """A key in a layer would draw the same mask in every call."""
    first = [torch.nn.Linear(2, 2)] if kind.__name__ == "DropConnect" else []
    make = functools.partial(kind, *first, 0.5)
    message = r"generator must be a torch.Generator or None; got .* layer\(x, key=key\)"
    for wrong in (regtorch.key(0), 7):
        with pytest.raises(TypeError, match=message):
            make(generator=wrong)
        with pytest.raises(TypeError, match=message):
            make().generator = wrong
    generator = torch.Generator()
    layer = make(generator=generator)
    assert layer.generator is generator
    layer.generator = None
    assert copy.deepcopy(layer).generator is None
