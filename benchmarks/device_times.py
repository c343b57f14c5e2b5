"""Times of dropout and attention on a GPU or a TPU, beside Flax, jax.nn and rbg keys.

The candidates of a case run in turn. Each time is that of a batch of calls, from the first dispatch
until the last result is ready, over the number of calls: a single call would measure the dispatch.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

import regjax
from benchmarks import candidates
from benchmarks.device_record import Timing
from benchmarks.race import WORK, race

BATCH_SECONDS = 0.01
MOST_CALLS = 20  # in flight at once; more would exhaust the memory of some devices
DTYPES = ("float32", "bfloat16")
RATES = (0.1, 0.5)
ATTENTION_RATE = 0.1
BLOCK = 512
NO_DROPOUT = "no dropout"
RBG = "rbg"


@dataclass(frozen=True)
class Sizes:
    """The sizes of a run.

    Attributes:
        elements: The shape of the arrays of dropout.
        lengths: The numbers of positions of attention.
        batch: The number of sequences.
        heads: The number of heads.
        depth: The size of a head.
        rounds: The number of batches of calls of each candidate.
        rates: The dropout rates.
    """

    elements: tuple[int, int] = (8192, 4096)
    lengths: tuple[int, ...] = (1024, 4096)
    batch: int = 2
    heads: int = 8
    depth: int = 64
    rounds: int = 7
    rates: tuple[float, ...] = RATES


FULL = Sizes()
QUICK = Sizes(lengths=(1024,), rounds=3, rates=(0.1,))
REHEARSAL = Sizes((64, 128), (64,), 1, 2, 64, rounds=1, rates=(0.1,))


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        kind: "dropout" or "attention".
        title: The dtype, the size and the pass.
        base: The candidate that the others are compared with.
        make: Returns the candidates, functions without arguments that return arrays.
        elements: The number of random decisions of a call.
        rounds: The number of batches of calls of each candidate.
    """

    kind: str
    title: str
    base: str
    make: Callable[[], Mapping[str, Callable[[], Any]]]
    elements: int
    rounds: int


def cases(device: Any, sizes: Sizes) -> Iterator[Case]:
    """Yield all cases; the most informative come first, in case the time is up."""
    for dtype in DTYPES:
        for rate in sizes.rates:
            for backward in WORK:
                title = f"{dtype}, rate {rate}, {WORK[backward]}"
                make = functools.partial(_dropouts, device, sizes, dtype, rate, backward)
                base = candidates.COPY
                yield Case("dropout", title, base, make, math.prod(sizes.elements), sizes.rounds)
    for length in sizes.lengths:
        for dtype in DTYPES:
            for backward in WORK:
                title = f"{dtype}, {length:,} positions, {WORK[backward]}"
                make = functools.partial(_attentions, device, sizes, dtype, length, backward)
                weights = sizes.batch * sizes.heads * length**2
                yield Case("attention", title, NO_DROPOUT, make, weights, sizes.rounds)


def measure(case: Case, clock: Callable[[], float] = time.perf_counter) -> Timing:
    """Measure a case; a candidate that does not compile or run is left out, with the reason."""
    runs, left_out = {}, {}
    for name, run in case.make().items():
        try:
            jax.block_until_ready(run())
            runs[name] = run
        except Exception as error:  # compilers have no common class of errors
            left_out[name] = _reason(error)
    if case.base not in runs:
        raise RuntimeError(f"{case.title}: {case.base} does not run: {left_out[case.base]}")
    start = clock()
    jax.block_until_ready(runs[case.base]())
    calls = min(MOST_CALLS, math.ceil(BATCH_SECONDS / max(clock() - start, 1e-6)))
    result = race(
        case.title,
        {name: functools.partial(_batch, run, calls) for name, run in runs.items()},
        elements=case.elements,
        rounds=case.rounds,
        clock=lambda: clock() / calls,
    )
    return Timing(case.kind, case.base, result, calls, left_out)


def _batch(run: Callable[[], Any], calls: int) -> None:
    for _ in range(calls - 1):
        run()
    jax.block_until_ready(run())


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def _dropouts(
    device: Any, sizes: Sizes, dtype: str, rate: float, backward: bool
) -> dict[str, Callable[[], Any]]:
    from flax import linen

    layer = linen.Dropout(rate, deterministic=False)

    def in_flax(x: Any, key: Any) -> Any:
        return layer.apply({}, x, rngs={"dropout": key})

    def in_jax(x: Any, key: Any) -> Any:
        keep = jax.random.bernoulli(key, 1 - rate, x.shape)
        return jnp.where(keep, x / (1 - rate), jnp.zeros((), x.dtype))

    x = jax.device_put(jnp.ones(sizes.elements, dtype), device)
    keys = {impl: jax.device_put(jax.random.key(0, impl=impl), device) for impl in (None, RBG)}
    applies = {candidates.COPY: candidates.copy, **candidates.own(rate)}
    if device.platform == "gpu":
        options = {"sampler": regjax.packed_bernoulli, "implementation": "triton"}
        applies["regjax, packed kernel"] = lambda x, key: regjax.dropout(
            x, rate, key=key, **options
        )
    applies["Flax Linen"] = in_flax
    on_rbg = {"Flax Linen, rbg keys": in_flax, "jax.random, rbg keys": in_jax}
    runs = {name: _jitted(apply, (x,), keys[None], backward) for name, apply in applies.items()}
    return runs | {n: _jitted(apply, (x,), keys[RBG], backward) for n, apply in on_rbg.items()}


def _attentions(
    device: Any, sizes: Sizes, dtype: str, length: int, backward: bool
) -> dict[str, Callable[[], Any]]:
    from flax import linen

    shape = sizes.batch, length, sizes.heads, sizes.depth
    rng = jax.random.key(0)
    arrays = tuple(
        jax.device_put(jax.random.normal(jax.random.fold_in(rng, i), shape, dtype), device)
        for i in range(3)
    )

    def plain(q: Any, k: Any, v: Any, key: Any, implementation: Any = "xla") -> Any:
        return jax.nn.dot_product_attention(q, k, v, implementation=implementation)

    def own(q: Any, k: Any, v: Any, key: Any, **options: Any) -> Any:
        options = {"dropout_rng": key, "dropout_rate": ATTENTION_RATE} | options
        return regjax.dot_product_attention(q, k, v, **options)

    def in_flax(q: Any, k: Any, v: Any, key: Any) -> Any:
        options = {"dropout_rng": key, "dropout_rate": ATTENTION_RATE}
        return linen.dot_product_attention(q, k, v, broadcast_dropout=False, **options)

    applies: dict[str, Callable[..., Any]] = {NO_DROPOUT: plain}
    if device.platform == "gpu":
        applies[f"{NO_DROPOUT}, cuDNN"] = functools.partial(plain, implementation="cudnn")
    block = {"block_size": min(BLOCK, length)}
    packed = {"sampler": regjax.packed_bernoulli}
    forms = {"": {}, ", packed": packed, ", blocks": block, ", packed blocks": block | packed}
    if implementation := {"tpu": "pallas", "gpu": "triton"}.get(device.platform):
        kernels = {"implementation": implementation}
        forms |= {", kernels": kernels, ", packed kernels": kernels | packed}
    applies |= {f"regjax{form}": functools.partial(own, **o) for form, o in forms.items()}
    applies["Flax Linen"] = in_flax
    key = jax.device_put(rng, device)
    return {name: _jitted(apply, arrays, key, backward) for name, apply in applies.items()}


def _jitted(apply: Callable[..., Any], arrays: Any, key: Any, backward: bool) -> Callable[[], Any]:
    """Return a function without arguments; with `backward` it includes the gradients."""

    def forward(key: Any, *arrays: Any) -> Any:
        return apply(*arrays, key)

    def both(key: Any, *arrays: Any) -> Any:
        y, pull_back = jax.vjp(functools.partial(forward, key), *arrays)
        return y, pull_back(arrays[0])  # the values of the cotangent do not matter

    return functools.partial(jax.jit(both if backward else forward), key, *arrays)
