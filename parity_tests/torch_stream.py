"""Calls of PyTorch's random functions, each with its counterpart in `regjax.torch_random`.

Both start from the same state of the generator, and must give the same bits and the same next
state. A cached normal is compared within two units in the last place: PyTorch computes it by the C
library, whose `log1p` differs between versions.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import torch
from torch.nn import functional as F

from regjax import torch_random

SHAPE = (4, 3, 6, 5)
DTYPES = ("float32", "bfloat16", "float16", "float64")
RATES = (1 / 3, 0.45, 0.15, 0.5, 0.999, 1e-9, 5e-324, 0.0, 1.0)
BOUNDS = (
    (-0.5, 1.0),
    (0.0, 1.0),
    (-0.1, 0.3),
    (2.0, 7.0),
    (1000.0, 1000.1),
    (3.0, 3.0),
    (1e-30, 2e-30),
    (-6e4, 5e3),
)
MOMENTS = ((0.0, 1.0), (0.3, 0.02), (-5.0, 0.0))
_CACHE = slice(5024, 5032)

Draw = Callable[[torch_random.TorchGenerator], tuple[Any, torch_random.TorchGenerator]]


@dataclasses.dataclass(frozen=True)
class Call:
    """A call in both frameworks.

    Attributes:
        name: The function, the dtype and the arguments.
        in_torch: Draws from PyTorch's default generator.
        in_jax: Takes a state, and returns a value and the next state.
        dtype: The dtype of the value.
        kind: The function.
        ulps: The largest difference of values in float64, in units in the last place.
        needs_avx2: Whether PyTorch gives the same bits only on CPUs with AVX2.
    """

    name: str
    in_torch: Callable[[], torch.Tensor]
    in_jax: Draw
    dtype: str
    kind: str
    ulps: int = 0
    needs_avx2: bool = False

    def __str__(self) -> str:
        return self.name

    def pairs(self, *, jitted: bool = False) -> Iterator[tuple[str, Any, Any]]:
        """Yield value and state in JAX and in PyTorch, whose default generator draws."""
        with jax.enable_x64(self.dtype in ("float64", "int64")):
            g = torch_random.from_torch(torch.default_generator)
            value, g = (jax.jit(self.in_jax) if jitted else self.in_jax)(g)
            yield f"{self}, value", np.asarray(value), as_numpy(self.in_torch())
            ours, theirs = torch_random.to_torch(g), torch.get_rng_state().numpy()
            one, other = (int(state[_CACHE].view(np.uint64)[0]) for state in (ours, theirs))
            if abs(one - other) <= 2:
                ours[_CACHE] = theirs[_CACHE]
            yield f"{self}, state", ours, theirs


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor as an array, of the dtype of ml_dtypes if it is bfloat16."""
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def skip_words(count: int) -> None:
    """Draw 32-bit words from PyTorch's default generator."""
    torch.rand(count)


def calls() -> Iterator[Call]:
    """Yield all calls."""
    yield from _dropouts()
    yield from _masks()
    yield from _uniforms()
    yield from _normals()
    yield from _integers()
    yield from _layouts()


def _array(shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    """Return numbers of many magnitudes, with zeros, an infinity and a NaN."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=shape) * 10.0 ** rng.integers(-4, 4, shape)
    if x.size > 20:
        x.reshape(-1)[:8] = [0, -0.0, np.inf, np.nan, -np.inf, 1, -1, 6e4]
    return torch.tensor(x).to(getattr(torch, dtype))


_DROPOUTS = {
    "dropout": F.dropout,
    "alpha_dropout": F.alpha_dropout,
    "feature_dropout": torch.feature_dropout,
    "feature_alpha_dropout": torch.feature_alpha_dropout,
}


def _dropout(
    kind: str, x: torch.Tensor, rate: float, label: str = "", train: bool = True, **options: Any
) -> Call:
    dtype = str(x.dtype).removeprefix("torch.")
    ours = functools.partial(getattr(torch_random, kind), jnp.asarray(as_numpy(x)), rate)
    return Call(
        f"{kind}, {dtype}, {label or tuple(x.shape)}, {rate:g}",
        lambda: _DROPOUTS[kind](x, rate, train),
        lambda g: ours(g, deterministic=not train, **options),
        dtype,
        kind,
    )


def _dropouts() -> Iterator[Call]:
    for dtype in DTYPES:
        with jax.enable_x64(dtype == "float64"):
            x = _array(SHAPE, dtype)
            for kind in _DROPOUTS:
                for rate in RATES if dtype in ("float32", "bfloat16") else RATES[:3]:
                    yield _dropout(kind, x, rate)
    x = _array(SHAPE, "float32")
    for kind in _DROPOUTS:
        yield _dropout(kind, x, 0.5, "evaluation", train=False)
    for shape in ((), (0,), (3, 0, 2), (1,), (2, 5)):
        for kind in list(_DROPOUTS)[: 4 if len(shape) > 1 else 2]:
            yield _dropout(kind, _array(shape, "float32"), 0.5)


def _layouts() -> Iterator[Call]:
    x, order = _array(SHAPE, "float32"), (3, 1, 0, 2)
    permuted = x.permute(order).contiguous().permute(*np.argsort(order).tolist())
    channels_last = x.to(memory_format=torch.channels_last)
    volume = _array((2, 3, 2, 4, 3), "float32")
    gaps = _array((8, 3, 6, 10), "float32")[::2, :, :, ::2]
    layouts: dict[str, tuple[torch.Tensor, Any]] = {
        "row-major": (x, (0, 1, 2, 3)),
        "permuted": (permuted, order),
        "channels_last": (channels_last, "channels_last"),
        "channels_last_3d": (volume.to(memory_format=torch.channels_last_3d), "channels_last"),
        "transposed": (x[0, 0].t(), (1, 0)),
        "gaps": (gaps, None),
        "gaps, channels_last": (channels_last[:, :2], "channels_last"),
        "gaps, permuted": (gaps.permute(3, 0, 2, 1), (1, 3, 2, 0)),
        "expanded": (x[:1, :, :1].expand(SHAPE), None),
    }
    for name, (tensor, order) in layouts.items():
        for kind in ("dropout", "alpha_dropout"):
            yield _dropout(kind, tensor, 0.3, name, memory_order=order)
        yield _dropout("feature_dropout", tensor, 0.3, name)
        like = functools.partial(torch.empty_like, tensor)
        shape = tuple(tensor.shape)
        for filled in (
            _filled("bernoulli", like, (0.3, shape), "bernoulli_", (0.3,), memory_order=order),
            _filled("uniform", like, (shape,), "uniform_", (), memory_order=order),
            _filled("normal", like, (shape,), "normal_", (), memory_order=order),
            _filled("randint", like, (shape, 0, 9), "random_", (0, 9), memory_order=order),
        ):
            yield dataclasses.replace(filled, name=f"{filled.name}, {name}")


def _filled(
    kind: str,
    empty: Callable[[], torch.Tensor],
    ours: tuple[Any, ...],
    method: str,
    theirs: tuple[Any, ...],
    dtype: str | None = None,
    **options: Any,
) -> Call:
    """Return a call of a method that fills an empty tensor in place."""
    draw = getattr(torch_random, kind)
    result = dtype or {"bernoulli": "bool", "randint": "int32"}.get(kind, "float32")
    if dtype:
        options["dtype"] = dtype

    def in_torch() -> torch.Tensor:
        return getattr(empty(), method)(*theirs).to(getattr(torch, result))

    return Call(
        f"{kind}, {result}, {tuple(empty().shape)}, {theirs}",
        in_torch,
        lambda g: draw(g, *ours, **options),
        result,
        kind,
    )


def _masks() -> Iterator[Call]:
    for keep_prob in (*RATES, 0.7, 1 - 2**-53, 2**-53, 2**-33, 1 - 2**-32):
        empty = functools.partial(torch.empty, 700)
        yield _filled("bernoulli", empty, (keep_prob, (700,)), "bernoulli_", (keep_prob,))
    yield _filled("bernoulli", lambda: torch.empty(()), (0.5, ()), "bernoulli_", (0.5,))


def _uniforms() -> Iterator[Call]:
    for dtype in DTYPES:
        empty = functools.partial(torch.empty, 2000, dtype=getattr(torch, dtype))
        for low, high in BOUNDS:
            ours = ((2000,), low, high)
            call = _filled("uniform", empty, ours, "uniform_", (low, high), dtype)
            yield dataclasses.replace(call, needs_avx2=(low, high) != (0, 1))
    for shape in ((), (0,), (1,), (2, 3)):
        yield _filled("uniform", functools.partial(torch.empty, shape), (shape,), "uniform_", ())


def _normals() -> Iterator[Call]:
    for dtype in DTYPES:
        for count in (2003, 15, 0, 1, 2, 16, 17, 31, 32):
            moments = MOMENTS if count in (15, 2003) else MOMENTS[:1]
            empty = functools.partial(torch.empty, count, dtype=getattr(torch, dtype))
            for mean, stddev in moments:
                ours = ((count,), mean, stddev)
                call = _filled("normal", empty, ours, "normal_", (mean, stddev), dtype)
                yield dataclasses.replace(call, ulps=2 * (dtype == "float64"), needs_avx2=True)
    yield _filled("normal", lambda: torch.empty(()), ((),), "normal_", ())
    # Axes of size 1 do not make a layout: PyTorch fills it as a row-major one.
    thin = functools.partial(torch.empty, 2, 1, 4, 4, memory_format=torch.channels_last)
    options = {"memory_order": "channels_last"}
    yield _filled("normal", thin, ((2, 1, 4, 4),), "normal_", (), **options)


def _integers() -> Iterator[Call]:
    ranges = {
        "int32": [(-5, 2**28 - 5), (0, 10), (-5, 2**28 - 6), (-(2**31), 2**31), (7, 8)],
        "int64": [(0, 10), (-3, 2**32), (-(2**63), 2**63 - 1), (2**62, 2**63 - 1)],
        "uint8": [(0, 256)],
        "int8": [(-128, 128)],
        "int16": [(-300, 5)],
    }
    for dtype, bounds in ranges.items():
        for low, high in bounds:
            yield Call(
                f"randint, {dtype}, [{low}, {high})",
                lambda low=low, high=high, dtype=dtype: torch.randint(
                    low, high, (40, 5), dtype=getattr(torch, dtype)
                ),
                lambda g, low=low, high=high, dtype=dtype: torch_random.randint(
                    g, (40, 5), low, high, dtype
                ),
                dtype,
                "randint",
            )
    for n in (700, 0, 1, 2, 3):
        yield Call(
            f"permutation, {n}",
            lambda n=n: torch.randperm(n).int(),
            lambda g, n=n: torch_random.permutation(g, n),
            "int32",
            "permutation",
        )


def representatives(table: list[Call]) -> list[Call]:
    """Return every call of dropout in float32, and one or two calls of each function and dtype."""
    chosen, counts = [], collections.Counter()
    for call in table:
        counts[call.kind, call.dtype] += 1
        is_plain = (call.kind, call.dtype) == ("dropout", "float32")
        if is_plain or counts[call.kind, call.dtype] <= 1 + (call.dtype == "float32"):
            chosen.append(call)
    return chosen


def sequence(seed: int, length: int, table: list[Call]) -> list[Call]:
    """Return a random sequence of calls, of all kinds alike."""
    rng = np.random.default_rng(seed)
    kinds = sorted({call.kind for call in table})
    by_kind = {kind: [call for call in table if call.kind == kind] for kind in kinds}
    chosen = [by_kind[rng.choice(kinds)] for _ in range(length)]
    return [alike[rng.integers(len(alike))] for alike in chosen]
