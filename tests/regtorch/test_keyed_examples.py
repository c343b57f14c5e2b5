"""`set_key(..., examples=...)`: part of a batch draws what it draws in the whole batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import regtorch
from regtorch import keyed
from regtorch._random.events import Draw
from tests.regtorch.test_keyed_draws import ROOT, Forward, at

N = 12  # all examples
ROWS = torch.tensor([7, 2, 11])
X = torch.linspace(-2.0, 3.0, N * 5 * 8).reshape(N, 5, 8)


def masks_and_output(model, x, examples=None, axis=None):
    """Return the masks of one call and its output."""
    keyed.set_key(keyed.convert(model), ROOT, 3, examples=examples, axis=axis)
    events = []
    with regtorch.observing(events.append):
        y = model(x)
    return [event.mask for event in events if isinstance(event, Draw)], y


class Flattened(nn.Module):
    """Drops in (batch * heads, ...), the elements of an example one after the other."""

    def forward(self, x):
        return F.dropout(x.reshape(len(x) * 5, 8), 0.5).reshape(x.shape)


def depth(x):
    return x * x.new_empty(len(x), 1, 1).bernoulli_(0.5)


def heads(x):
    x = x.unflatten(-1, (2, 4)).transpose(1, 2)
    return F.scaled_dot_product_attention(x, x, x, dropout_p=0.5)


# Each with the dimension of the batch that has to be stated.
SAME = {
    "layer": (nn.Dropout(0.5), None),
    "function": (Forward(lambda x: F.dropout(x, 0.3)), None),
    "in place": (Forward(lambda x: F.dropout(x.clone(), 0.3, inplace=True)), None),
    "channels": (nn.Dropout1d(0.5), None),
    "alpha": (nn.AlphaDropout(0.5), None),
    "alpha of channels": (nn.FeatureAlphaDropout(0.5), None),
    "depth": (Forward(depth), None),
    "probabilities": (Forward(lambda x: torch.bernoulli(x.sigmoid())), None),
    "rand": (Forward(lambda x: torch.rand(len(x), 4)), None),
    "float64": (Forward(lambda x: torch.rand_like(x, dtype=torch.float64)), None),
    "randn": (Forward(lambda x: x + torch.randn_like(x)), None),
    "randn in float64": (Forward(lambda x: torch.randn(x.shape, dtype=torch.float64)), None),
    "randint": (Forward(lambda x: torch.randint(0, 9, x.shape)), None),
    "exponential": (Forward(lambda x: torch.empty_like(x).exponential_()), None),
    "rrelu": (nn.RReLU(), None),
    "gumbel": (Forward(lambda x: F.gumbel_softmax(x[:, 0])), None),
    "pooling": (nn.FractionalMaxPool2d(2, output_ratio=0.5), None),
    "flattened": (Flattened(), 0),
    "attention": (Forward(heads), None),
    "attention, stated for others": (Forward(heads), 1),
}
SAME["multinomial"] = Forward(lambda x: torch.multinomial(x[:, 0].exp(), 2)), None
CLOSE = {
    "multi-head": (nn.MultiheadAttention(8, 2, 0.5, batch_first=True), None),
    "encoder": (nn.TransformerEncoderLayer(8, 2, 16, 0.5, batch_first=True), None),
    "lstm": (nn.LSTM(8, 8, 3, dropout=0.5, batch_first=True), None),
}


def called(model):
    """Return a module of one argument."""
    if isinstance(model, nn.MultiheadAttention):
        return Attend(model)
    return model


class Attend(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x, x, x)[0]


@pytest.mark.parametrize("name", SAME)
def test_the_rows_of_a_part_are_those_of_the_whole(name):
    model, axis = SAME[name]
    x = X[:, None].repeat(1, 2, 5, 5) if name == "pooling" else X
    _, whole = masks_and_output(model, x)
    _, part = masks_and_output(model, x[ROWS], ROWS, axis)
    assert torch.equal(part, whole[ROWS])
    _, again = masks_and_output(model, x, range(N), axis)
    assert torch.equal(again, whole)
    _, other = masks_and_output(model, x[ROWS], ROWS + 1, axis)
    assert not torch.equal(part, other)
    keyed.revert(model)


@pytest.mark.parametrize("name", CLOSE)
def test_the_masks_of_a_part_are_those_of_the_whole(name):
    model, axis = CLOSE[name]
    model = called(model)
    masks, whole = masks_and_output(model, X)
    own, part = masks_and_output(model, X[ROWS], ROWS, axis)
    assert len(masks) == len(own) > 0
    for mask, mine in zip(masks, own, strict=True):
        assert torch.equal(mine.unflatten(0, (len(ROWS), -1)), mask.unflatten(0, (N, -1))[ROWS])
    first = lambda y: y[0] if isinstance(y, tuple) else y
    torch.testing.assert_close(first(part), first(whole)[ROWS])


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.5),
        lambda: nn.LSTM(8, 8, 2, dropout=0.5),
        lambda: nn.Dropout(0.5),
    ],
)
def test_modules_with_the_sequence_first_draw_by_example_too(make):
    model = make()
    x = X.transpose(0, 1)
    axis = None if isinstance(model, nn.LSTM) else 1
    masks, _ = masks_and_output(model, x, range(N), axis)
    own, _ = masks_and_output(model, x[:, ROWS], ROWS, axis)
    for mask, mine in zip(masks, own, strict=True):
        is_attention = mask.ndim == 4
        assert torch.equal(mine, mask[ROWS] if is_attention else mask[:, ROWS])
    # The mask is that of the tensor with the batch in front.
    if not isinstance(model, nn.LSTM):
        *_, last = masks
        name = keyed.sites(model)[-1]
        moved = regtorch.bernoulli(at(name, 3), 0.5, (N, 5, 8))
        assert torch.equal(last, moved.transpose(0, 1))


def test_micro_batches_draw_the_masks_of_the_batch():
    model = keyed.convert(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 1)))
    keyed.set_key(model, ROOT, 0)
    model(X).square().mean().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for rows in torch.arange(N).split(7):
        keyed.set_key(model, ROOT, 0, examples=rows)
        (model(X[rows]).square().sum() / (N * 5)).backward()
    for p, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_repeats_its_examples_after_another_set_key(reentrant):
    model = keyed.convert(nn.Sequential(nn.Dropout(0.5)))
    x = torch.ones(3, 8, requires_grad=True)
    keyed.set_key(model, ROOT, 0, examples=ROWS)
    y = checkpoint(model, x, use_reentrant=reentrant)
    keyed.set_key(model, ROOT, 1, examples=ROWS + 1)
    y.sum().backward()
    assert torch.equal(x.grad, y)


def test_a_shared_draw_can_be_stated():
    shared = Forward(lambda x: x * F.dropout(torch.ones(5, 8), 0.5))
    model = nn.Sequential(shared, nn.Dropout(0.5))
    (one, _), _ = masks_and_output(model, X)
    (two, rows), _ = masks_and_output(model, X[ROWS], ROWS, {"0": None})
    assert torch.equal(one, two)
    assert torch.equal(rows, regtorch.bernoulli(at("1", 3), 0.5, X.shape)[ROWS])
    layer = Forward(lambda x: x * (torch.rand(()) + torch.rand(1)))  # a decision for all
    _, whole = masks_and_output(layer, X)
    _, part = masks_and_output(layer, X[ROWS], ROWS)
    assert torch.equal(part, whole[ROWS])


packed = lambda x: nn.utils.rnn.pack_padded_sequence(x, [5, 3, 2], batch_first=True)
WRONG = {
    "sequence first": (nn.Dropout(0.5), X[:3].transpose(0, 1), None, "shape (5, 3, 8)"),
    "multiple": (nn.Dropout(0.5), X[:6], None, "for 3 examples; got shape (6, 5, 8)"),
    "ambiguous": (nn.Dropout(0.5), X[:3, :3], None, "for 3 examples; got shape (3, 3, 8)"),
    "no multiple": (nn.Dropout(0.5), X[:4], 0, "along dimension 0; got shape (4, 5, 8)"),
    "no dimension": (nn.Dropout(0.5), X[:3], 3, "along dimension 3; got shape (3, 5, 8)"),
    "weights": (Forward(lambda x: F.dropout(torch.ones(4, 8), 0.5)), X[:3], None, "(4, 8)"),
    "attention": (Forward(heads), X[:4], None, "along dimension 0; got shape (4, 2, 5, 5)"),
    "flattened attention": (
        Forward(lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5)),
        X[:6],
        None,
        "along dimension 0; got shape (6, 5, 5)",
    ),
    "weights of two views": (
        Attend(nn.MultiheadAttention(8, 2, 0.5, batch_first=True)),
        X[:6],
        None,
        "along dimension 0; got shape (12, 5, 5)",
    ),
    "permutation": (Forward(lambda x: x[torch.randperm(3)]), X[:3], None, "a permutation"),
    "packed": (nn.LSTM(8, 8, 2, dropout=0.5), packed(X[:3]), None, "a packed sequence"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_draw_that_is_not_by_example_is_an_error(name):
    model, x, axis, problem = WRONG[name]
    model = nn.Sequential(model)
    with pytest.raises((ValueError, NotImplementedError)) as raised:
        masks_and_output(model, x, ROWS, axis)
    assert str(raised.value).startswith("site '0")
    assert problem in str(raised.value)
    assert "axis={'0" in str(raised.value)
    name = str(raised.value).split("'")[1]
    masks_and_output(model, x, ROWS, {name: None})


def test_a_registered_function_cannot_draw_by_example():
    keyed.register(torch.Tensor.log_normal_, lambda key, x: x.copy_(regtorch.normal(key, x.shape)))
    try:
        model = Forward(lambda x: torch.empty(3).log_normal_())
        with pytest.raises(NotImplementedError, match="must draw by example; got a draw without"):
            masks_and_output(nn.Sequential(model), X[:3], ROWS)
        masks_and_output(nn.Sequential(model), X[:3], ROWS, {"0": None})
    finally:
        keyed.register(torch.Tensor.log_normal_, lambda key, *args, **options: NotImplemented)


ARGUMENTS = {
    "axis without examples": ({"axis": 0}, ValueError, "axis must be None without examples"),
    "one number": ({"examples": 3}, ValueError, "examples must be one number for each row"),
    "negative": ({"examples": [0, -1]}, ValueError, "examples must not be negative; got -1"),
    "floats": ({"examples": [0.5]}, TypeError, "examples must be integers; got"),
    "axis": ({"examples": [0], "axis": 0.5}, TypeError, "axis must be an integer; got 0.5"),
    "axis of a glob": ({"examples": [0], "axis": {"0": "1"}}, TypeError, r"axis\['0'\] must be"),
    "glob": ({"examples": [0], "axis": {"drop": 0}}, ValueError, "got 'drop', which matches none"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_wrong_arguments_are_errors(name):
    arguments, kind, message = ARGUMENTS[name]
    with pytest.raises(kind, match=message):
        keyed.set_key(keyed.convert(nn.Sequential(nn.Dropout(0.5))), ROOT, 0, **arguments)
