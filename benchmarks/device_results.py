"""Checks of the results of a GPU or a TPU: against golden vectors, a CPU, and Flax.

Each public function but `check` is a check: it returns what it compared, or raises an error of
`device_sides`. Arrays and keys are arguments of the compiled functions, never constants, because
XLA evaluates constants while it compiles, on the CPU.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import regjax
from benchmarks.device_record import FAILED, PASSED, SKIPPED, Outcome
from benchmarks.device_sides import (
    NotApplicableError,
    Run,
    Sides,
    WrongResultError,
    equal_bits,
    key_of,
    normal,
    require,
    same_bits,
    same_values,
    within,
)
from parity_tests import golden

PACKED = regjax.packed_bernoulli
SAMPLERS = {
    "exact": regjax.bernoulli,
    "packed": PACKED,
    "packed, 8 bits": functools.partial(PACKED, bits=8),
}
RATES = (0.1, 0.5)
SHAPES = ((1000,), (33, 65), (64, 1024), (4, 64, 512), (2, 3, 32, 130))
# Largest allowed deviations of attention, as shares of the largest number. XLA sums in another
# order on each platform, and bfloat16 has 8 bits.
BOUNDS = {"float32": 2e-4, "bfloat16": 0.06}
LAST_BITS = 1e-5
FLAX_BOUND = 1e-6  # Flax divides where regjax multiplies
SIGMAS = 5
# The kernels of attention for each platform, and the words of their errors on the others.
KERNELS = {"tpu": "pallas", "gpu": "triton"}
ONLY = {"pallas": "TPUs only", "triton": "NVIDIA GPUs only"}


def check(name: str, sides: Sides) -> Outcome:
    """Run a check by its name."""
    start = time.perf_counter()
    try:
        status, detail = PASSED, CHECKS[name](sides)
    except NotApplicableError as reason:
        status, detail = SKIPPED, str(reason)
    except WrongResultError as difference:
        status, detail = FAILED, str(difference)
    except Exception as error:  # a compiler may raise anything, and the other checks still run
        lines = str(error).strip().splitlines() or [""]
        status, detail = FAILED, f"{type(error).__name__}: {lines[0]}"
    return Outcome(name, status, detail, time.perf_counter() - start)


def golden_masks(sides: Sides) -> str:
    """Compare masks, bits and site keys with the golden vectors."""
    keys = {str(mask): key_of(mask.seed) for mask in golden.MASKS}
    roots = {str(site): key_of(site[0]) for site in golden.SITE_KEYS}

    def draw(keys: Any, roots: Any) -> Any:
        masks = {
            str(one): getattr(regjax, one.sampler)(
                keys[str(one)], one.keep_prob, one.shape, **one.options
            )
            for one in golden.MASKS
        }
        sites = {
            str(site): jax.random.key_data(regjax.site_key(roots[str(site)], *site[1:]))
            for site in golden.SITE_KEYS
        }
        return masks, sites

    masks, sites = sides.device(draw, keys, roots)
    for one in golden.MASKS:
        require(golden.digest(masks[str(one)]) == one.digest, f"{one} is not the golden mask")
    for site, words in golden.SITE_KEYS.items():
        found = tuple(map(int, sites[str(site)]))
        require(found == words, f"site_key{site} must be {words}; got {found}")
    return f"{len(masks)} masks and {len(sites)} site keys equal the golden vectors"


def masks(sides: Sides) -> str:
    """Compare masks of both samplers, with concrete and traced rates, with those of the CPU."""

    def draw(key: Any, traced: Any) -> Any:
        found = {}
        for name, sampler in SAMPLERS.items():
            for shape in (*SHAPES, sides.large):
                found[f"{name}, rate 0.1, {shape}"] = sampler(key, 0.9, shape)
            for label, keep_prob in (("rate 0.5", 0.5), ("traced rate", traced)):
                found[f"{name}, {label}, {SHAPES[2]}"] = sampler(key, keep_prob, SHAPES[2])
        return found

    return same_bits(sides, draw, key_of(1), np.float32(0.7))


def dropout(sides: Sides) -> str:
    """Compare values and gradients in both dtypes, bit for bit, with those of the CPU."""

    def drop(key: Any, x: Any, options: Mapping[str, Mapping[str, Any]]) -> Any:
        found = {}
        for dtype in BOUNDS:
            for rate in RATES:
                for name, given in options.items():
                    apply = functools.partial(regjax.dropout, rate=rate, key=key, **given)
                    y, pull_back = jax.vjp(apply, x.astype(dtype))
                    label = f"{dtype}, rate {rate}, {name}"
                    found |= {label: y, f"gradient in {label}": pull_back(x.astype(dtype))[0]}
        return found

    def run(side: Run, options: Mapping[str, Mapping[str, Any]]) -> Any:
        return side(functools.partial(drop, options=options), key_of(2), normal(64, 1024))

    forms = {name: {"sampler": sampler} for name, sampler in SAMPLERS.items()}
    equal = equal_bits(run(sides.device, forms), run(sides.cpu, forms))
    if sides.platform != "gpu":
        return equal
    xla = {"packed": {"sampler": PACKED}}
    kernel = {"packed": {"sampler": PACKED, "implementation": "triton"}}
    return f"{equal}; in the kernel {equal_bits(run(sides.device, kernel), run(sides.cpu, xla))}"


def family(sides: Sides) -> str:
    """Compare every kind of dropout with the CPU: bit for bit, or within a bound."""

    def drop(key: Any, x: Any, ids: Any) -> Any:
        options = {"rate": 0.3, "key": key}
        return {
            "feature_dropout": regjax.feature_dropout(x, **options),
            "alpha_dropout": regjax.alpha_dropout(x, **options),
            "feature_alpha_dropout": regjax.feature_alpha_dropout(x, **options),
            "drop_path": regjax.drop_path(x, **options),
            "variational_dropout": regjax.variational_dropout(x, **options),
            "drop_connect": regjax.drop_connect({"kernel": x}, **options)["kernel"],
            "embedding_dropout": regjax.embedding_dropout(x[0, 0], ids, **options),
        }

    def divide(key: Any, x: Any) -> Any:  # TPUs do not round divisions correctly
        return {
            "drop_block": regjax.drop_block(x, 0.3, block_size=3, key=key),
            "gaussian_dropout": regjax.gaussian_dropout(x, 0.3, key=key),
            "gaussian_noise": regjax.gaussian_noise(x, 0.3, key=key),
        }

    x = normal(8, 16, 16, 32)
    equal = same_bits(sides, drop, key_of(3), x, np.arange(16) % 7)
    return f"{equal}; noise and drop_block {same_values(sides, divide, LAST_BITS, key_of(3), x)}"


def transforms(sides: Sides) -> str:
    """Compare dropout under vmap and scan, and of a part of a batch, with the CPU and the whole."""

    def drop(keys: Any, x: Any, rows: Any) -> Any:
        key = keys[0]

        def layer(carried: Any, step: Any) -> Any:
            dropped = regjax.dropout(carried, 0.5, key=regjax.site_key(key, step, "layer"))
            return dropped, dropped

        part = regjax.by_example(rows)
        return {
            "vmap": jax.vmap(lambda x, key: regjax.dropout(x, 0.5, key=key))(x[:4], keys),
            "scan": jax.lax.scan(layer, x, jnp.arange(3))[1],
            "whole": regjax.dropout(x, 0.5, key=key),
            "part": regjax.dropout(x[rows], 0.5, key=key, sampler=part),
        }

    rows = np.asarray([5, 2, 31])
    keys = jax.random.wrap_key_data(jnp.arange(8, dtype=np.uint32).reshape(4, 2))
    arguments = keys, normal(64, 256), rows
    found = sides.device(drop, *arguments)
    equal = equal_bits(found, sides.cpu(drop, *arguments))
    equal_bits({"part": found["part"]}, {"part": found["whole"][rows]})
    return f"{equal}; a part of a batch equals its rows of the whole"


def sharding(sides: Sides) -> str:
    """Compare the mask of an array that is sharded over several devices with the CPU's."""
    if len(sides.devices) < 2:
        raise NotApplicableError("there is one device")
    number = 2 ** (len(sides.devices).bit_length() - 1)
    mesh = jax.sharding.Mesh(np.array(sides.devices[:number]), ("devices",))
    x, key = normal(number * 32, 64), key_of(4)

    def drop(x: Any, key: Any) -> Any:
        return {name: regjax.dropout(x, 0.1, key=key, sampler=s) for name, s in SAMPLERS.items()}

    spec = jax.sharding.PartitionSpec("devices")
    placed = jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))
    whole = jax.device_put(key, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    found = jax.tree.map(np.asarray, jax.jit(drop)(placed, whole))
    return f"{equal_bits(found, sides.cpu(drop, x, key))} on {number} devices"


def linen(sides: Sides) -> str:
    """Compare the layer for Linen with Flax's on the device, and with itself on the CPU."""
    from flax import linen

    import regjax.linen

    def apply(layer: Any, x: Any, key: Any, *, deterministic: bool = False) -> Any:
        return layer(0.3, deterministic=deterministic).apply({}, x, rngs={"dropout": key})

    return _layer(sides, functools.partial(apply, regjax.linen.Dropout), linen.Dropout, apply)


def nnx(sides: Sides) -> str:
    """Compare the layer for NNX with Flax's on the device, and with itself on the CPU."""
    from flax import nnx

    import regjax.nnx

    def apply(layer: Any, x: Any, key: Any, *, deterministic: bool = False) -> Any:
        return layer(0.3, deterministic=deterministic)(x, rngs=nnx.Rngs(dropout=key))

    return _layer(sides, functools.partial(apply, regjax.nnx.Dropout), nnx.Dropout, apply)


def _layer(sides: Sides, own: Any, reference: Any, apply: Any) -> str:
    """Compare a layer: evaluation, mask and values, dropout rate, scale, and bits on the CPU."""
    x = np.abs(normal(128, 512)) + np.float32(0.5)  # zeros are dropped elements

    def both(x: Any, key: Any) -> Any:
        trained = {dtype: own(x.astype(dtype), key) for dtype in BOUNDS}
        evaluated = own(x, key, deterministic=True)
        return trained, evaluated, apply(reference, x, key)

    trained, evaluated, flax = sides.device(both, x, key_of(5))
    on_cpu, _, _ = sides.cpu(both, x, key_of(5))
    equal_bits({"evaluation": evaluated}, {"evaluation": x})
    equal = equal_bits(trained, on_cpu)
    y = trained["float32"]
    equal_bits({"Flax's mask": y != 0}, {"Flax's mask": flax != 0})
    within({"Flax's values": y}, {"Flax's values": flax}, FLAX_BOUND)
    kept = float((y != 0).mean())
    bound = SIGMAS * (0.3 * 0.7 / y.size) ** 0.5
    require(abs(kept - 0.7) < bound, f"0.7 of all elements must be kept; got {kept:.4f}")
    scaled = np.where(y != 0, x * (np.float32(1) / np.float32(0.7)), np.float32(0))
    equal_bits({"scale": y}, {"scale": scaled})
    return f"{equal}; mask and values are Flax's, {kept:.4f} kept of 0.7, evaluation is the input"


def attention_masks(sides: Sides) -> str:
    """Compare the masks of every form of attention with the sampler's own, on the CPU.

    Equal weights of one-hot values make the result show which weights were dropped.
    """
    batch, queries, heads, keys = 2, 64, 2, 128
    zeros = np.zeros((batch, queries, heads, 64), np.float32)
    many = np.zeros((batch, keys, heads, 64), np.float32)
    one_hot = np.broadcast_to(np.eye(keys, dtype=np.float32)[:, None], (batch, keys, heads, keys))
    cases = {
        f"{form}, {name}, rate {rate}": (options, SAMPLERS[name], rate)
        for form, options in _forms(sides.platform).items()
        for name, rate in (("exact", 0.1), ("packed", 0.5), ("packed", 0.1))
    }

    def attend(rng: Any, *arrays: Any) -> Any:
        found = {}
        for label, (options, sampler, rate) in cases.items():
            out = regjax.dot_product_attention(
                *arrays, dropout_rng=rng, dropout_rate=rate, sampler=sampler, **options
            )
            found[label] = jnp.swapaxes(out, 1, 2) != 0
        return found

    def draw(rng: Any) -> Any:
        shape = batch, heads, queries, keys
        return {label: sampler(rng, 1 - rate, shape) for label, (_, sampler, rate) in cases.items()}

    found = sides.device(attend, key_of(6), zeros, many, one_hot)
    return equal_bits(found, sides.cpu(draw, key_of(6)))


def attention(sides: Sides) -> str:
    """Compare results and gradients of every form of attention with those of the CPU."""
    parts = []
    for dtype, bound in BOUNDS.items():
        arrays = [x.astype(dtype) for x in (normal(2, 128, 4, 64, seed=i) for i in range(3))]

        def attend(rng: Any, *arrays: Any, forms: Mapping[str, Any]) -> Any:
            found = {}
            for name, options in forms.items():
                apply = functools.partial(
                    regjax.dot_product_attention,
                    dropout_rng=rng,
                    dropout_rate=0.1,
                    is_causal=True,
                    precision=jax.lax.Precision.HIGHEST,
                    **options,
                )
                y, pull_back = jax.vjp(apply, *arrays)
                named = zip(("query", "key", "value"), pull_back(y), strict=True)
                found |= {name: y} | {f"gradient of {which}, {name}": g for which, g in named}
            return {label: x.astype(jnp.float32) for label, x in found.items()}

        forms = _forms(sides.platform)
        found = sides.device(functools.partial(attend, forms=forms), key_of(7), *arrays)
        whole = sides.cpu(functools.partial(attend, forms={"whole": {}}), key_of(7), *arrays)
        expected = {
            label: whole[label.replace(name, "whole")]
            for name in forms
            for label in found
            if label.endswith(name)
        }
        parts.append(f"{dtype}: {within(found, expected, bound)}")
    return "; ".join(parts)


def refusals(sides: Sides) -> str:
    """Check that each kernel rejects what it does not support, by name."""
    cases = []
    for implementation, words in ONLY.items():
        cases.append((implementation, "float32", 32, ValueError, "64 to 256"))
        cases.append((implementation, "float16", 64, TypeError, "float32 or bfloat16"))
        if KERNELS.get(sides.platform) != implementation:
            cases.append((implementation, "float32", 64, NotImplementedError, words))
    for implementation, dtype, depth, kind, words in cases:
        x = normal(1, 64, 1, depth).astype(dtype)
        attend = functools.partial(regjax.dot_product_attention, implementation=implementation)
        try:
            sides.device(attend, x, x, x)
        except kind as error:
            require(words in str(error), f"the error must name {words!r}; got {error}")
        else:
            name = f"{implementation}, {dtype}, depth {depth}"
            raise WrongResultError(f"{name} must be a {kind.__name__}; got a result")
    return f"{len(cases)} calls that kernels do not support are errors"


def regtorch(sides: Sides) -> str:
    """Compare masks, values and gradients of regtorch on its device with regjax on the CPU."""
    try:
        import torch
    except ImportError:
        raise NotApplicableError("torch is not installed") from None
    if sides.torch_device == "cuda" and not torch.cuda.is_available():
        raise NotApplicableError(f"torch {torch.__version__} has no CUDA device")
    import regtorch
    from parity_tests.frameworks import from_torch, to_torch

    x = normal(64, 1024)
    samplers = {"exact": regtorch.bernoulli, "packed": regtorch.packed_bernoulli}
    found, seed = {}, 8
    for dtype in BOUNDS:
        for name, sampler in samplers.items():
            leaf = to_torch(x).to(sides.torch_device, getattr(torch, dtype)).requires_grad_()
            key = regtorch.key(seed, device=sides.torch_device)
            y = regtorch.dropout(leaf, 0.1, key=key, sampler=sampler)
            (gradient,) = torch.autograd.grad(y, leaf, leaf.detach())
            label = f"{dtype}, {name}"
            found |= {label: from_torch(y), f"gradient in {label}": from_torch(gradient)}

    def drop(key: Any, x: Any) -> Any:
        reference = {}
        for dtype in BOUNDS:
            for name in samplers:
                y, pull_back = jax.vjp(
                    lambda x, s=SAMPLERS[name]: regjax.dropout(x, 0.1, key=key, sampler=s),
                    x.astype(dtype),
                )
                label = f"{dtype}, {name}"
                reference |= {label: y, f"gradient in {label}": pull_back(x.astype(dtype))[0]}
        return reference

    return equal_bits(found, sides.cpu(drop, key_of(seed), x))


# In order: the bits that all others depend on come first.
CHECKS: dict[str, Callable[[Sides], str]] = {
    "golden vectors": golden_masks,
    "masks": masks,
    "dropout": dropout,
    "family": family,
    "vmap, scan and parts": transforms,
    "sharding": sharding,
    "Linen layer": linen,
    "NNX layer": nnx,
    "masks of attention": attention_masks,
    "attention": attention,
    "refusals": refusals,
    "regtorch": regtorch,
}


def _forms(platform: str) -> dict[str, dict[str, Any]]:
    """Return the options of each form of attention that a platform has."""
    forms: dict[str, dict[str, Any]] = {"whole": {}, "in blocks": {"block_size": 32}}
    if platform in KERNELS:
        forms["in kernels"] = {"implementation": KERNELS[platform]}
    return forms
