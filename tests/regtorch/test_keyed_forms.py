"""`regtorch.keyed`: every form of the arguments of a function that draws.

A call is the same with keys: the shape, dtype, device, strides and gradient of its result, or the
type of its error. If it has no key, the error names the function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.regtorch.test_keyed_draws import C, Forward, P, X, empty, keyed_model

OWN, INT64 = torch.default_generator, torch.int64
META = empty(3, 8).to("meta")
HEADS = C.repeat(2, 1, 1)
Form = Callable[[], Any]

FORMS: dict[str, list[Form]] = {
    "bernoulli": [
        lambda: torch.bernoulli(input=P, generator=OWN),
        lambda: torch.bernoulli(P, generator=None, out=empty(0)),
        lambda: torch.bernoulli(P, out=empty(3, 8, dtype=INT64)),
        lambda: torch.bernoulli(P.clone().requires_grad_()),
        lambda: torch.bernoulli(P, 0.3, out=empty(3, 8)),  # an error
        lambda: torch.bernoulli(P, p=0.3),
        lambda: torch.bernoulli(META),
        lambda: X.to(INT64).bernoulli(p=0.3),
        lambda: P.clone().requires_grad_().bernoulli(0.3, generator=OWN),
        lambda: X.bool().bernoulli_(0.3),
        lambda: empty(2, 3, 8).bernoulli_(P.double(), generator=OWN),
        lambda: META.clone().bernoulli_(0.3),
        lambda: empty(8, 3).t().bernoulli_(torch.tensor(0.3)),
        lambda: empty(3).bernoulli_(1.5),
        lambda: empty(3).bernoulli_(0.5, 3),
    ],
    "uniform": [
        lambda: torch.rand(size=(3, 8), generator=OWN, out=empty(0)),
        lambda: torch.rand([3, 8], dtype=torch.bfloat16, requires_grad=True),
        lambda: torch.rand(torch.Size([3]), device="meta", layout=torch.strided, pin_memory=False),
        lambda: torch.rand((), dtype=torch.complex64),  # has no key
        lambda: torch.rand(3, 8, names=None),
        lambda: torch.rand(3, 8, steps=2),
        lambda: torch.rand_like(input=X.t(), memory_format=torch.preserve_format),
        lambda: torch.rand_like(X, dtype=torch.float64, device="meta", requires_grad=True),
        lambda: empty(3).uniform_(0, to=4, generator=OWN),
        lambda: empty(3).uniform_(**{"from": -1, "to": 1}),
        lambda: empty(3).uniform_(2),
        lambda: empty(3).uniform_(4, 2),
        lambda: empty(3, dtype=INT64).uniform_(),
        lambda: META.clone().uniform_(-1, 1),
    ],
    "normal": [
        lambda: torch.randn(size=(3, 8), generator=OWN, out=empty(0)),
        lambda: torch.randn(3, 8, dtype=torch.float64, device="meta", requires_grad=True),
        lambda: torch.randn_like(input=X, dtype=torch.bfloat16),
        lambda: empty(3).normal_(1, std=2, generator=OWN),
        lambda: empty(3).normal_(std=-1),
        lambda: torch.normal(mean=X, std=P, generator=OWN, out=empty(0)),
        lambda: torch.normal(X, P.double()),
        lambda: torch.normal(0.5, P),
        lambda: torch.normal(X),
        lambda: torch.normal(X, -P),
        lambda: torch.normal(META, META),
        lambda: torch.normal(1, 2, size=(3,), dtype=torch.float64, requires_grad=True),
        lambda: torch.normal(1.0, 2.0, (3,), generator=OWN, out=empty(0)),
        lambda: torch.normal(0.0, -1.0, (3,)),
        lambda: torch.normal(0.0, 1.0),
    ],
    "exponential": [
        lambda: empty(3).exponential_(lambd=2, generator=OWN),
        lambda: empty(3).exponential_(-1),
        lambda: META.clone().exponential_(2),
        lambda: empty(3, dtype=INT64).exponential_(),
    ],
    "rrelu": [
        lambda: torch.rrelu(X, 0.1, 0.3, True, OWN),
        lambda: torch.rrelu(X, 0.1, 0.3, True, torch.Generator()),
        lambda: torch.rrelu(input=X, lower=0.1, upper=0.3, training=True, generator=None),
        lambda: torch.rrelu(X),
        lambda: torch.rrelu_(X.clone(), training=True),
        lambda: F.rrelu(X.clone(), 0.1, 0.3, True, True),
        lambda: F.rrelu_(X.clone(), training=True),
        lambda: torch.rrelu(META, training=True),
    ],
    "randint": [
        lambda: torch.randint(10, [3, 8], generator=OWN, out=empty(0)),
        lambda: torch.randint(0, high=10, size=(3, 8), out=empty(3, 8, dtype=torch.int32)),
        lambda: torch.randint(low=-3, high=10, size=(3,), dtype=torch.float32, requires_grad=True),
        lambda: torch.randint(torch.tensor(0), torch.tensor(10), (3,)),
        lambda: torch.randint(2, (3,), dtype=torch.bool),
        lambda: torch.randint(10, (3,), device="meta"),
        lambda: torch.randint(0, 300, (3,), dtype=torch.uint8),
        lambda: torch.randint(5, 5, (3,)),
        lambda: torch.randint(5, (3,), low=2),
        lambda: torch.randint(0, 2**40, (3,)),  # has no key
        lambda: torch.randint_like(X, high=10, generator=OWN),
        lambda: torch.randint_like(input=X, low=2, high=10, dtype=INT64),
        lambda: torch.randint_like(X, torch.tensor(10), requires_grad=True),
        lambda: torch.randint_like(X, 2, 10, device="meta"),
        lambda: empty(3).random_(10, generator=OWN),
        lambda: empty(3).random_(2, to=10),
        lambda: empty(3).random_(**{"from": 2, "to": 10}),
        lambda: empty(3).random_(to=10),
        lambda: empty(3).random_(),  # has no key
    ],
    "randperm": [
        lambda: torch.randperm(n=9, generator=OWN, out=empty(0, dtype=INT64)),
        lambda: torch.randperm(9, out=empty(9, dtype=torch.int32)),
        lambda: torch.randperm(torch.tensor(9), dtype=torch.float32, pin_memory=False),
        lambda: torch.randperm(9, device="meta"),
        lambda: torch.randperm(0),
        lambda: torch.randperm(-1),
    ],
    "multinomial": [
        lambda: torch.multinomial(P, 3, out=empty(0, dtype=INT64)),
        lambda: torch.multinomial(input=P, num_samples=3, replacement=False, generator=OWN),
        lambda: torch.multinomial(P, 1, True, out=empty(3, 1, dtype=INT64)),
        lambda: torch.multinomial(P, 3, out=empty(3, 3)),
        lambda: torch.multinomial(P, 9),
        lambda: torch.multinomial(-P, 3),
        lambda: torch.multinomial(META, 3),
        lambda: torch.multinomial(P, 9, True, out=empty(0, dtype=INT64)),  # has no key
        lambda: P.bfloat16().multinomial(num_samples=3),
    ],
    "dropout": [
        lambda: F.dropout(input=X.clone(), p=0.3, training=True, inplace=True),
        lambda: F.dropout(META, 0.3),
        lambda: F.dropout(X, p=1.5),
        lambda: F.dropout(X, 0.3, True, False, 7),
        lambda: torch.dropout(input=X, p=0.3, train=False),
        lambda: torch.dropout_(X.clone(), p=0.3, train=True),
        lambda: torch.dropout(X, 0.3),
        lambda: torch.feature_dropout_(C.clone(), p=0.3, train=True),
        lambda: torch.alpha_dropout_(X.clone(), 0.3, True),
        lambda: torch.feature_alpha_dropout_(C.clone(), 0.3, True),
        lambda: F.feature_alpha_dropout(C.clone(), 0.3, True, True),
        lambda: F.dropout3d(C[..., None, None].clone(), inplace=True),
    ],
    "attention": [
        lambda: F.scaled_dot_product_attention(C, C, C, None, 0.3, True, scale=0.2),
        lambda: F.scaled_dot_product_attention(query=C, key=C, value=C, dropout_p=1.0),
        lambda: F.scaled_dot_product_attention(C, C, C, torch.ones(8, 8), 0.3, True),
        lambda: F.scaled_dot_product_attention(C, C, C, dropout_p=1.5),
        lambda: F.scaled_dot_product_attention(*[HEADS.to("meta")] * 3, dropout_p=0.3),
    ],
    "others": [
        lambda: F.gumbel_softmax(logits=X, tau=0.5, hard=True, dim=0),
        lambda: F.fractional_max_pool2d(P[None], 2, (1, 4), None, True),
        lambda: F.fractional_max_pool2d(input=P[None], kernel_size=2, output_ratio=(0.5, 0.5)),
        lambda: F.fractional_max_pool3d(torch.ones(1, 4, 4, 4), 2, output_size=(1, 2, 2)),
        lambda: nn.RReLU(inplace=True)(X.clone()),
        lambda: torch.distributions.Categorical(P).sample(),
        lambda: torch.distributions.RelaxedBernoulli(torch.tensor(1.0), P).rsample(),
        lambda: torch.poisson(P),  # has no key
    ],
}


def form(y: object) -> object:
    if isinstance(y, tuple):
        return [form(part) for part in y]
    assert isinstance(y, Tensor)
    return y.shape, y.dtype, y.device, y.stride(), y.requires_grad


def attempt(function: Form) -> tuple[object, str]:
    try:
        return form(function()), ""
    except Exception as error:
        return type(error), str(error)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")
def test_a_form_of_the_arguments_is_pytorch_s_with_a_key_or_names_the_function(name):
    unkeyed = 0
    for number, function in enumerate(FORMS[name]):
        model = keyed_model(Forward(lambda x, function=function: function()))
        plain, state = attempt(function), torch.get_rng_state()
        given = attempt(lambda model=model: model(None))
        if "must draw from keys; got a call of torch." in given[1]:
            unkeyed += 1
            continue
        assert given[0] == plain[0], (number, plain, given)
        assert torch.equal(torch.get_rng_state(), state)
    assert unkeyed == {"uniform": 1, "randint": 2, "multinomial": 1, "others": 1}.get(name, 0)
