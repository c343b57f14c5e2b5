"""DTensors: every rank draws its part of the mask of the whole tensor, without communication.

A fake process group, whose collectives do nothing, plays the ranks one after the other.
"""

from __future__ import annotations

import ast
import contextlib
import itertools
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import distributed
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    init_device_mesh,
)
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed import fake_pg  # noqa: F401  # registers the backend

import regtorch
from regtorch import keyed
from regtorch._dropout.dtensor import place_of
from tests.regtorch.test_keyed_draws import Forward

KEY = regtorch.key(3)
X = torch.linspace(-2.0, 3.0, 5 * 6 * 7).reshape(5, 6, 7)
IDS = torch.arange(30).reshape(5, 6) % 7
S0, S1, S2, R = Shard(0), Shard(1), Shard(2), Replicate()
# The sizes of the mesh, with a placement for each of its dimensions. Most shards are uneven.
LAYOUTS = [
    ((2,), (S0,)),
    ((2,), (R,)),
    *(
        pytest.param(layout, marks=pytest.mark.slow)
        for layout in [
            ((2, 2), (S0, S1)),
            ((2,), (Shard(-1),)),
            ((4,), (S1,)),
            ((8,), (S0,)),  # three ranks have nothing
            ((2, 2), (S0, S0)),
            ((2, 3), (S2, R)),
            ((2, 3), (R, S1)),
        ]
    ),
]
examples = torch.tensor([9, 2, 40, 7, 7])


def whole_masks_only(key, keep_prob, shape):
    return regtorch.bernoulli(key, keep_prob, shape).flip(0)


FUNCTIONS = {
    "dropout": partial(regtorch.dropout, rate=0.4),
    "tensor rate": partial(regtorch.dropout, rate=torch.tensor(0.4)),
    "everything": partial(regtorch.dropout, rate=1.0),
    "broadcast": partial(regtorch.dropout, rate=0.4, broadcast_dims=(0, 2)),
    "packed": partial(regtorch.dropout, rate=0.4, sampler=regtorch.packed_bernoulli),
    "function": partial(regtorch.dropout, rate=0.4, sampler=whole_masks_only),
    "by example": partial(regtorch.dropout, rate=0.4, sampler=regtorch.by_example(examples)),
    "by example last": partial(
        regtorch.dropout,
        rate=0.4,
        sampler=regtorch.by_example(torch.arange(7), axis=-1),
    ),
    "one example": partial(regtorch.dropout, rate=0.4, sampler=regtorch.by_example(3)),
    "variational": partial(regtorch.variational_dropout, rate=0.4),
    "features": partial(regtorch.feature_dropout, rate=0.4),
    "path": partial(regtorch.drop_path, rate=0.4),
    "alpha": partial(regtorch.alpha_dropout, rate=0.4),
    "connect": partial(regtorch.drop_connect, rate=0.4),
    "gaussian": partial(regtorch.gaussian_dropout, rate=0.4),
    "noise": partial(regtorch.gaussian_noise, stddev=0.4),
    "embedding": lambda x, key: regtorch.embedding_dropout(x, IDS, 0.4, key=key),
    "evaluation": partial(regtorch.dropout, rate=0.4, deterministic=True),
    "tensor flag": partial(regtorch.dropout, rate=0.4, deterministic=torch.tensor(False)),
}


def in_a_model(function):
    """Return a function whose draws have the keys of a converted model."""

    def call(x, key):
        model = keyed.convert(Forward(function))
        keyed.set_key(model, key, 3, examples=examples)
        return model(x)

    return call


FUNCTIONS |= {
    "in a model": in_a_model(lambda x: F.dropout(x, 0.4)),
    "in place": in_a_model(lambda x: F.dropout(x * 1, 0.4, inplace=True)),
    "bernoulli_": in_a_model(lambda x: x * torch.empty_like(x).bernoulli_(0.4)),
    "bernoulli": in_a_model(lambda x: x * torch.bernoulli(x.detach().sigmoid())),
    "rand_like": in_a_model(lambda x: x * torch.rand_like(x)),
    "randn_like": in_a_model(lambda x: x * torch.randn_like(x, dtype=torch.float64)),
    "rrelu": in_a_model(lambda x: F.rrelu(x, training=True)),
}


@contextlib.contextmanager
def as_rank(rank: int, sizes: tuple[int, ...]):
    """Play one rank of a mesh, whose name keeps DTensor from reusing the mesh of another."""
    count = torch.tensor(sizes).prod().item()
    options = {"store": distributed.HashStore(), "rank": rank, "world_size": count}
    distributed.init_process_group("fake", **options)
    try:
        names = tuple(f"{dim} of {rank} in {sizes}" for dim in range(len(sizes)))
        yield init_device_mesh("cpu", sizes, mesh_dim_names=names)
    finally:
        distributed.destroy_process_group()


def shard(x: torch.Tensor, mesh, placements) -> DTensor:
    """Return a DTensor without communication, which a fake group does not have."""
    placements = [Shard(p.dim % x.ndim) if p.is_shard() else p for p in placements]
    shape, start = compute_local_shape_and_global_offset(x.shape, mesh, placements)
    local = x[tuple(slice(s, s + n) for s, n in zip(start, shape, strict=True))]
    options = {"shape": x.shape, "stride": x.stride(), "run_check": False}
    return DTensor.from_local(local, mesh, placements, **options)


@pytest.fixture(scope="module", params=LAYOUTS, ids=str)
def ranks(request):
    """Return for each function the results and gradients of every rank, with their places."""
    sizes, placements = request.param
    found = {name: [] for name in FUNCTIONS}
    for rank in range(int(torch.tensor(sizes).prod())):
        with as_rank(rank, sizes) as mesh:
            for name, function in FUNCTIONS.items():
                x = shard(X, mesh, placements).detach().requires_grad_()
                y = function(x, key=KEY)
                assert y.placements == x.placements
                assert (y.shape, y.stride()) == (X.shape, X.stride())
                y.backward(shard(X.cos(), mesh, placements))
                assert x.grad.placements == x.placements
                span = place_of(x).part
                place = tuple(slice(start, start + size) for start, size in span)
                found[name].append((place, y.detach().to_local(), x.grad.to_local()))
    return found


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_rank_has_its_part_of_the_whole(ranks, name):
    x = X.clone().requires_grad_()
    y = FUNCTIONS[name](x, key=KEY)
    y.backward(X.cos())
    seen = torch.zeros(X.shape, dtype=torch.bool)
    for place, local, grad in ranks[name]:
        assert torch.equal(local, y.detach()[place])
        assert torch.equal(grad, x.grad[place])
        seen[place] = True
    assert seen.all()


Q = torch.linspace(-2.0, 3.0, 2 * 4 * 5 * 6).reshape(2, 4, 5, 6)
NEAREST = torch.ones(5, 5, dtype=torch.bool).tril().triu(-2)
ATTENTION = {
    "plain": {},
    "causal": {"is_causal": True},
    "mask": {"attn_mask": NEAREST},
    "mask of rows": {"attn_mask": NEAREST.expand(2, 1, 5, 5)},
    "grouped": {"enable_gqa": True},
    "other values": {},
}


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("layout", [((2,), (R,)), ((2, 2), (S0, S1))])
def test_attention_is_that_of_the_rows_and_heads_of_the_rank(name, layout):
    sizes, placements = layout
    options = ATTENTION[name]
    key, value = (Q[:, :2], Q[:, :2]) if name == "grouped" else (Q, Q)
    value = value[..., :3] if name == "other values" else value
    attend = lambda *x: F.scaled_dot_product_attention(*x, dropout_p=0.4, **options)

    def run(*tensors):
        model = keyed.convert(Forward(attend))
        keyed.set_key(model, KEY, 3, examples=[5, 9])
        return model(*tensors)

    tensors = [x.clone().requires_grad_() for x in (Q, key, value)]
    whole = run(*tensors)
    whole.backward(whole.detach().cos())
    for rank in range(int(torch.tensor(sizes).prod())):
        with as_rank(rank, sizes) as mesh:
            local = [shard(x.detach(), mesh, placements).requires_grad_() for x in tensors]
            y = run(*local)
            assert (y.shape, y.stride()) == (whole.shape, whole.stride())
            expected = shard(whole.detach(), mesh, placements)
            assert torch.equal(y.to_local(), expected.to_local())
            y.backward(shard(whole.detach().cos(), mesh, placements))
            for x, mine in zip(tensors, local, strict=True):
                grad = shard(x.grad, mesh, placements).to_local()
                torch.testing.assert_close(mine.grad.to_local(), grad)


@pytest.mark.parametrize("block_size", [None, 2])
@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": True},
        {"broadcast_dropout": True, "mask": NEAREST},
        {"sampler": regtorch.by_example([7, 3]), "bias": torch.linspace(0, 1, 20).reshape(4, 5, 1)},
        {
            "query_seq_lengths": torch.tensor([5, 2]),
            "key_value_seq_lengths": torch.tensor([3, 5]),
            "local_window_size": (2, 1),
        },
    ],
)
def test_attention_of_the_library_is_that_of_the_rows_and_heads_of_the_rank(options, block_size):
    q = Q.transpose(1, 2)
    options = options | {"block_size": block_size, "dropout_rng": KEY, "dropout_rate": 0.4}
    whole = regtorch.dot_product_attention(q, q, q, return_residual=True, **options)
    for rank in range(4):
        with as_rank(rank, (2, 2)) as mesh:
            x = shard(q, mesh, [S0, S2])
            found = regtorch.dot_product_attention(x, x, x, return_residual=True, **options)
            for y, of_all in zip(found, whole, strict=True):
                assert y.shape == of_all.shape
                expected = shard(of_all, mesh, [S0, S2]).to_local()
                torch.testing.assert_close(y.to_local(), expected, rtol=1e-6, atol=1e-6)
            y = regtorch.dot_product_attention(x, x, x, **options)
            assert torch.equal(y.to_local(), found[0].to_local())


def partial_sums(mesh):
    return DTensor.from_local(X, mesh, [Partial()])


def strided(mesh):
    return DTensor.from_local(X, mesh, [_StridedShard(0, split_factor=2)], run_check=False)


def uneven(mesh):
    """Return a DTensor whose shape PyTorch derived from a smaller share than this rank's."""
    shape = {"shape": torch.Size((7, 6, 7)), "stride": (42, 7, 1)}
    return DTensor.from_local(X[:2], mesh, [S0], run_check=False, **shape)


drop = partial(regtorch.dropout, rate=0.4)
WRONG = {
    "partial": (partial_sums, drop, "x must have placements Shard and Replicate only"),
    "strided": (strided, drop, "x must have placements Shard and Replicate only"),
    "uneven": (uneven, drop, r"x must hold a part of shape \(4, 6, 7\) of \(7, 6, 7\)"),
    "drop_block": (
        lambda mesh: shard(X, mesh, [S0]),
        lambda x, key: regtorch.drop_block(x, 0.4, block_size=2, key=key),
        "x must be replicated for drop_block",
    ),
    "drop_block with noise": (
        lambda mesh: shard(X, mesh, [S0]),
        lambda x, key: regtorch.drop_block(x, 0.4, block_size=2, key=key, with_noise=True),
        "x must be replicated for drop_block",
    ),
    "examples": (
        lambda mesh: shard(X, mesh, [S0]),
        partial(drop, sampler=regtorch.by_example([0, 1, 2])),
        "examples must have one number for each of the 5 rows",
    ),
    "shared examples": (
        lambda mesh: shard(X, mesh, [S0]),
        partial(drop, sampler=regtorch.by_example(examples), broadcast_dims=(0,)),
        "must not be by_example where the examples share one mask",
    ),
    "sequence": (
        lambda mesh: shard(X[:, None], mesh, [S2]),
        in_a_model(lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.4)),
        "query must be sharded along batch and heads only",
    ),
    "local keys": (
        lambda mesh: shard(X[:, None], mesh, [S0]),
        in_a_model(lambda x: F.scaled_dot_product_attention(x, X, X, dropout_p=0.4)),
        "key must have the placements of query",
    ),
    "heads": (
        lambda mesh: shard(torch.ones(1, 4, 5, 5), mesh, [S1]),
        in_a_model(
            lambda x: F.scaled_dot_product_attention(
                x, *[shard(torch.ones(1, 1, 5, 5), x.device_mesh, [S1])] * 2, None, 0.4
            )
        ),
        "query must have its heads on the ranks of the heads of key that serve them",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_no_rank_can_draw_alone_is_an_error(name):
    make, function, message = WRONG[name]
    with as_rank(0, (2,)) as mesh:
        x = make(mesh)
        with pytest.raises(ValueError, match=message):
            function(x, key=KEY)


def test_replicated_maps_drop_blocks():
    expected = regtorch.drop_block(X, 0.4, block_size=2, key=KEY, with_noise=True)
    with as_rank(1, (2,)) as mesh:
        x = shard(X, mesh, [R])
        y = regtorch.drop_block(x, 0.4, block_size=2, key=KEY, with_noise=True)
        assert torch.equal(y.to_local(), expected)
        z = regtorch.drop_block(x, 0.4, block_size=2, key=KEY)
        assert torch.equal(z.to_local(), regtorch.drop_block(X, 0.4, block_size=2, key=KEY))


def test_places_are_those_of_pytorch():
    for size, (count, *others) in itertools.product(range(9), [(2,), (3,), (4,), (2, 2), (3, 2)]):
        sizes = (count, *others)
        for rank in range(count * (others or [1])[0]):
            with as_rank(rank, sizes) as mesh:
                placements = [S0] * len(sizes)
                x = shard(torch.zeros(size), mesh, placements)
                shape, start = compute_local_shape_and_global_offset((size,), mesh, placements)
                (span,) = place_of(x).part
                assert span.size == shape[0]
                assert span.start == start[0] or not span.size


def test_importing_the_library_does_not_import_dtensor():
    """It takes a second, and is imported where a DTensor exists."""
    files = list(Path(regtorch.__file__).parent.rglob("*.py"))
    assert len(files) > 50
    for file in files:
        body = [ast.unparse(node) for node in ast.parse(file.read_text()).body]
        assert not [
            line
            for line in body
            if line.startswith(("from torch.distributed.", "import torch.dist"))
        ]
