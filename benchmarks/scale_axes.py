"""Programs of growing size, with and without dropout or decay, measured on this machine.

A program is a function `run(carry, *rest) -> carry`. Its carry is donated, so that dropout and
updates are in place, as in training. Times are CPU times of all threads of the process, which
hardly depend on what else runs on the machine.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import process_time as clock
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import regjax
from benchmarks import candidates, perceptron, race, sharded_step
from regjax import optim

WITHOUT, DROPOUT, PACKED = "without", "dropout", "dropout, packed"
DECAY, MASKED, PENALTY = "decay", "decay by mask", "L2 penalty"
RATE, RATE_OF_DECAY = 0.1, 0.01
# From a thousand to a billion; powers of two, which packed masks need, in rows of `COLUMNS`.
ELEMENTS = tuple(2**power for power in (10, 13, 17, 20, 23, 27, 30))
COLUMNS = 128
SITES = (1, 2, 5, 10, 20, 50, 100, 200, 500)
LEAVES = (1, 10, 100, 1000, 3000)  # 10,000 take more than half an hour and 19 GB to compile
DEVICES = (1, 2, 4, 8)
GLOBAL = 2**24  # elements on all devices
BATCH, WIDTH, LEAF = 256, 64, 16
# A run of a short program repeats it for this long; a build that takes longer is not repeated.
ENOUGH, LONG = 0.02, 4.0
FILL = 1 / WIDTH  # products of such matrices neither grow nor vanish

Program = Callable[..., Any]


@dataclass(frozen=True)
class Sample:
    """The measurements of programs of one size; each mapping is by candidate.

    Attributes:
        axis: The quantity that grows.
        title: The program.
        at: The size.
        seconds: The time of a call in each round; empty if the program was only compiled.
        trace: The time of tracing in each round.
        compile: The time of compilation in each round.
        bytes: The memory of a call on one device: arguments, results and temporary arrays.
        temporary: The part of it beyond arguments and results.
        instructions: The number of instructions of the compiled program.
        collectives: The number of collective operations.
    """

    axis: str
    title: str
    at: int
    seconds: Mapping[str, list[float]] = field(default_factory=dict)
    trace: Mapping[str, list[float]] = field(default_factory=dict)
    compile: Mapping[str, list[float]] = field(default_factory=dict)
    bytes: Mapping[str, int] = field(default_factory=dict)
    temporary: Mapping[str, int] = field(default_factory=dict)
    instructions: Mapping[str, int] = field(default_factory=dict)
    collectives: Mapping[str, int] = field(default_factory=dict)

    def build(self) -> dict[str, list[float]]:
        """Return the time of tracing and compilation in each round."""
        return {
            name: [one + other for one, other in zip(times, self.compile[name], strict=True)]
            for name, times in self.trace.items()
        }


def elements(quick: bool, rounds: int) -> Iterator[Sample]:
    """Measure dropout of an array, and decay of a parameter in SGD."""
    for size in ELEMENTS[:3] if quick else ELEMENTS:
        x, key = _array(size), _key()
        yield measure("elements", "dropout of one array", size, _dropouts(), (x, key), rounds)
        updates = {
            WITHOUT: optim.sgd(1e-3),
            DECAY: optim.sgd(1e-3, weight_decay=RATE_OF_DECAY),
        }
        yield _measure_updates("elements", "update by SGD", size, updates, x, rounds)


def sites(quick: bool, rounds: int) -> Iterator[Sample]:
    """Measure the gradient of a network with a dropout after each layer."""
    drop = functools.partial(_drop, sampler=regjax.bernoulli)
    for (form, loss), count in (
        (pair, count)
        for pair in perceptron.LOSSES.items()
        for count in (SITES[:3] if quick else SITES)
    ):
        programs = {
            WITHOUT: functools.partial(_descend, loss, perceptron.none),
            DROPOUT: functools.partial(_descend, loss, drop),
        }
        weights = jax.ShapeDtypeStruct((count, WIDTH, WIDTH), jnp.float32)
        x = jax.ShapeDtypeStruct((BATCH, WIDTH), jnp.float32)
        title = f"network, {form} layers"
        yield measure("sites", title, count, programs, (weights, x, _key()), rounds)


def leaves(quick: bool, rounds: int) -> Iterator[Sample]:
    """Measure decay of many small parameters, kernels and biases, in AdamW."""
    adamw = functools.partial(optim.adamw, 1e-3)
    updates = {
        WITHOUT: adamw(weight_decay=0.0),
        DECAY: adamw(weight_decay=RATE_OF_DECAY),
        MASKED: adamw(weight_decay=RATE_OF_DECAY, mask=regjax.decay_mask),
        PENALTY: adamw(weight_decay=0.0),
    }
    for count in LEAVES[:2] if quick else LEAVES:
        names = [("kernel", "bias")[i % 2] for i in range(count)]
        params = {
            f"layer{i // 2:04}/{name}": jax.ShapeDtypeStruct(
                (LEAF, LEAF) if name == "kernel" else (LEAF,), jnp.float32
            )
            for i, name in enumerate(names)
        }
        nested: dict[str, dict[str, Any]] = {}
        for path, leaf in params.items():
            layer, name = path.split("/")
            nested.setdefault(layer, {})[name] = leaf
        yield _measure_updates("leaves", "update by AdamW", count, updates, nested, rounds)


def devices(quick: bool, rounds: int) -> Iterator[Sample]:
    """Measure dropout of an array that is sharded over simulated devices."""
    size = 2**12 if quick else GLOBAL
    for count in DEVICES[:2] if quick else DEVICES:
        mesh = Mesh(np.array(jax.devices()[:count]), ("devices",))
        shards = NamedSharding(mesh, PartitionSpec("devices"))
        x = _array(size, shards)
        whole = NamedSharding(mesh, PartitionSpec())
        key = jax.ShapeDtypeStruct((), _key().dtype, sharding=whole)
        title = "dropout of a sharded array"
        yield measure("devices", title, count, _dropouts(), (x, key), rounds)


AXES = {"elements": elements, "sites": sites, "leaves": leaves, "devices": devices}


def _array(size: int, sharding: jax.sharding.Sharding | None = None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((size // COLUMNS, COLUMNS), jnp.float32, sharding=sharding)


def _key() -> Any:
    return jax.eval_shape(lambda: jax.random.key(0))


def _drop(x: jax.Array, key: jax.Array, sampler: Any) -> jax.Array:
    return regjax.dropout(x, RATE, key=key, sampler=sampler)


def _dropouts() -> dict[str, Program]:
    return {
        WITHOUT: candidates.copy,
        DROPOUT: functools.partial(_drop, sampler=regjax.bernoulli),
        PACKED: functools.partial(_drop, sampler=regjax.packed_bernoulli),
    }


def _descend(
    loss: perceptron.Loss, drop: perceptron.Dropout, weights: Any, x: Any, key: Any
) -> Any:
    keys = jax.random.split(key, len(weights))
    return weights - 1e-3 * jax.grad(loss)(weights, x, keys, drop)


def _update(optimizer: optax.GradientTransformation, penalty: float, carry: Any, grads: Any) -> Any:
    params, state = carry
    if penalty:
        grads = jax.tree.map(jnp.add, grads, jax.grad(regjax.l2_penalty)(params, penalty))
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def _measure_updates(
    axis: str,
    title: str,
    at: int,
    optimizers: Mapping[str, optax.GradientTransformation],
    params: Any,
    rounds: int,
) -> Sample:
    programs = {
        name: functools.partial(_update, optimizer, RATE_OF_DECAY * (name == PENALTY))
        for name, optimizer in optimizers.items()
    }
    states = {name: jax.eval_shape(o.init, params) for name, o in optimizers.items()}
    shapes = {name: ((params, state), params) for name, state in states.items()}
    return measure(axis, title, at, programs, shapes, rounds)


def measure(
    axis: str,
    title: str,
    at: int,
    programs: Mapping[str, Program],
    shapes: tuple[Any, ...] | Mapping[str, tuple[Any, ...]],
    rounds: int,
) -> Sample:
    """Build every candidate several times, and then time calls of them in turns.

    A program that needs more than two fifths of the free memory is compiled and not run.

    Args:
        axis: The quantity that grows.
        title: The program, in words.
        at: The size.
        programs: The candidates.
        shapes: The shapes of the arguments of all candidates, or of each.
        rounds: The number of builds and of runs.
    """
    given = shapes if isinstance(shapes, Mapping) else dict.fromkeys(programs, shapes)
    trace: dict[str, list[float]] = {name: [] for name in programs}
    built: dict[str, list[float]] = {name: [] for name in programs}
    compiled: dict[str, jax.stages.Compiled] = {}
    start = clock()
    for _ in range(rounds):
        for name, program in programs.items():
            jax.clear_caches()  # each candidate traces and compiles everything
            times = [clock()]
            lowered = jax.jit(program, donate_argnums=0).lower(*given[name])
            times.append(clock())
            compiled[name] = lowered.compile()
            times.append(clock())
            trace[name].append(times[1] - times[0])
            built[name].append(times[2] - times[1])
        if clock() - start > LONG:
            break
    memory: dict[str, Any] = {name: one.memory_analysis() for name, one in compiled.items()}
    texts = {name: one.as_text() or "" for name, one in compiled.items()}
    sizes = {name: _bytes(found) for name, found in memory.items()}
    fits = max(sizes.values()) < 0.4 * _free()
    runs = {name: _Walk(compiled[name], _fill(given[name])) for name in programs} if fits else {}
    repeats = _repeats(runs)
    calls = {name: functools.partial(walk, repeats) for name, walk in runs.items()}
    seconds = (
        race.race(title, calls, elements=at, rounds=rounds, clock=clock).seconds if fits else {}
    )
    return Sample(
        axis,
        title,
        at,
        {name: [second / repeats for second in times] for name, times in seconds.items()},
        trace,
        built,
        sizes,
        {name: found.temp_size_in_bytes for name, found in memory.items()},
        {name: text.count(" = ") for name, text in texts.items()},
        {
            name: sum(count for count, _ in sharded_step.collectives(text).values())
            for name, text in texts.items()
        },
    )


def _bytes(memory: Any) -> int:
    whole = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return whole + memory.temp_size_in_bytes - memory.alias_size_in_bytes


def _free() -> float:
    """Return the bytes of free memory; infinity if the system does not report it."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    (line,) = (line for line in lines if line.startswith("MemAvailable"))
    return 1024 * float(line.split()[1])


def _fill(shapes: Any) -> Any:
    """Return arrays of the shapes, with the same numbers for each candidate."""

    def fill(shape: jax.ShapeDtypeStruct) -> jax.Array:
        if jnp.issubdtype(shape.dtype, jax.dtypes.prng_key):
            array = jax.random.key(0)
        else:
            array = jnp.full(shape.shape, FILL if shape.dtype == jnp.float32 else 0, shape.dtype)
        return array if shape.sharding is None else jax.device_put(array, shape.sharding)

    return jax.tree.map(fill, shapes)


class _Walk:
    """A program that each call continues from the last carry."""

    def __init__(self, program: jax.stages.Compiled, arguments: Sequence[Any]) -> None:
        self.program = program
        self.carry, *self.rest = arguments

    def __call__(self, repeats: int) -> None:
        for _ in range(repeats):
            self.carry = jax.block_until_ready(self.program(self.carry, *self.rest))


def _repeats(runs: Mapping[str, _Walk]) -> int:
    """Return how often each run repeats its program, for a clock that resolves it."""
    if not runs:
        return 1
    run = runs[WITHOUT]
    run(1)
    times = []
    for _ in range(3):
        start = clock()
        run(1)
        times.append(clock() - start)
    return max(1, min(1000, int(ENOUGH / statistics.median(times))))
