"""Every public function of both packages, called with one argument at a time replaced.

`python -m tests.sweep` prints each call that is accepted though the value is wrong, and each error
that does not name the argument. `test_sweep.py` asserts that there are none.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen
import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import torch

import regjax
import regjax.equinox
import regjax.haiku
import regjax.linen
import regjax.nnx
import regtorch

# What replaces an argument, by the name under which the tables below accept it.
WRONG: dict[str, Any] = {
    "None": None,
    "string": "yes",
    "digits": "0.5",
    "half": 0.5,
    "negative": -1,
    "nan": float("nan"),
    "list": [],
    "dict": {},
    "object": object(),
    "complex": 1j,
    "True": True,
    "rank 6": np.full((1, 2, 1, 2, 1, 2), 0.5, np.float32),
    "bools": np.array([True, False]),
}
# Which of them are right for an argument of a kind.
RIGHT: dict[str, str] = {
    "rate": "half",
    "amount": "half",
    "flag": "True",
    "key": "",
    "optional key": "None",
    "array": "half nan list rank 6 complex",
    "tensor": "rank 6",
    "integer": "",
    "axis": "negative",
    "shape": "list",
    "dims": "list",
    "function": "",
    "choice": "",
    "rule": "object",
    "tree": "*",
    "globs": "list dict",
    "scale": "None half negative",
    "optional integer": "None",
    "optional number": "None half negative nan",
    "optional bool": "None True",
    "optional function": "None",
    "optional flag": "None True",
    "optional rate": "None half",
    "optional amount": "None half",
    "text": "string digits",
    "mask": "None True dict list",
    "layout": "None",
    "optional dtype": "None",
    "dtype": "",
    "optional anything": "*",
    "step": "",
    "layout": "None",
    "device": "None negative",
    "model": "",
    "generator": "None",
    "number or shape": "list",
    "seed": "negative",
}


class Call(NamedTuple):
    """A call that works, and the kind of each of its arguments."""

    name: str
    function: Callable[..., Any]
    arguments: dict[str, Any]
    kinds: dict[str, str]
    alias: dict[str, str]


def _kinds(text: str) -> dict[str, str]:
    return dict(tuple(map(str.strip, pair.split(":"))) for pair in text.split(",") if pair.strip())


def _jax_calls() -> Iterator[tuple[str, Any, dict[str, Any], str]]:
    key, x, image = jax.random.key(0), jnp.ones((2, 3)), jnp.ones((2, 4, 4, 3))
    ids = jnp.zeros(2, int)
    family = "rate: rate, key: optional key, deterministic: flag"
    on = {"key": key, "rate": 0.5, "deterministic": False}
    sampled = f"x: array, {family}, sampler: function"
    drawn = {"x": x, **on, "sampler": regjax.bernoulli}
    yield "dropout", regjax.dropout, {**drawn, "broadcast_dims": ()}, f"{sampled}, broadcast_dims: dims"
    yield "alpha_dropout", regjax.alpha_dropout, {**drawn, "broadcast_dims": ()}, f"{sampled}, broadcast_dims: dims"
    yield "feature_dropout", regjax.feature_dropout, {**drawn, "x": image, "channel_axis": 3}, f"{sampled}, channel_axis: axis"
    yield "feature_alpha_dropout", regjax.feature_alpha_dropout, {**drawn, "x": image, "channel_axis": 3}, f"{sampled}, channel_axis: axis"
    yield "drop_path", regjax.drop_path, {**drawn, "mode": "row", "scale_by_keep": True}, f"{sampled}, mode: choice, scale_by_keep: flag"
    yield "drop_block", regjax.drop_block, {"x": image, **on, "block_size": 2, "channel_axis": 3, "share_channels": False}, f"x: array, {family}, block_size: integer, channel_axis: axis, share_channels: flag"
    yield "variational_dropout", regjax.variational_dropout, {**drawn, "time_axis": 1}, f"{sampled}, time_axis: axis"
    yield "embedding_dropout", regjax.embedding_dropout, {"x": x, "ids": ids, **on}, f"x: array, ids: tensor, {family}"
    yield "drop_connect", regjax.drop_connect, {"weights": {"kernel": x}, **on, "rule": "default", "sampler": regjax.bernoulli}, f"weights: tree, {family}, rule: rule, sampler: function"
    yield "gaussian_dropout", regjax.gaussian_dropout, {"x": x, **on}, f"x: array, {family}"
    noise = {"x": x, "stddev": 0.5, "key": key, "deterministic": False}
    yield "gaussian_noise", regjax.gaussian_noise, noise, "x: array, stddev: amount, key: optional key, deterministic: flag"
    for f in (regjax.bernoulli, regjax.packed_bernoulli):
        yield f.__name__, f, {"key": key, "keep_prob": 0.5, "shape": (2,), "out_sharding": None}, "key: key, keep_prob: rate, shape: shape, out_sharding: layout"
    yield "packed_bernoulli", regjax.packed_bernoulli, {"key": key, "keep_prob": 0.5, "shape": (2,), "bits": 8}, "bits: integer"
    yield "normal", regjax.normal, {"key": key, "shape": (2,), "dtype": jnp.float32, "out_sharding": None}, "key: key, shape: shape, dtype: dtype, out_sharding: layout"
    yield "site_key", regjax.site_key, {"root": key, "step": 0, "site": "a"}, "root: key, step: step, site: text"
    q = jnp.ones((1, 4, 2, 8))
    attention = {"query": q, "key": q, "value": q, "bias": None, "mask": None, "dropout_rng": key, "dropout_rate": 0.5, "deterministic": False, "broadcast_dropout": False, "is_causal": False, "scale": None, "block_size": 2, "dtype": None, "precision": None, "module": None, "qk_attn_weights_einsum": None, "attn_weights_value_einsum": None}
    kinds = "query: tensor, key: tensor, value: tensor, bias: optional number, mask: optional bool, dropout_rng: optional key, dropout_rate: rate, deterministic: flag, broadcast_dropout: flag, is_causal: flag, scale: scale, block_size: optional integer, dtype: optional dtype, module: optional anything, qk_attn_weights_einsum: layout, attn_weights_value_einsum: layout"
    yield "dot_product_attention", regjax.dot_product_attention, attention, kinds
    yield from _schedules(regjax)
    tree = {"kernel": x, "bias": x}
    yield from _decays(regjax, tree)
    yield from _guards(regjax)
    predict = lambda x, *, key: regjax.dropout(x, 0.5, key=key)  # noqa: E731
    mc = {"predict": predict, "key": key, "outputs": "logits", "samples": 2, "class_axis": -1, "memory_budget": 2**20, "chunk_size": None, "keep_samples": False}
    yield "mc_dropout", _with_inputs(regjax.mc_dropout, x), mc, "predict: function, key: key, outputs: choice, samples: integer, class_axis: axis, memory_budget: integer, chunk_size: optional integer, keep_samples: flag"
    haiku = {"rng": key, "rate": 0.5, "x": x}
    common = "rng: key, rate: rate, x: array"
    h = regjax.haiku
    sampler = {"sampler": regjax.bernoulli}
    yield "haiku.dropout", h.dropout, {**haiku, **sampler, "broadcast_dims": ()}, f"{common}, sampler: function, broadcast_dims: dims"
    yield "haiku.alpha_dropout", h.alpha_dropout, {**haiku, **sampler, "broadcast_dims": ()}, f"{common}, sampler: function, broadcast_dims: dims"
    for f in (h.feature_dropout, h.feature_alpha_dropout):
        yield f"haiku.{f.__name__}", f, {**haiku, **sampler, "x": image, "channel_axis": 3}, f"{common}, sampler: function, channel_axis: axis"
    yield "haiku.drop_path", h.drop_path, {**haiku, **sampler, "mode": "row", "scale_by_keep": True}, f"{common}, sampler: function, mode: choice, scale_by_keep: flag"
    yield "haiku.drop_block", h.drop_block, {**haiku, "x": image, "block_size": 2, "channel_axis": 3, "share_channels": False}, f"{common}, block_size: integer, channel_axis: axis, share_channels: flag"
    yield "haiku.variational_dropout", h.variational_dropout, {**haiku, **sampler, "time_axis": 1}, f"{common}, sampler: function, time_axis: axis"
    yield "haiku.embedding_dropout", h.embedding_dropout, {**haiku, "ids": ids}, f"{common}, ids: tensor"
    yield "haiku.drop_connect", h.drop_connect, {"rng": key, "rate": 0.5, "weights": tree, "rule": "default", **sampler}, "rng: key, rate: rate, weights: tree, rule: rule, sampler: function"
    yield "haiku.gaussian_dropout", h.gaussian_dropout, haiku, common
    yield "haiku.gaussian_noise", h.gaussian_noise, {"rng": key, "stddev": 0.5, "x": x}, "rng: key, stddev: amount, x: array"
    yield from _layers(key, x, image, ids, tree)


def _schedules(library: Any) -> Iterator[tuple[str, Any, dict[str, Any], str]]:
    yield "constant_rate", library.constant_rate, {"rate": 0.5}, "rate: rate"
    for f in (library.linear_rate, library.cosine_rate):
        yield f.__name__, f, {"start": 0.1, "end": 0.5, "steps": 3}, "start: rate, end: rate, steps: integer"
        yield f"{f.__name__}(...)", f(0.1, 0.5, 3), {"step": 1}, "step: seed"
    yield "depth_rates", library.depth_rates, {"rate": 0.5, "depth": 3, "shape": "linear"}, "rate: rate, depth: integer, shape: choice"


def _decays(library: Any, params: Any) -> Iterator[tuple[str, Any, dict[str, Any], str]]:
    kinds = "params: tree, weight_decay: amount, mask: mask"
    for f in (library.l1_penalty, library.l2_penalty):
        yield f.__name__, f, {"params": params, "weight_decay": 0.1, "mask": None}, kinds
    yield "elastic_net_penalty", library.elastic_net_penalty, {"params": params, "l1": 0.1, "l2": 0.1, "mask": None}, "l1: amount, l2: amount, mask: mask"
    yield "l2_sp_penalty", library.l2_sp_penalty, {"params": params, "reference": params, "weight_decay": 0.1, "mask": None}, f"{kinds}, reference: model"
    for f in (library.decay_rates, library.decay_table, library.decay_mask):
        first, *names = inspect.signature(f).parameters
        rest = {"weight_decay": 0.1, "rule": "default", "frozen": ()}
        arguments = {name: rest[name] for name in names if name in rest}
        kinds = f"{first}: {'tree' if library is regjax else 'model'}, weight_decay: amount, rule: rule, frozen: globs"
        yield f.__name__, f, {first: params} | arguments, kinds


def _guards(library: Any) -> Iterator[tuple[str, Any, dict[str, Any], str]]:
    step = lambda step: None  # noqa: E731
    yield "check_dropout", library.check_dropout, {"train_step": step, "evaluate": None, "expect": (), "allow": ()}, "train_step: function, evaluate: optional function, expect: globs, allow: globs"
    yield "observing", _entered(library.observing), {"record": print}, "record: function"
    yield "DropoutGuard.report", _watched(library), {"expect": (), "allow": ()}, "expect: globs, allow: globs"


def _watched(library: Any) -> Callable[..., Any]:
    def report(**options: Any) -> Any:
        guard = library.DropoutGuard()
        for _ in range(2):
            with guard.training():
                pass
        return guard.report(**options)

    return report


def _entered(context: Any) -> Callable[..., Any]:
    def enter(**options: Any) -> None:
        with context(**options):
            pass

    return enter


def _with_inputs(function: Any, *inputs: Any) -> Callable[..., Any]:
    return lambda predict, **options: function(predict, *inputs, **options)


def _built(make: Callable[..., Any], call: Callable[..., Any], settings: set[str]) -> Any:
    """One function of the arguments of a layer and of its call."""

    def run(**arguments: Any) -> Any:
        layer = make(**{k: v for k, v in arguments.items() if k in settings})
        return call(layer, **{k: v for k, v in arguments.items() if k not in settings})

    return run


# Layer: the settings that it has beside its amount, with their kinds.
SETTINGS = {
    "Dropout": ({"broadcast_dims": ()}, "broadcast_dims: dims", True),
    "FeatureDropout": ({"channel_axis": 1}, "channel_axis: axis", True),
    "AlphaDropout": ({"broadcast_dims": ()}, "broadcast_dims: dims", True),
    "FeatureAlphaDropout": ({"channel_axis": 1}, "channel_axis: axis", True),
    "DropPath": ({"mode": "row", "scale_by_keep": True}, "mode: choice, scale_by_keep: flag", True),
    "DropBlock": ({"block_size": 2, "channel_axis": 1, "share_channels": False}, "block_size: integer, channel_axis: axis, share_channels: flag", False),
    "VariationalDropout": ({"time_axis": 1}, "time_axis: axis", True),
    "DropConnect": ({"rule": "default"}, "rule: rule", True),
    "EmbeddingDropout": ({}, "", False),
    "GaussianDropout": ({}, "", False),
    "GaussianNoise": ({}, "", False),
}


def _layers(key: Any, x: Any, image: Any, ids: Any, tree: Any) -> Iterator[tuple[str, Any, dict[str, Any], str]]:
    for name, (settings, kinds, sampled) in SETTINGS.items():
        entering: dict[str, Any] = {"inputs": {"DropConnect": tree, "DropBlock": image}.get(name, x)}
        kinds = f"{kinds}, inputs: {'tree' if name == 'DropConnect' else 'array'}"
        if name == "EmbeddingDropout":
            entering["ids"], kinds = ids, f"{kinds}, ids: tensor"
        if sampled:
            settings, kinds = {**settings, "sampler": regjax.bernoulli}, f"{kinds}, sampler: function"
        amount, kind = ("stddev", "amount") if name == "GaussianNoise" else ("rate", "rate")
        flags = "deterministic: optional flag"
        # Linen: rng and the amount in the call too.
        make = {**settings, amount: 0.5, "deterministic": False, "rng_collection": "dropout"}
        call = {**entering, "rng": key}
        run = _built(getattr(regjax.linen, name), lambda layer, **k: layer.apply({}, rngs={"dropout": jax.random.key(0)}, **k), set(make))
        yield f"linen.{name}", run, {**make, **call}, f"{kinds}, {amount}: {kind}, {flags}, rng: optional key, rng_collection: text"
        run = _built(getattr(regjax.linen, name), lambda layer, **k: layer.apply({}, **k), set(settings))
        both = functools.partial(run, **settings)
        del both
        def linen_call(cls: Any = getattr(regjax.linen, name), amount: str = amount, options: Any = settings, **k: Any) -> Any:
            return cls(**{amount: 0.5}, **options).apply({}, **k)
        yield f"linen.{name}(call)", linen_call, {**entering, "rng": key, "deterministic": False, amount: 0.5}, f"{amount}: optional {kind}, deterministic: flag"
        rngs = flax.nnx.Rngs(0)
        make = {**settings, amount: 0.5, "deterministic": False, "rng_collection": "dropout"}
        run = _built(getattr(regjax.nnx, name), lambda layer, **k: layer(**k), set(make))
        yield f"nnx.{name}", run, {**make, **entering, "rngs": rngs}, f"{kinds}, {amount}: {kind}, deterministic: flag, rngs: key, rng_collection: text"
        def nnx_call(cls: Any = getattr(regjax.nnx, name), amount: str = amount, options: Any = settings, **k: Any) -> Any:
            return cls(**{amount: 0.5}, **options, rngs=flax.nnx.Rngs(0))(**k)
        yield f"nnx.{name}(call)", nnx_call, {**entering, "deterministic": False, amount: 0.5, "rngs": rngs}, f"{amount}: optional {kind}, deterministic: optional flag, rngs: optional key"
        def nnx_rngs(cls: Any = getattr(regjax.nnx, name), amount: str = amount, options: Any = settings, **k: Any) -> Any:
            return cls(**{amount: 0.5}, **options, **k)
        yield f"nnx.{name}(rngs)", nnx_rngs, {"rngs": rngs}, "rngs: optional key"
        own = dict(settings)
        for absent in ("broadcast_dims", "mode"):
            own.pop(absent, None)
        amount = "stddev" if name == "GaussianNoise" else "p"
        if "channel_axis" in own:
            own["channel_axis"] = 0
        make = {**own, amount: 0.5, "inference": False}
        arrays = {("x" if k == "inputs" else k): v for k, v in entering.items()}
        eqx_kinds = kinds.replace("inputs:", "x:").replace("broadcast_dims: dims", "").replace("mode: choice,", "")
        cls = getattr(regjax.equinox, name)
        if name == "DropBlock":
            arrays["x"] = image[0]
        run = _built(cls, lambda layer, **k: layer(**k), set(make))
        yield f"equinox.{name}", run, {**make, **arrays, "key": key}, f"{eqx_kinds}, {amount}: {kind}, inference: flag, key: optional key"
        def eqx_call(cls: Any = cls, amount: str = amount, options: Any = own, **k: Any) -> Any:
            return cls(**{amount: 0.5}, **options)(**k)
        yield f"equinox.{name}(call)", eqx_call, {**arrays, "key": key, "inference": False}, "inference: optional flag"


def _torch_calls() -> Iterator[tuple[str, Any, dict[str, Any], str]]:
    key, x, image = regtorch.key(0), torch.ones(2, 3), torch.ones(2, 3, 4, 4)
    ids = torch.zeros(2, dtype=torch.int64)
    family = "rate: rate, key: optional key, deterministic: flag"
    on = {"key": key, "rate": 0.5, "deterministic": False}
    sampled = f"x: tensor, {family}, sampler: function"
    drawn = {"x": x, **on, "sampler": regtorch.bernoulli}
    for f in (regtorch.dropout, regtorch.alpha_dropout):
        yield f.__name__, f, {**drawn, "broadcast_dims": ()}, f"{sampled}, broadcast_dims: dims"
    for f in (regtorch.feature_dropout, regtorch.feature_alpha_dropout):
        yield f.__name__, f, {**drawn, "x": image, "channel_axis": 1}, f"{sampled}, channel_axis: axis"
    yield "drop_path", regtorch.drop_path, {**drawn, "mode": "row", "scale_by_keep": True}, f"{sampled}, mode: choice, scale_by_keep: flag"
    yield "drop_block", regtorch.drop_block, {"x": image, **on, "block_size": 2, "channel_axis": 1, "share_channels": False}, f"x: tensor, {family}, block_size: integer, channel_axis: axis, share_channels: flag"
    yield "variational_dropout", regtorch.variational_dropout, {**drawn, "time_axis": 1}, f"{sampled}, time_axis: axis"
    yield "embedding_dropout", regtorch.embedding_dropout, {"x": x, "ids": ids, **on}, f"x: tensor, ids: tensor, {family}"
    params = {"kernel": x, "bias": x}
    yield "drop_connect", regtorch.drop_connect, {"weights": params, **on, "rule": "default", "sampler": regtorch.bernoulli}, f"weights: tensor, {family}, rule: rule, sampler: function"
    yield "gaussian_dropout", regtorch.gaussian_dropout, {"x": x, **on}, f"x: tensor, {family}"
    yield "gaussian_noise", regtorch.gaussian_noise, {"x": x, "stddev": 0.5, "key": key, "deterministic": False}, "x: tensor, stddev: amount, key: optional key, deterministic: flag"
    for f in (regtorch.bernoulli, regtorch.packed_bernoulli):
        yield f.__name__, f, {"key": key, "keep_prob": 0.5, "shape": (2,)}, "key: key, keep_prob: rate, shape: shape"
    yield "packed_bernoulli", regtorch.packed_bernoulli, {"key": key, "keep_prob": 0.5, "shape": (2,), "bits": 8}, "bits: integer"
    yield "normal", regtorch.normal, {"key": key, "shape": (2,), "dtype": torch.float32}, "key: key, shape: shape, dtype: dtype"
    yield "bits", regtorch.bits, {"key": key, "shape": (2,)}, "key: key, shape: shape"
    yield "key", regtorch.key, {"seed": 0, "device": None}, "seed: seed, device: device"
    yield "split", regtorch.split, {"key": key, "num": 2}, "key: key, num: number or shape"
    yield "fold_in", regtorch.fold_in, {"key": key, "data": 2}, "key: key, data: seed"
    yield "site_key", regtorch.site_key, {"root": key, "step": 0, "site": "a"}, "root: key, step: step, site: text"
    q = torch.ones(1, 4, 2, 8)
    attention = {"query": q, "key": q, "value": q, "bias": None, "mask": None, "dropout_rng": key, "dropout_rate": 0.5, "deterministic": False, "broadcast_dropout": False, "is_causal": False, "scale": None, "block_size": 2}
    kinds = "query: tensor, key: tensor, value: tensor, bias: optional number, mask: optional bool, dropout_rng: optional key, dropout_rate: rate, deterministic: flag, broadcast_dropout: flag, is_causal: flag, scale: scale, block_size: optional integer"
    yield "dot_product_attention", regtorch.dot_product_attention, attention, kinds
    yield from _schedules(regtorch)
    model = torch.nn.Linear(2, 2)
    yield from _decays(regtorch, model)
    arguments = {"module": model, "weight_decay": 0.1, "rule": "default"}
    kinds = "module: model, rule: rule, weight_decay: amount"
    yield "decay_groups", regtorch.decay_groups, arguments, kinds
    yield from _guards(regtorch)
    predict = lambda x, *, key: regtorch.dropout(x, 0.5, key=key)  # noqa: E731
    mc = {"predict": predict, "key": key, "outputs": "logits", "samples": 2, "class_axis": -1, "keep_samples": False}
    yield "mc_dropout", _with_inputs(regtorch.mc_dropout, x), mc, "predict: function, key: key, outputs: choice, samples: integer, class_axis: axis, keep_samples: flag"
    yield "dropout_only", _entered(regtorch.dropout_only), {"model": model}, "model: model"
    for f in (regtorch.keyed.convert, regtorch.keyed.revert, regtorch.keyed.sites, regtorch.keyed.replay):
        yield f"keyed.{f.__name__}", f, {"model": torch.nn.Sequential()}, "model: model"
    yield "keyed.set_key", regtorch.keyed.set_key, {"model": torch.nn.Sequential(), "root": key, "step": 0}, "model: model, root: key, step: step"
    nn = regtorch.nn
    for name, settings, kinds, entering in (
        ("Dropout", {"broadcast_dims": ()}, "broadcast_dims: dims", x),
        ("Dropout1d", {}, "", torch.ones(2, 3, 4)),
        ("Dropout2d", {}, "", image),
        ("Dropout3d", {}, "", torch.ones(2, 3, 2, 2, 2)),
        ("AlphaDropout", {}, "", x),
        ("FeatureAlphaDropout", {}, "", image),
        ("DropPath", {"mode": "row", "scale_by_keep": True}, "mode: choice, scale_by_keep: flag", x),
        ("DropBlock2d", {"block_size": 2, "share_channels": False}, "block_size: integer, share_channels: flag", image),
        ("VariationalDropout", {"batch_first": False}, "batch_first: flag", torch.ones(2, 3, 4)),
        ("GaussianDropout", {}, "", x),
        ("EmbeddingDropout", {}, "", x),
        ("GaussianNoise", {}, "", x),
        ("DropConnect", {"rule": "default"}, "rule: rule, module: model", x),
    ):
        amount, kind = ("stddev", "amount") if name == "GaussianNoise" else ("rate", "rate")
        make = {**settings, amount: 0.5, "generator": None}
        if name == "DropConnect":
            make["module"] = torch.nn.Linear(3, 2)
        known = inspect.signature(getattr(nn, name)).parameters
        make = {k: v for k, v in make.items() if k in known}
        call = {"x": entering, "key": key} | ({"ids": ids} if name == "EmbeddingDropout" else {})
        if name == "DropConnect":
            call = {"input": entering, "key": key}
        run = _built(getattr(nn, name), lambda layer, **k: layer(k.pop("input"), **k) if "input" in k else layer(**k), set(make))
        yield f"nn.{name}", run, {**make, **call}, f"{kinds}, {amount}: {kind}, x: tensor, key: optional key, ids: tensor, generator: generator"


def calls(package: str) -> Iterator[Call]:
    """The calls that work of a package."""
    made = _jax_calls() if package == "regjax" else _torch_calls()
    for name, function, arguments, kinds in made:
        known = _kinds(kinds)
        yield Call(f"{package}.{name}", function, arguments, {k: v for k, v in known.items() if k in arguments}, {})


class Result(NamedTuple):
    """What became of one wrong call: `fine`, `accepted`, or `nameless`."""

    call: str
    argument: str
    value: str
    verdict: str
    detail: str


def sweep(package: str) -> Iterator[Result]:
    """Replaces each argument of each call by each wrong value."""
    warnings.simplefilter("ignore")
    for call in calls(package):
        call.function(**call.arguments)
        for argument, kind in call.kinds.items():
            right = RIGHT[kind]
            for value_name, value in WRONG.items():
                if right == "*" or value_name in right:
                    continue
                if package == "regtorch" and isinstance(value, np.ndarray):
                    value = torch.from_numpy(value)
                verdict, detail = _try(call, argument, value)
                yield Result(call.name, argument, value_name, verdict, detail)


def _try(call: Call, argument: str, value: Any) -> tuple[str, str]:
    try:
        call.function(**{**call.arguments, argument: value})
    except Exception as error:
        detail = f"{type(error).__name__}: {error}"
        named = re.search(rf"\b{argument}\b", str(error))
        return "fine" if named else "nameless", detail
    return "accepted", ""


def main() -> int:
    """Prints what is not fine."""
    counts: dict[str, int] = {}
    for package in sys.argv[1:] or ["regjax", "regtorch"]:
        for result in sweep(package):
            counts[result.verdict] = counts.get(result.verdict, 0) + 1
            if result.verdict != "fine":
                print(result.verdict, f"{result.call}({result.argument}={result.value})", result.detail.replace("\n", " ")[:120], sep="\t")
    print(counts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
