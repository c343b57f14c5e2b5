"""`regtorch.keyed`: every function of PyTorch that draws, with the value that its key gives."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import regtorch
from regtorch import keyed
from regtorch.keyed import dropouts
from regtorch.keyed.replacements import REPLACEMENTS
from regtorch.keyed.streams import uniform

ROOT = regtorch.key(7)
X = torch.linspace(-2.0, 3.0, 24).reshape(3, 8)
P = torch.rand(3, 8, generator=torch.Generator().manual_seed(0))
REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Forward(nn.Module):
    """A module whose forward is a function."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def at(name: str, step: int = 0) -> Tensor:
    return regtorch.site_key(ROOT, step, name)


def keyed_model(model: nn.Module, step: int = 0) -> nn.Module:
    keyed.set_key(keyed.convert(model), ROOT, step)
    return model


def bits_of(key: Tensor, *shape: int) -> Tensor:
    return regtorch.bits(key, shape).to(torch.int64)


def u(key: Tensor, *shape: int) -> Tensor:
    """Return the documented uniform variates, in float32."""
    return ((1 - 2.0**-24) - (bits_of(key, *shape) >> 9).double() * 2.0**-23).float()


def mask(key: Tensor, p) -> Tensor:
    return (bits_of(key, 3, 8) >> 9).lt(torch.ceil(torch.as_tensor(p) * 2.0**23)).float()


def empty(*shape: int, dtype=torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype)


C = torch.ones(3, 8, 2)
# The functions of dropout, which draw in evaluation too if they are called with training=True.
DROPOUT = {
    "F.dropout": (lambda: F.dropout(X, 0.3), lambda k: regtorch.dropout(X, 0.3, key=k)),
    "default": (lambda: F.dropout(X), lambda k: regtorch.dropout(X, 0.5, key=k)),
    "names": (
        lambda: F.dropout(input=X, training=True, p=0.3),
        lambda k: regtorch.dropout(X, 0.3, key=k),
    ),
    "everything": (lambda: F.dropout(X, 1.0), lambda k: torch.zeros(3, 8)),
    "dropout1d": (lambda: F.dropout1d(C, 0.3), lambda k: regtorch.feature_dropout(C, 0.3, key=k)),
    "unbatched": (
        lambda: F.dropout1d(C[0], 0.3),
        lambda k: regtorch.feature_dropout(C[0], 0.3, key=k, channel_axis=0),
    ),
    "dropout2d": (
        lambda: F.dropout2d(C[..., None], 0.3),
        lambda k: regtorch.feature_dropout(C[..., None], 0.3, key=k),
    ),
    "dropout3d": (
        lambda: F.dropout3d(C[..., None, None], 0.3),
        lambda k: regtorch.feature_dropout(C[..., None, None], 0.3, key=k),
    ),
    "alpha_dropout": (
        lambda: F.alpha_dropout(X, 0.3, training=True),
        lambda k: regtorch.alpha_dropout(X, 0.3, key=k),
    ),
    "feature_alpha_dropout": (
        lambda: F.feature_alpha_dropout(C, 0.3, training=True),
        lambda k: regtorch.feature_alpha_dropout(C, 0.3, key=k),
    ),
    "torch.dropout": (
        lambda: torch.dropout(X, 0.3, True),
        lambda k: regtorch.dropout(X, 0.3, key=k),
    ),
    "torch.feature_dropout": (
        lambda: torch.feature_dropout(C, 0.3, train=True),
        lambda k: regtorch.feature_dropout(C, 0.3, key=k),
    ),
    "torch.alpha_dropout": (
        lambda: torch.alpha_dropout(X, 0.3, True),
        lambda k: regtorch.alpha_dropout(X, 0.3, key=k),
    ),
    "torch.feature_alpha_dropout": (
        lambda: torch.feature_alpha_dropout(C, 0.3, True),
        lambda k: regtorch.feature_alpha_dropout(C, 0.3, key=k),
    ),
}
# The others, which are left to PyTorch in evaluation.
OTHERS = {
    "bernoulli_": (lambda: empty(3, 8).bernoulli_(0.3), lambda k: mask(k, 0.3)),
    "bernoulli_, halves": (lambda: empty(3, 8).bernoulli_(), lambda k: mask(k, 0.5)),
    "bernoulli_, a tensor": (lambda: empty(3, 8).bernoulli_(P), lambda k: mask(k, P)),
    "bernoulli_, a row": (lambda: empty(3, 8).bernoulli_(P[0]), lambda k: mask(k, P[0])),
    "torch.bernoulli": (lambda: torch.bernoulli(P), lambda k: mask(k, P)),
    "torch.bernoulli, p": (lambda: torch.bernoulli(X, 0.3), lambda k: mask(k, 0.3)),
    "Tensor.bernoulli": (lambda: P.bernoulli(), lambda k: mask(k, P)),
    "rand": (lambda: torch.rand(3, 8), lambda k: u(k, 3, 8)),
    "rand, a shape": (lambda: torch.rand((3, 8)), lambda k: u(k, 3, 8)),
    "rand, the generator": (
        lambda: torch.rand(5, generator=torch.default_generator),
        lambda k: u(k, 5),
    ),
    "rand, float64": (lambda: torch.rand(5, dtype=torch.float64), lambda k: uniform64(k, 5)),
    "rand, out": (lambda: torch.rand(5, out=empty(5)), lambda k: u(k, 5)),
    "rand_like": (lambda: torch.rand_like(X), lambda k: u(k, 3, 8)),
    "uniform_": (lambda: empty(5).uniform_(2, 4), lambda k: u(k, 5) * 2 + 2),
    "uniform_, rounded": (
        lambda: empty(99).uniform_(1, 1 + 2**-23),  # never reaches the upper end
        lambda k: torch.ones(99),
    ),
    "uniform_, names": (
        lambda: empty(5).uniform_(**{"from": -1, "to": 1}),
        lambda k: u(k, 5) * 2 - 1,
    ),
    "randn": (lambda: torch.randn(3, 8), lambda k: regtorch.normal(k, (3, 8))),
    "randn_like": (
        lambda: torch.randn_like(X, dtype=torch.float64),
        lambda k: regtorch.normal(k, (3, 8), torch.float64),
    ),
    "normal_": (lambda: empty(5).normal_(1, std=2), lambda k: regtorch.normal(k, (5,)) * 2 + 1),
    "torch.normal": (
        lambda: torch.normal(1.0, 2.0, (5,)),
        lambda k: regtorch.normal(k, (5,)) * 2 + 1,
    ),
    "torch.normal, tensors": (
        lambda: torch.normal(X, P),
        lambda k: regtorch.normal(k, (3, 8)) * P + X,
    ),
    "torch.distributions": (
        lambda: torch.distributions.Normal(X, P).rsample(),
        lambda k: regtorch.normal(k, (3, 8)) * P + X,
    ),
    "randint": (lambda: torch.randint(10, (5,)), lambda k: bits_of(k, 5) * 10 >> 32),
    "randint, low": (
        lambda: torch.randint(-5, 10, (5,), dtype=torch.int32),
        lambda k: (bits_of(k, 5) * 15 >> 32).int() - 5,
    ),
    "randint, names": (
        lambda: torch.randint(high=10, size=(5,)),
        lambda k: bits_of(k, 5) * 10 >> 32,
    ),
    "randint_like": (
        lambda: torch.randint_like(input=X, low=2, high=9),
        lambda k: (bits_of(k, 3, 8) * 7 >> 32).float() + 2,
    ),
    "random_": (lambda: empty(5).random_(1, to=4), lambda k: (bits_of(k, 5) * 3 >> 32).float() + 1),
    "randperm": (lambda: torch.randperm(9), lambda k: bits_of(k, 9).argsort(stable=True)),
    "exponential_": (lambda: empty(5).exponential_(2), lambda k: -u(k, 5).log() / 2),
    "gumbel_softmax": (
        lambda: F.gumbel_softmax(X, tau=0.5),
        lambda k: torch.softmax((X - (-u(k, 3, 8).log()).log()) / 0.5, -1),
    ),
    "multinomial": (
        lambda: torch.multinomial(P, 3),
        lambda k: (P / -u(k, 3, 8).log()).topk(3).indices,
    ),
    "rrelu": (
        lambda: F.rrelu(X, 0.2, 0.4, training=True),
        lambda k: torch.where(X > 0, X, X * (u(k, 3, 8) * (0.4 - 0.2) + 0.2)),
    ),
    "max pool": (
        lambda: F.fractional_max_pool2d(P[None], 2, output_size=(1, 4)),
        lambda k: F.fractional_max_pool2d(
            P[None], 2, output_size=(1, 4), _random_samples=u(k, 1, 1, 2)
        ),
    ),
}


def uniform64(key: Tensor, size: int) -> Tensor:
    """Return the uniform variates in float64, from whole numbers."""
    half = regtorch.normal(key, (size,), torch.float64)  # the same bits, by inversion
    return torch.special.ndtr(-half)


@pytest.mark.parametrize("name", DROPOUT | OTHERS)
def test_a_function_draws_from_the_key_of_its_module(name):
    function, value = (DROPOUT | OTHERS)[name]
    model = keyed_model(nn.Sequential(Forward(lambda x: function())), step=5)
    state = torch.get_rng_state()
    tolerance = {"rtol": 0, "atol": 1e-15 if "float64" in name else 0}
    torch.testing.assert_close(model(X), value(at("0", 5)), **tolerance)
    assert torch.equal(torch.get_rng_state(), state)
    assert keyed.sites(model) == ["0"]
    # In evaluation dropout is keyed too, and everything else is PyTorch's.
    model.eval()
    keyed.set_key(model, ROOT, 6)
    if name in DROPOUT:
        assert torch.equal(model(X), value(at("0", 6)))
        assert torch.equal(torch.get_rng_state(), state)
    else:
        torch.manual_seed(1)
        y = model(X)
        torch.manual_seed(1)
        assert torch.equal(y, function())


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.dropout(x, 0.3, inplace=True),
        lambda x: torch.dropout_(x, 0.3, True),
        lambda x: nn.Dropout(0.3, inplace=True)(x),
    ],
)
def test_a_function_in_place_writes_to_its_input(function):
    x = X.clone()
    assert keyed_model(nn.Sequential(Forward(function)))(x) is x
    assert torch.equal(x, regtorch.dropout(X, 0.3, key=at("0")))


def test_each_draw_of_a_call_has_a_number_and_each_repetition_its_own():
    model = nn.Sequential(Forward(lambda x: torch.stack([torch.rand(4) for _ in range(3)])))
    keyed_model(model, 2)
    y, again = model(X), model(X)
    assert torch.equal(y, torch.stack([u(at(name, 2), 4) for name in ("0", "0:1", "0:2")]))
    assert torch.equal(again, torch.stack([u(at(n, 2), 4) for n in ("0#1", "0:1#1", "0:2#1")]))
    assert keyed.sites(model) == ["0", "0:1", "0:2"]
    assert keyed.sites(model[0]) == ["0", "0:1", "0:2"]


def test_a_draw_belongs_to_the_innermost_module_and_sites_are_in_the_order_of_drawing():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused, self.inner = nn.Dropout(0.5), nn.Dropout(0.5)

        def forward(self, x):
            return F.dropout(self.inner(F.dropout(x, 0.5)), 0.5)

    model = nn.Sequential(Block(), nn.Dropout(0.5))
    assert keyed.sites(keyed_model(model)) == ["0.unused", "0.inner", "1"]
    x = X
    for name in ("0", "0.inner", "0:1", "1"):
        x = regtorch.dropout(x, 0.5, key=at(name))
    assert torch.equal(model(X), x)
    assert keyed.sites(model) == ["0", "0.inner", "0:1", "1", "0.unused"]


def test_a_generator_of_the_caller_is_left_alone():
    own = torch.Generator().manual_seed(3)
    y = keyed_model(Forward(lambda x: torch.rand(3, generator=own)))(X)
    assert torch.equal(y, torch.rand(3, generator=torch.Generator().manual_seed(3)))


def test_a_registered_function_draws_from_the_key(monkeypatch):
    monkeypatch.delitem(REPLACEMENTS, torch.poisson)
    keyed.register(torch.poisson, lambda key, rate: rate + u(key, *rate.shape))
    assert torch.equal(keyed_model(Forward(torch.poisson))(P), P + u(at(""), 3, 8))


@pytest.mark.parametrize("dtype", REAL)
def test_uniform_variates_lie_below_1_on_the_grid_of_their_dtype(dtype):
    digits = {torch.float16: 11, torch.bfloat16: 8, torch.float32: 24, torch.float64: 53}[dtype]
    y = uniform(at("a"), (2**18,), dtype)
    assert y.dtype == dtype
    assert 0 <= y.min() < y.max() < 1
    scaled = y.double() * 2.0**digits
    assert torch.equal(scaled, scaled.floor())
    if dtype.itemsize >= 4:
        assert (scaled % 2 == 1).all()  # centers of intervals: never 0
    # The mean of n uniform variates lies within 6 sigma; half types are truncated.
    mean = 0.5 - (2.0 ** -(digits + 1) if dtype.itemsize == 2 else 0)
    assert abs(y.double().mean() - mean) < 6 / math.sqrt(12 * 2**18)


# DropPath as written in timm and torchvision, in Hugging Face's models, and in older timm.
def by_bernoulli(x, rate, training):
    if rate == 0 or not training:
        return x
    keep = 1 - rate
    noise = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
    return x * noise.div_(keep)


def by_floor(x, rate, training):
    if rate == 0 or not training:
        return x
    keep = 1 - rate
    noise = keep + torch.rand((x.shape[0],) + (1,) * (x.ndim - 1), dtype=x.dtype)
    return x.div(keep) * noise.floor_()


class DropPath(nn.Module):
    def __init__(self, rate, form) -> None:
        super().__init__()
        self.rate, self.form = rate, form

    def forward(self, x):
        return self.form(x, self.rate, self.training)


@pytest.mark.parametrize("form", [by_bernoulli, by_floor])
@pytest.mark.parametrize("rate", [0.1, 0.25, 0.3, 1 / 3, 0.5])
def test_drop_path_keeps_the_rows_of_ours(form, rate):
    x = torch.ones(4096, 1)
    model = keyed_model(nn.Sequential(DropPath(rate, form)), step=1)
    expected = regtorch.drop_path(x, rate, key=at("0", 1))
    torch.testing.assert_close(model(x), expected, rtol=2e-7, atol=0)
    assert torch.equal(model(x) == 0, regtorch.drop_path(x, rate, key=at("0#1", 1)) == 0)
    assert model.eval()(x) is x


def test_a_guard_observes_masks_and_expects_none_where_other_numbers_are_drawn():
    model = nn.Sequential(nn.Linear(8, 8), DropPath(0.5, by_bernoulli), DropPath(0.5, by_floor))

    def train_step(step):
        keyed.set_key(keyed.convert(model), ROOT, step)
        model(torch.cat([X] * 16)).sum().backward()

    train_step(0)
    report = regtorch.check_dropout(train_step, expect=keyed.sites(model))
    assert report.findings == ()
    assert [(row.site, row.rates) for row in report.rows] == [("1", (0.5,))]


def test_floor_of_keep_prob_plus_uniform_is_bernoulli_at_every_edge():
    """Check each rate at the 5 variates around its threshold, where the two could differ."""
    keep_prob = torch.linspace(0.5, 1, 9973, dtype=torch.float64)[:-1].float()
    near = torch.ceil(keep_prob.double() * 2**23)[:, None] + torch.arange(-2.0, 3.0)
    number = near.clamp(max=2.0**23 - 1).to(torch.float64)
    variate = ((1 - 2.0**-24) - number * 2.0**-23).float()
    kept = torch.floor(keep_prob[:, None] + variate) == 1
    assert torch.equal(kept, number < torch.ceil(keep_prob.double() * 2**23)[:, None])


@pytest.mark.parametrize("masks", ["none", "bool", "float", "causal", "all masked"])
@pytest.mark.parametrize("options", [{}, {"scale": -0.3}, {"enable_gqa": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_attention_as_a_function_drops_the_weights_of_ours(masks, options, dtype, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    heads = 2 if options.get("enable_gqa") else 4
    sizes = ((2, 4, 5, 8), (2, heads, 6, 8), (2, heads, 6, 3))
    q, k, v = (torch.randn(size, generator=generator).to(dtype) for size in sizes)
    allowed = torch.rand(2, 1, 5, 6, generator=generator) > 0.3
    if masks == "all masked":
        allowed[0, 0, 2] = False
    given = {"bool": allowed, "all masked": allowed, "float": torch.where(allowed, P[0, 0], -2.0)}
    mask = given.get(masks)
    mask = mask.to(dtype) if masks == "float" else mask
    call = options | {"attn_mask": mask, "is_causal": masks == "causal"}
    model = keyed_model(
        Forward(lambda *x: F.scaled_dot_product_attention(*x, dropout_p=0.25, **call))
    )
    bool_mask, bias = (mask, None) if masks != "float" else (None, mask)
    expected = regtorch.dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)),
        bias,
        bool_mask,
        dropout_rng=at(""),
        dropout_rate=0.25,
        is_causal=masks == "causal",
        scale=options.get("scale"),
    ).transpose(1, 2)
    tolerance = (
        {"rtol": 1e-12, "atol": 1e-13} if dtype == torch.float64 else {"rtol": 0.02, "atol": 0.02}
    )
    torch.testing.assert_close(model(q, k, v), expected, **tolerance)
    # With nothing dropped it is PyTorch's own, in its explicit form.
    monkeypatch.setattr(dropouts, "dropout", lambda x, rate, **options: x)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        whole = F.scaled_dot_product_attention(q, k, v, **call)
    if masks != "all masked":
        assert torch.equal(model(q, k, v), whole)
    else:
        torch.testing.assert_close(model(q, k, v), whole)


def test_attention_under_autocast_has_the_dtype_and_the_mask_of_autocast():
    q = torch.randn(2, 4, 5, 8, generator=torch.Generator().manual_seed(0))
    model = keyed_model(Forward(lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.25)))
    with torch.autocast("cpu", torch.bfloat16):
        y = model(q)
    assert y.dtype == torch.bfloat16
    keyed.set_key(model, ROOT, 0)
    assert torch.equal(y, model(q.bfloat16()))


def test_embeddings_dropped_before_and_after_attention_have_gradients():
    layer = nn.MultiheadAttention(8, 2, dropout=0.5)
    model = keyed_model(layer)
    x = X[:, None].clone().requires_grad_()
    y = model(x, x, x, need_weights=False)[0].square().sum()
    (gradient,) = torch.autograd.grad(y, x)
    keyed.set_key(model, ROOT, 0)
    by_weights = model(x, x, x)[0].square().sum()  # the other form draws the same mask
    torch.testing.assert_close(by_weights, y)
    torch.testing.assert_close(torch.autograd.grad(by_weights, x)[0], gradient)


def test_every_function_with_the_tag_of_a_draw_is_known():
    tag, missing = torch.Tag.nondeterministic_seeded, []
    operators = (name.split("::") for name in torch._C._dispatch_get_all_op_names())
    for name in sorted({name.split(".")[0] for home, name in operators if home == "aten"}):
        packet = getattr(torch.ops.aten, name)
        overloads = packet.overloads() if hasattr(packet, "overloads") else []
        if any(tag in getattr(packet, overload).tags for overload in overloads):
            for place in (torch, torch.Tensor, F):
                function = getattr(place, name, None)
                private = name.startswith(("_", "miopen")) and function is not torch._standard_gamma
                if callable(function) and not private and function not in REPLACEMENTS:
                    missing.append((place.__name__, name))
    assert missing == []
