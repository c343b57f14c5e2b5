"""The same mask on every mesh, with the sharding of its input and no communication."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import regjax
from regjax._random import packed as _packed
from regjax._random.threefry import part_index

SAMPLERS = {"exact": regjax.bernoulli, "packed": regjax.packed_bernoulli}
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute")
SHAPES = [(8, 512, 64), (8, 128), (1, 2048, 32), (64, 96), (7, 9), (8,), (0, 8), ()]
# One that packs a sharded axis, one too small to pack, and one without elements;
# each pair of shape and layout is a program of its own.
FEW = [(8, 512, 64), (8, 128), (0, 8)]


@cache
def expected(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return the mask of a single device, without a mesh."""
    return np.asarray(SAMPLERS[name](jax.random.key(4), 0.7, shape))


def specs(shape: tuple[int, ...], names: tuple[str, ...], sizes: dict[str, int]) -> list[P]:
    """Yield every sharding of one axis of the array, and of two."""
    found = [P()]
    for axis, size in enumerate(shape):
        if size == 0:
            return found
        for name in (*names, names):
            devices = np.prod([sizes[n] for n in ([name] if isinstance(name, str) else name)])
            if size % devices == 0:
                found.append(P(*[None] * axis, name))
    if len(names) == len(shape) == 2 and all(
        n % sizes[m] == 0 for n, m in zip(shape, names, strict=True)
    ):
        found.append(P(*names))
    return list(dict.fromkeys(found))


@pytest.mark.parametrize(
    ("mesh_shape", "shapes"),
    [
        pytest.param((2, 4), FEW, id="(2, 4)-few"),
        *(
            pytest.param(mesh, SHAPES, id=str(mesh), marks=pytest.mark.slow)
            for mesh in ((1,), (2,), (4,), (8,), (2, 4))
        ),
    ],
)
@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=str)
@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.sample(2)
def test_the_mask_is_the_same_on_every_mesh(name, kind, mesh_shape, shapes):
    names = ("a", "b")[: len(mesh_shape)]
    mesh = jax.make_mesh(mesh_shape, names, axis_types=(kind,) * len(names))
    sizes = dict(zip(names, mesh_shape, strict=True))
    key, scale = jax.random.key(4), np.float32(2)
    run = jax.jit(lambda x: regjax.dropout(x, 0.3, key=key, sampler=SAMPLERS[name]))
    with jax.set_mesh(mesh):
        for shape in shapes:
            layouts = specs(shape, names, sizes)
            # Each second one has every axis, and every way to share one: the slow cases have all.
            for spec in layouts if shapes is SHAPES else layouts[::-2]:
                x = jax.device_put(jnp.full(shape, scale), NamedSharding(mesh, spec))
                compiled = run.lower(x).compile()
                y = compiled(x)
                assert y.sharding.is_equivalent_to(x.sharding, len(shape)), (shape, spec)
                np.testing.assert_array_equal(
                    np.asarray(y) != 0, expected(name, shape), err_msg=f"{shape} {spec}"
                )
                program = compiled.as_text()
                assert not any(f"{word}(" in program for word in COLLECTIVES), (shape, spec)


@pytest.mark.parametrize("shape", [(7, 9), (33, 5), (8, 509), (63, 96)], ids=str)
@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.sample(2)
def test_odd_sizes_shared_unevenly(name, shape):
    """Unevenly sharded arrays exist only inside a program, where XLA pads them."""
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
    key = jax.random.key(4)
    for axis in range(2):
        layout = NamedSharding(mesh, P(*[None] * axis, "a"))

        @jax.jit
        def run(x, layout=layout):
            x = jax.lax.with_sharding_constraint(x, layout)
            return regjax.dropout(x, 0.3, key=key, sampler=SAMPLERS[name])

        y = run(jnp.ones(shape))
        np.testing.assert_array_equal(np.asarray(y) != 0, expected(name, shape))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=str)
@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.sample(2)
def test_each_device_makes_its_own_part_and_no_more(name, kind, axis):
    """Count operations: a mask that is replicated would need eight times as many."""
    mesh = jax.make_mesh((8,), ("a",), axis_types=(kind,))
    run = jax.jit(lambda x: regjax.dropout(x, 0.3, key=jax.random.key(4), sampler=SAMPLERS[name]))

    def operations(spec: P) -> float:
        x = jax.device_put(jnp.ones((256, 512)), NamedSharding(mesh, spec))
        return run.lower(x).compile().cost_analysis()["flops"]

    with jax.set_mesh(mesh):
        assert operations(P(*[None] * axis, "a")) < 1.1 * operations(P()) / 8


@pytest.mark.parametrize("shared", [(0,), (1,), (0, 1), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=str)
@pytest.mark.sample(3)
def test_a_dimension_that_shares_a_mask_may_be_sharded(kind, shared):
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(kind,) * 2)
    key, x = jax.random.key(4), jnp.ones((2, 8, 16))
    drop = jax.jit(lambda x: regjax.dropout(x, 0.3, key=key, broadcast_dims=shared))
    alone = np.asarray(drop(x))
    with jax.set_mesh(mesh):
        for spec in (P("a", "b"), P(None, "a", "b"), P("a", ("b",), None)):
            y = drop(jax.device_put(x, NamedSharding(mesh, spec)))
            np.testing.assert_array_equal(np.asarray(y), alone)


def test_a_packed_mask_computes_no_index_apart_from_its_words():
    """Every iota has the full shape; XLA:TPU would compute a smaller one in a separate kernel."""
    shape = (4, 6, 8)

    def traced(**options):
        """Return the axis and the shape of each iota, and the pairs of axes that are combined."""
        eqns = jax.make_jaxpr(lambda: part_index(shape, **options))().eqns
        iotas = {e.outvars[0]: e.params for e in eqns if e.primitive.name == "iota"}
        joined = [e.invars for e in eqns if e.primitive.name == "xor"]
        pairs = [[iotas[v]["dimension"] for v in pair if v in iotas] for pair in joined]
        return [(each["dimension"], each["shape"]) for each in iotas.values()], pairs

    # Each axis except the last is combined with the last one twice.
    found = traced(in_place=True)
    assert found == ([(axis, shape) for axis in (0, 2, 1, 2, 2)], [[0, 2], [2], [1, 2], [2]])
    assert traced() == ([(0, (4, 1, 1)), (1, (1, 6, 1)), (2, (1, 1, 8))], [])
    plain, in_place = (part_index(shape, in_place=flag)[1] for flag in (False, True))
    np.testing.assert_array_equal(in_place, plain)
    np.testing.assert_array_equal(plain, np.arange(4 * 6 * 8).reshape(shape))


def test_packed_masks_ask_for_indices_in_place(monkeypatch):
    asked = []

    def spy(*arguments, **options):
        asked.append(options)
        return part_index(*arguments, **options)

    monkeypatch.setattr(_packed, "part_index", spy)
    regjax.packed_bernoulli(jax.random.key(0), 0.3, (64, 3, 64))
    assert asked == [{"in_place": True}]


def test_a_collective_is_seen():
    """Test of the test: a sum over a sharded axis communicates."""
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
    x = jax.device_put(jnp.ones((8, 8)), NamedSharding(mesh, P("a")))
    program = jax.jit(lambda x: x.sum()).lower(x).compile().as_text()
    assert any(f"{word}(" in program for word in COLLECTIVES)


WORKER = """
import sys
import jax
jax.distributed.initialize(f"127.0.0.1:{sys.argv[1]}", 2, int(sys.argv[2]))
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
import regjax

mesh = jax.make_mesh((8,), ("a",), axis_types=(jax.sharding.AxisType.Explicit,))
for sampler in (regjax.bernoulli, regjax.packed_bernoulli):
    for shape, spec in (((8, 512, 64), P("a")), ((8, 512, 64), P(None, "a")), ((64, 96), P("a"))):
        whole = np.asarray(sampler(jax.random.key(4), 0.7, shape))
        layout = NamedSharding(mesh, spec)
        with jax.set_mesh(mesh):
            draw = jax.jit(lambda key: sampler(key, 0.7, shape, out_sharding=layout))
            mask = draw(jax.random.key(4))
        for shard in mask.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), whole[shard.index])
print("agreed on", len(mask.addressable_shards), "of", mask.sharding.num_devices)
"""


@pytest.mark.slow
def test_two_processes_of_four_devices_draw_one_mask(unused_port):
    environment = {"JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"}
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(unused_port), str(process)],
            cwd=Path(__file__).parents[2],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    for worker in workers:
        out, err = worker.communicate(timeout=120)
        assert out == "agreed on 4 of 8\n", err


@pytest.fixture
def unused_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
