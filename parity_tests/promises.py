"""Every promise of equal bits in the documentation, as a table that can be checked.

A promise yields labeled pairs of arrays that must have the same bits. The process determines the
instruction set: `parity_tests.instruction_sets` starts one for each setting. Streams of random
numbers are also compared with digests, and so across processes.

    python -m parity_tests.promises --core  # a line of JSON for each promise: the differences

The table and the functions that it names stay in one file, as a promise is a row and a function.
"""

# ruff: noqa: B023  # each function made in a loop is called in the same turn

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import torch

import regjax
import regjax.optim
import regtorch
from parity_tests import torch_loaders, torch_models, torch_stream
from parity_tests.frameworks import FRAMEWORKS, JAX, TORCH, Framework
from parity_tests.instructions import float16_error
from parity_tests.optimizers import CASES
from parity_tests.optimizers.case import Case
from parity_tests.output import Parser, run
from parity_tests.trajectories import WALKS, synthetic

Pairs = Iterator[tuple[str, Any, Any]]


@dataclasses.dataclass(frozen=True)
class Promise:
    """A promise of equal bits.

    Attributes:
        name: The promise, in a few words.
        place: Where it is documented.
        pairs: Yields a label and two arrays, or two digests, that must be equal.
        package: The optional package that it requires.
        needs_float16: Whether it holds only where XLA compiles float16.
        needs_fma: Whether it holds only where both frameworks have fused multiply-adds or neither.
        needs_avx2: Whether it holds only where PyTorch uses AVX2 or AVX-512.
        is_core: Whether `make test` checks it under other instruction sets, too.
    """

    name: str
    place: str
    pairs: Callable[[], Pairs]
    package: str | None = None
    needs_float16: bool = False
    needs_fma: bool = False
    needs_avx2: bool = False
    is_core: bool = False

    def broken(self) -> list[str]:
        """Return the differences, one line for each pair; nothing if the promise holds."""
        lines: list[str] = []
        try:
            lines.extend(_difference(label, *pair) for label, *pair in self.pairs())
            if not lines:
                lines.append("nothing was compared")
        except Exception as error:  # an error breaks the promise
            lines.append(f"{type(error).__name__}: {str(error).splitlines()[0]}")
        return list(filter(None, lines))

    def can_be_checked(self) -> bool:
        """Return whether its package can be imported, and XLA compiles float16 if it needs that."""
        if self.needs_float16 and float16_error():
            return False
        return self.package is None or importlib.util.find_spec(self.package) is not None


def _difference(label: str, one: Any, other: Any) -> str:
    if isinstance(one, str):
        return "" if one == other else f"{label}: digest {one} instead of {other}"
    one, other = np.asarray(one), np.asarray(other)
    if one.dtype != other.dtype or one.shape != other.shape:
        return f"{label}: {one.dtype}{one.shape} and {other.dtype}{other.shape}"
    # The sign of a NaN is not promised.
    words = one.view(f"u{one.itemsize}") != other.view(f"u{other.itemsize}")
    different = np.count_nonzero(words & ((one == one) | (other == other)))
    return f"{label}: {different} of {one.size} elements" if different else ""


# The family of dropout -----------------------------------------------------------------------

SHAPE = (16, 6, 4, 48)  # rows, two spatial dimensions, channels; 4,608 elements fill packed masks


def _ids(framework: Framework) -> Any:
    return framework.array(np.random.default_rng(1).integers(0, 50, SHAPE[:-1]))


def _embedding(framework: Framework, x: Any, rate: Any) -> Any:
    return framework.library.embedding_dropout(x, _ids(framework), rate, key=framework.key(3))


def _drop_connect(framework: Framework, x: Any, rate: Any) -> Any:
    return framework.library.drop_connect({"kernel": x}, rate, key=framework.key(3))["kernel"]


def _call(name: str, framework: Framework, x: Any, rate: Any, **options: Any) -> Any:
    if isinstance(sampler := options.get("sampler"), str):
        options["sampler"] = getattr(framework.library, sampler)
    return getattr(framework.library, name)(x, rate, key=framework.key(3), **options)


def _member(name: str, **options: Any) -> Callable[[Framework, Any, Any], Any]:
    return functools.partial(_call, name, **options)


FAMILY: dict[str, Callable[[Framework, Any, Any], Any]] = {
    "dropout": _member("dropout"),
    "dropout, packed": _member("dropout", sampler="packed_bernoulli"),
    "dropout, shared mask": _member("dropout", broadcast_dims=(1, 3)),
    "feature_dropout": _member("feature_dropout", channel_axis=3),
    "drop_path": _member("drop_path"),
    "variational_dropout": _member("variational_dropout", time_axis=1),
    "embedding_dropout": _embedding,
    "alpha_dropout": _member("alpha_dropout"),
    "alpha_dropout, packed": _member("alpha_dropout", sampler="packed_bernoulli"),
    "feature_alpha_dropout": _member("feature_alpha_dropout", channel_axis=3),
    "gaussian_dropout": _member("gaussian_dropout"),
    "gaussian_noise": _member("gaussian_noise"),
    "drop_block": _member("drop_block", block_size=3, channel_axis=3),
    "drop_connect": _drop_connect,
}


def inputs(dtype: Any, shape: tuple[int, ...] = SHAPE) -> list[np.ndarray]:
    """Return an input and a cotangent."""
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape).astype(dtype) for _ in range(2)]


def _forward_and_backward(
    member: Callable[..., Any], framework: Framework, dtype: Any
) -> Callable[[Any], list[np.ndarray]]:
    """Return a function of a rate; a NumPy scalar is traced in JAX, and a tensor in PyTorch."""
    arrays = [framework.array(array) for array in inputs(dtype)]

    def run(rate: Any) -> Any:
        return framework.vjp(lambda x: member(framework, x, rate), *arrays)

    traced = jax.jit(run) if framework is JAX else lambda rate: run(torch.tensor(rate))

    def call(rate: Any) -> list[np.ndarray]:
        pair = traced(rate) if isinstance(rate, np.generic) else run(rate)
        return [framework.numpy(array) for array in pair]

    return call


def family(
    rates: Iterable[Any], dtypes: Iterable[Any] = (np.float32,), names: Iterable[str] = FAMILY
) -> Pairs:
    """Compare each function, forward and backward, at numbers and at traced rates."""
    for dtype in map(np.dtype, dtypes):
        with jax.enable_x64(dtype.itemsize == 8):
            for name in names:
                in_jax, in_torch = (
                    _forward_and_backward(FAMILY[name], w, dtype) for w in FRAMEWORKS
                )
                for rate in rates:
                    label = f"{name}, {dtype}, {type(rate).__name__} {rate}"
                    for direction, one, two in zip("yg", in_jax(rate), in_torch(rate), strict=True):
                        yield f"{label}, {direction}", one, two


# Functions whose scale a compiler may contract with a later sum; see the docstring of `dropout`.
NOT_BEFORE_A_SUM = {
    "dropout, shared mask",
    "feature_dropout",
    "drop_path",
    "variational_dropout",
    "embedding_dropout",
    "feature_alpha_dropout",
}


def compiled(names: Iterable[str] = FAMILY) -> Pairs:
    """Compare each function between products and sums under jit, also with a product as rate."""
    x, other = inputs(np.float32)
    part = np.sqrt(np.float32(0.3))

    def run(framework: Framework, name: str, rate: Any, x: Any, other: Any, part: Any) -> Any:
        share = part * part if rate is None else rate
        y = FAMILY[name](framework, x * other, share)
        return y if name in NOT_BEFORE_A_SUM else y + other

    for name, rate in ((name, rate) for name in names for rate in (0.3, None)):
        in_jax = jax.jit(functools.partial(run, JAX, name, rate))(x, other, part)
        in_torch = run(TORCH, name, rate, *map(torch.tensor, (x, other, part)))
        yield f"{name}, {rate or 'a product as rate'}", in_jax, in_torch.numpy()


def many_rates(count: int, dtypes: Iterable[Any] = (np.float32, np.float64)) -> Pairs:
    """Compare traced rates from 0.001 to 0.999 where the scale takes more than a quotient."""
    values = np.random.default_rng(2).uniform(0.001, 0.999, count)
    few = slice(0, count, 20)
    names = ["dropout", "alpha_dropout", "gaussian_dropout"]
    members = {name: FAMILY[name] for name in names}
    for dtype in map(np.dtype, dtypes):
        with jax.enable_x64(dtype.itemsize == 8):
            x = np.ones((2,), dtype)
            for name, member in members.items():
                in_jax = jax.jit(lambda r, x=x, member=member: member(JAX, jnp.asarray(x), r))
                rates = values.astype(dtype)
                one = np.stack([np.asarray(in_jax(rate)) for rate in rates])
                tensors = torch.tensor(rates)
                two = [member(TORCH, torch.tensor(x), rate).numpy() for rate in tensors]
                yield f"{name}, {dtype}, traced", one, np.stack(two)
                eager = [member(JAX, jnp.asarray(x), jnp.asarray(rate)) for rate in rates[few]]
                twins = [member(TORCH, torch.tensor(x), float(rate)) for rate in rates[few]]
                yield f"{name}, {dtype}, eager", np.stack(eager), np.stack(twins)


# Streams of random numbers -------------------------------------------------------------------

KEEP_PROBS = (0.0, 1e-7, 0.123, 0.5, 0.7, 0.999, 1.0)
# Halves of SHA-256, of arrays that the tests compare with the NumPy reference.
DIGESTS = {
    "bernoulli": "f03999b46a20f33afc521bc337d4b97e",
    "packed_bernoulli": "ac0fc0f70dae4641bdbca4bd0b9bebb4",
    "normal": "d56a958dafcbe9ffce867ae82b3d540e",
    "keys": "90281c0a101d43dbc05fc383ecbc64a7",
    "schedules": "485450d5b4ff35ab3d2504609c93b750",
}


def digest(arrays: Iterable[np.ndarray]) -> str:
    """Return half of the SHA-256 of the bytes of some arrays."""
    found = hashlib.sha256()
    for array in arrays:
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:32]


def _stream(name: str, draw: Callable[[Framework], list[np.ndarray]]) -> Pairs:
    """Compare the two packages with each other, and each with a digest that never changes."""
    drawn = [draw(framework) for framework in FRAMEWORKS]
    for number, pair in enumerate(zip(*drawn, strict=True)):
        yield f"{name} {number}", *pair
    for framework, arrays in zip(FRAMEWORKS, drawn, strict=True):
        yield f"{name} of {framework}", digest(arrays), DIGESTS[name]


def masks(sampler: str) -> Pairs:
    """Compare masks at numbers and at traced probabilities."""

    def draw(framework: Framework) -> list[np.ndarray]:
        sample = getattr(framework.library, sampler)
        keep_probs = KEEP_PROBS if sampler == "bernoulli" else KEEP_PROBS[2:-2]
        found = []
        for shape in ((33, 65), (64, 96)):

            def at(keep_prob: Any, shape: tuple[int, ...] = shape) -> Any:
                return sample(framework.key(7), keep_prob, shape)

            compiled_at = jax.jit(at) if framework is JAX else lambda value: at(torch.tensor(value))
            for keep_prob in keep_probs:
                found += [at(keep_prob), compiled_at(np.float32(keep_prob))]
        return [framework.numpy(mask) for mask in found]

    yield from _stream(sampler, draw)
    key, shape = jax.random.key(7), (33, 65)
    for keep_prob in KEEP_PROBS[2:-1] if sampler == "bernoulli" else ():
        other = jax.random.bernoulli(key, keep_prob, shape)
        yield f"jax.random {keep_prob}", regjax.bernoulli(key, keep_prob, shape), other


def normals() -> Pairs:
    """Compare normal variates, 2**17 of them in float32."""

    def draw(framework: Framework) -> list[np.ndarray]:
        library = jnp if framework is JAX else torch
        sizes = {"float32": 2**17, "float64": 2**15, "bfloat16": 2**10}
        with jax.enable_x64(True):
            return [
                framework.numpy(
                    framework.library.normal(framework.key(5), (size,), getattr(library, dtype))
                )
                for dtype, size in sizes.items()
            ]

    yield from _stream("normal", draw)


def keys() -> Pairs:
    """Compare keys of sites and steps, `split` and `fold_in`."""

    def draw(framework: Framework) -> list[np.ndarray]:
        root = framework.key(2**32 - 1)
        step = np.int32(12)

        def of_site(step: Any) -> Any:
            return framework.library.site_key(root, step, "encoder/3")

        if framework is JAX:
            found = [*jax.random.split(root, 5), jax.random.fold_in(root, 17)]
        else:
            found = [*regtorch.split(root, 5), regtorch.fold_in(root, 17)]
        found += [of_site(0), of_site(2**40 + 5), framework.traced(of_site)(step)]
        return [np.array(framework.words(key), np.uint32) for key in found]

    yield from _stream("keys", draw)


def schedules() -> Pairs:
    """Compare every step of three lengths, at numbers and traced."""
    at = np.arange(-2, 1203, dtype=np.int32)

    def draw(framework: Framework) -> list[np.ndarray]:
        found = []
        for name in ("linear_rate", "cosine_rate"):
            for start, end, steps in ((0.0, 0.5, 1000), (0.9, 0.123, 41), (0.1, 1.0, 1)):
                schedule = getattr(framework.library, name)(start, end, steps)
                if framework is JAX:
                    found.append(np.asarray(jax.jit(jax.vmap(schedule))(at)))
                else:
                    found.append(torch.func.vmap(schedule)(torch.tensor(at)).numpy())
                found.append(
                    np.stack([framework.numpy(schedule(step)) for step in range(0, 40, 3)])
                )
        return found

    yield from _stream("schedules", draw)
    for depth in (1, 12, 100):
        one, two = (np.array(w.library.depth_rates(0.3, depth)) for w in FRAMEWORKS)
        yield f"depth_rates {depth}", one, two


# PyTorch's own stream -----------------------------------------------------------------------


def replayed(select: Callable[[torch_stream.Call], bool], *, few: bool = False) -> Pairs:
    """Compare calls in `regjax.torch_random` with PyTorch: value and next state."""
    chosen = [call for call in torch_stream.calls() if select(call) and not call.ulps]
    if few:
        chosen = list({call.kind: call for call in reversed(chosen)}.values())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for call in chosen:
            torch_stream.skip_words(623)
            yield from call.pairs()


def _is_plain(call: torch_stream.Call) -> bool:
    return not call.needs_avx2 and call.dtype != "float16" and call.kind != "normal"


# The rest ------------------------------------------------------------------------------------


def embedding_of_rows() -> Pairs:
    """Compare `embedding_dropout` with dropout of whole rows of the table."""
    table = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    for framework in FRAMEWORKS:
        rows, ids = framework.array(table), _ids(framework)
        one = framework.library.embedding_dropout(rows[ids], ids, 0.3, key=framework.key(3))
        two = framework.library.dropout(rows, 0.3, key=framework.key(3), broadcast_dims=(1,))[ids]
        yield str(framework), framework.numpy(one), framework.numpy(two)


def attention() -> Pairs:
    """Compare which weights are dropped: whole and blockwise, in both packages, traced or not."""
    rng = np.random.default_rng(0)
    q, k = (rng.normal(size=(2, n, 3, 8)).astype(np.float32) for n in (24, 40))
    v = np.broadcast_to(np.eye(40, dtype=np.float32)[:, None], (2, 40, 3, 40)).copy()
    for shared in (False, True):
        found = []
        for framework in FRAMEWORKS:
            arrays = [framework.array(array) for array in (q, k, v)]
            for block_size in (None, 16):

                def at(
                    rate: Any,
                    framework: Framework = framework,
                    arrays: Any = arrays,
                    size: Any = block_size,
                ):
                    options = {"broadcast_dropout": shared, "block_size": size}
                    return framework.library.dot_product_attention(
                        *arrays, dropout_rng=framework.key(3), dropout_rate=rate, **options
                    )

                for result in (at(0.3), framework.traced(at)(np.float32(0.3))):
                    found.append(
                        (f"{framework} {block_size} {shared}", framework.numpy(result) != 0)
                    )
        for label, mask in found[1:]:
            yield label, mask, found[0][1]


def descent() -> Pairs:
    """Compare SGD and Rprop with `torch.optim`, compiled with `apply_updates`."""
    problem = synthetic("float32", steps=60)
    for case in CASES:
        if case.float32 is None:
            yield from _walks(case, problem)


def decoupled_decay() -> Pairs:
    """Compare the decay alone, without a gradient, with `torch.optim`."""
    problem = synthetic("float32", {"a/kernel": (40, 50), "a/bias": (1, 9)}, steps=20)
    still = [{name: 0 * g for name, g in step.items()} for step in problem.gradients]
    options = {"lr": 0.003, "weight_decay": 0.1}
    for name in ("AdamW", "Adafactor", "Muon", "NAdam", "RAdam"):
        extra = {"decoupled_weight_decay": True} if name in ("NAdam", "RAdam") else {}
        case = Case(name.lower(), name, options | extra)
        yield from _walks(case, dataclasses.replace(problem, gradients=still))


def _walks(case: Case, problem: Any) -> Pairs:
    in_jax, in_torch = (WALKS[side](case, problem)[-1] for side in ("jax", "torch"))
    for name, leaf in in_torch.items():
        yield f"{case} {name}", in_jax[name], leaf


def converted_layers() -> Pairs:
    """Compare converted layers in evaluation, or recurrent without dropout, with PyTorch's."""
    torch.manual_seed(0)
    x = torch.randn(3, 6, 8)
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True)
    plain = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    model = regtorch.keyed.convert(copy.deepcopy(plain))
    yield "transformer", model(x).detach().numpy(), plain(x).detach().numpy()
    for kind in (torch.nn.RNN, torch.nn.LSTM, torch.nn.GRU):
        plain = kind(8, 5, 3, dropout=0.5, batch_first=True).eval()
        model = regtorch.keyed.convert(copy.deepcopy(plain))
        yield kind.__name__, model(x)[0].detach().numpy(), plain(x)[0].detach().numpy()


# Layers of the frameworks --------------------------------------------------------------------

_X, _Y = inputs(np.float32, (96, 64))


def _training(loss: Callable[..., Any], params: Any, steps: int = 3) -> list[np.ndarray]:
    """Run a jitted training step repeatedly; return every leaf and loss of every step."""
    optimizer = optax.adam(0.01)

    @jax.jit
    def step(params: Any, state: Any, number: Any) -> Any:
        key = jax.random.fold_in(jax.random.key(3), number)
        value, gradient = jax.value_and_grad(loss)(params, key)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    state, walked = optimizer.init(params), []
    for number in range(steps):
        params, state, value = step(params, state, number)
        walked += [np.asarray(leaf) for leaf in jax.tree.leaves((params, value))]
    return walked


def _both(name: str, run: Callable[[Any], list[np.ndarray]], *layers: Any) -> Pairs:
    for number, pair in enumerate(zip(*map(run, layers), strict=True)):
        yield f"{name} {number}", *pair


def linen() -> Pairs:
    """Compare training runs of Flax Linen with either layer."""
    from flax import linen as nn

    from regjax.linen import Dropout

    def run(layer: Any) -> list[np.ndarray]:
        dropout = layer(0.3, deterministic=False)
        model = nn.Sequential([nn.Dense(64), nn.relu, dropout, nn.Dense(64)])
        params = model.init({"params": jax.random.key(0), "dropout": jax.random.key(0)}, _X)

        def loss(params: Any, key: Any) -> Any:
            return ((model.apply(params, _X, rngs={"dropout": key}) - _Y) ** 2).mean()

        return _training(loss, params)

    return _both("linen", run, Dropout, nn.Dropout)


def nnx() -> Pairs:
    """Compare training runs of Flax NNX with either layer."""
    from flax import nnx as nn

    from regjax.nnx import Dropout

    def run(layer: Any) -> list[np.ndarray]:
        rngs = nn.Rngs(0)
        parts = nn.Linear(64, 64, rngs=rngs), nn.relu, layer(0.3), nn.Linear(64, 64, rngs=rngs)
        graph, params, rest = nn.split(nn.List(parts), nn.Param, ...)

        def loss(params: Any, key: Any) -> Any:
            first, relu, dropout, last = tuple[Any, ...](nn.merge(graph, params, rest))
            return ((last(dropout(relu(first(_X)), rngs=nn.Rngs(key))) - _Y) ** 2).mean()

        return _training(loss, params)

    return _both("nnx", run, Dropout, nn.Dropout)


def equinox() -> Pairs:
    """Compare training runs of Equinox with either layer."""
    import equinox as eqx

    from regjax.equinox import Dropout

    def run(layer: Any) -> list[np.ndarray]:
        first, last = (
            eqx.nn.Linear(64, 64, key=key) for key in jax.random.split(jax.random.key(0))
        )
        params, static = eqx.partition((first, last), eqx.is_inexact_array)
        dropout = layer(0.3)

        def loss(params: Any, key: Any) -> Any:
            first, last = eqx.combine(params, static)
            hidden = dropout(jax.nn.relu(jax.vmap(first)(_X)), key=key)
            return ((jax.vmap(last)(hidden) - _Y) ** 2).mean()

        return _training(loss, params)

    return _both("equinox", run, Dropout, eqx.nn.Dropout)


def haiku() -> Pairs:
    """Compare training runs of Haiku with either function."""
    import haiku as hk

    from regjax.haiku import dropout

    def run(function: Any) -> list[np.ndarray]:
        def network(x: Any) -> Any:
            hidden = jax.nn.relu(hk.Linear(64)(x))
            return hk.Linear(64)(function(hk.next_rng_key(), 0.3, hidden))

        model = hk.transform(network)

        def loss(params: Any, key: Any) -> Any:
            return ((model.apply(params, key, _X) - _Y) ** 2).mean()

        return _training(loss, model.init(jax.random.key(0), _X))

    return _both("haiku", run, dropout, hk.dropout)


BY_ARITHMETIC = ("dropout", "alpha_dropout, packed", "gaussian_dropout", "gaussian_noise")
TRACED = tuple(map(np.float32, (0.0, 0.3, 0.95)))
FAMILY_PLACE = "Features, The dropout family"
LAYERS_PLACE = "Features, Layers"


def _promises() -> Iterator[Promise]:
    core = functools.partial(Promise, is_core=True)
    yield core("masks, exact", "Promises, mask stream v1", lambda: masks("bernoulli"))
    yield core("masks, packed", "packed_bernoulli", lambda: masks("packed_bernoulli"))
    yield core("normal variates", "Promises, normal stream v1", normals)
    yield core("keys", "site_key, split, fold_in", keys)
    yield core("schedules", "linear_rate, cosine_rate, depth_rates", schedules)
    yield core("200 traced rates", FAMILY_PLACE, lambda: many_rates(200, [np.float32]))
    yield Promise("300 traced rates, float64 too", FAMILY_PLACE, lambda: many_rates(300))
    yield Promise("family, numbers as rates", FAMILY_PLACE, lambda: family((0.77,)))
    yield Promise("family, traced rates", FAMILY_PLACE, lambda: family(TRACED))
    rates = (0.3, np.float64(0.3), np.float32(0.3))
    yield Promise(
        "family, float64", FAMILY_PLACE, lambda: family(rates, [np.float64], BY_ARITHMETIC)
    )
    small = [ml_dtypes.bfloat16, ml_dtypes.float8_e5m2]
    yield Promise(
        "family, half types", FAMILY_PLACE, lambda: family(rates[::2], small, BY_ARITHMETIC)
    )
    yield Promise(
        "family, float16",
        FAMILY_PLACE,
        lambda: family(rates[::2], [np.float16], BY_ARITHMETIC),
        needs_float16=True,
    )
    yield Promise("family, inside a jitted function", FAMILY_PLACE, compiled)
    yield Promise("embedding dropout as rows", "embedding_dropout", embedding_of_rows)
    yield Promise("attention, one mask in all forms", "Features, Attention", attention)
    place = "PyTorch's random stream"
    yield core("torch_random, one of each", place, lambda: replayed(_is_plain, few=True))
    yield Promise("torch_random, on every CPU", place, lambda: replayed(_is_plain))
    yield Promise(
        "torch_random, with AVX2",
        place,
        lambda: replayed(lambda call: call.needs_avx2 and call.dtype != "float16"),
        needs_avx2=True,
    )
    yield Promise("torch_random, order of data", place, torch_loaders.pairs)
    yield Promise(
        "torch_random, initial parameters",
        place,
        torch_models.pairs,
        needs_avx2=True,
    )
    yield Promise(
        "torch_random, float16",
        place,
        lambda: replayed(lambda call: call.dtype == "float16" and not call.needs_avx2),
        needs_float16=True,
    )
    place = "Features, PyTorch's optimizers"
    yield Promise("SGD and Rprop of torch.optim", place, descent, needs_fma=True)
    yield Promise("decoupled decay of torch.optim", "parity_tests", decoupled_decay)
    yield Promise("converted layers in evaluation", "regtorch.keyed.convert", converted_layers)
    yield Promise("Linen training run", LAYERS_PLACE, linen, "flax")
    yield Promise("NNX training run", LAYERS_PLACE, nnx, "flax")
    yield Promise("Equinox training run", LAYERS_PLACE, equinox, "equinox")
    yield Promise("Haiku training run", LAYERS_PLACE, haiku, "haiku")


PROMISES = tuple(_promises())


def main(argv: Sequence[str] | None = None) -> None:
    """Check the promises in this process, and print a line of JSON for each."""
    parser = Parser("python -m parity_tests.promises", __doc__)
    parser.add_argument("--core", action="store_true", help="only the cheap promises")
    options = parser.parse_args(argv)
    for promise in PROMISES:
        if promise.is_core or not options.core:
            broken = promise.broken() if promise.can_be_checked() else None
            print(json.dumps({"name": promise.name, "broken": broken}), flush=True)


if __name__ == "__main__":
    run(main)
