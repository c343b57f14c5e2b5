"""Every public function and layer, called with wrong values, one argument at a time.

The tables of calls, wrong values and exceptions stay in one file: a new function adds to each.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import torch

import regjax
import regjax.equinox
import regjax.haiku
import regjax.interop
import regjax.linen
import regjax.nnx
import regjax.optim
import regtorch
import regtorch.optim

# Wrong values for an argument.
WRONG: dict[str, Any] = {
    "None": None,
    "word": "yes",
    "digits": "0.5",
    "half": 0.5,
    "minus": -1,
    "nan": float("nan"),
    "list": [],
    "dict": {},
    "object": object(),
    "complex": 1j,
    "True": True,
    "ranks": np.full((1, 2, 1, 2, 1, 2), 0.5, np.float32),
    "bools": np.array([True, False]),
}
# The values that each argument accepts. Arguments that are not listed are not replaced.
RIGHT: dict[str, set[str]] = {
    name: set(values.split())
    for names, values in {
        "rate p keep_prob stddev start end weight_decay l1 l2 dropout_rate": "half",
        "learning_rate momentum lambd alpha t0 eps rho lr_decay initial_accumulator_value": "half",
        "momentum_decay factor lr lr_factor decay_factor": "half",
        "dampening": "half minus",
        "beta2_decay": "minus",
        "deterministic inference scale_by_keep share_channels broadcast_dropout is_causal": "True",
        "keep_samples maximize amsgrad nesterov centered decoupled_weight_decay decoupled": "True",
        "return_residual force_fp32_for_softmax": "True",
        "transposed": "True",
        "mu_dtype accumulator_dtype adjust_lr_fn scheduler": "None",
        "key dropout_rng rng out_sharding generator chunk_size dtype implementation": "None",
        "evaluate qk_attn_weights_einsum attn_weights_value_einsum promote_dtype": "None",
        "query_seq_lengths key_value_seq_lengths local_window_size einsum_dot_general": "None",
        "x inputs": "half nan list ranks complex",
        "channel_axis time_axis class_axis step seed data": "minus",
        "broadcast_dims shape num": "list",
        "mask": "None True dict list",
        "expect allow frozen": "list dict",
        "scale": "None half minus",
        "bias": "None half minus nan",
        "device": "None minus",
        "rule": "object",
        "site rng_collection": "word digits",
        "block_size bits depth steps samples memory_budget ids query value rngs root": "",
        "predict outputs mode sampler train_step record model module reference betas etas": "",
        "step_sizes ns_coefficients ns_steps ns_dtype d layer_of multiplier removals": "",
        "optimizer torch_optimizer state_dict names steps_per_epoch name transpose": "",
        "section axis torch_class like create": "",
        "metrics": "None",
        "python_numbers": "True",
        "options ignored": "list",
        "defaults fixed state": "None dict",
    }.items()
    for name in names.split()
}
# Exceptions to the table, by call.
OTHER: dict[str, dict[str, str]] = {
    "site_key": {"step": ""},
    "set_key": {"step": ""},
    "dot_product_attention": {
        "key": "",
        "block_size": "None",
        "mask": "None True",
    },
    "depth_rates": {"shape": ""},
    "normal": {"dtype": "", "key": ""},
    "bernoulli": {"key": ""},
    "packed_bernoulli": {"key": ""},
    "mc_dropout": {"key": ""},
    "optim.adafactor": {"eps": "", "mask": "None True"},
    "optim.scale_by_leaf": {"scale": "half"},
    "optim.add_decay_by_leaf": {"scale": "half", "mask": "None True"},
    "optim.layerwise_scale": {"depth": "None"},
    "optim.layerwise_groups": {"params": "list dict ranks bools", "depth": "None"},
    "interop.Leaf": {"name": "word digits", "transpose": "None list", "section": "None"},
    "interop.params_from_torch": {"params": "", "names": "dict"},
    "interop.leaves_from_torch": {"params": "", "names": "dict"},
    "interop.optimizer_from_torch": {"model": "None", "steps": "None"},
    "interop.register_optimizer": {"create": "None", "options": "dict None", "step": "None"},
    "interop.schedule_from_torch": {"scheduler": "", "steps": "None"},
    "interop.schedule_from_torch of LambdaLR": {"scheduler": "", "steps": ""},
    "interop.state_from_torch": {"model": "None", "steps": "None", "step": "None", "params": ""},
    "interop.state_to_torch": {"model": "None", "steps": "None", "step": "None", "state": ""},
}
# Exceptions for regtorch, which accepts tensors but does not convert numbers and lists.
TENSORS: dict[str, dict[str, str]] = {
    "": {"x": "ranks"},
    "dot_product_attention": {"key": "", "mask": "None", "bias": "None"},
    "drop_connect": {"weights": "ranks"},
    **{f"optim.{name}": {"mask": "None"} for name in vars(regtorch.optim) if "decay" in name},
}


# An error begins with the argument, alone or with the one that it must match; then the position in
# it, as in `betas[0]` and `mask at 'kernel'`, and its name in an inner function, as in `inputs: x
# must be`. Linen's own error about `deterministic` starts with another word.
FORM = (
    r'(Parameter ")?(\w+ and )?{argument}"?( and \w+)?(\[.+?\])*( at (the root|\'.*?\'))?(: \w+)? '
    r"(must|has|have)\b"
)


class Call(NamedTuple):
    """A valid call, whose arguments are replaced in turn."""

    name: str
    function: Callable[..., Any]
    arguments: dict[str, Any]
    right: dict[str, set[str]]


def _calls(library: Any) -> Iterator[tuple[str, Callable[..., Any], dict[str, Any]]]:
    """Yield the functions that both packages have."""
    in_jax = library is regjax
    ones = jnp.ones if in_jax else torch.ones
    key = jax.random.key(0) if in_jax else regtorch.key(0)
    x, axis = ones((2, 3)), 3 if in_jax else 1
    image = ones((2, 4, 4, 3) if in_jax else (2, 3, 4, 4))
    ids = jnp.zeros(2, int) if in_jax else torch.zeros(2, dtype=torch.int64)
    on = {"rate": 0.5, "key": key, "deterministic": False}
    sampled = {**on, "sampler": library.bernoulli}
    tree = {"kernel": x, "bias": x}
    for name, arguments in {
        "dropout": {"x": x, **sampled, "broadcast_dims": ()},
        "alpha_dropout": {"x": x, **sampled, "broadcast_dims": ()},
        "feature_dropout": {"x": image, **sampled, "channel_axis": axis},
        "feature_alpha_dropout": {"x": image, **sampled, "channel_axis": axis},
        "drop_path": {"x": x, **sampled, "mode": "row", "scale_by_keep": True},
        "drop_block": {
            "x": image,
            **on,
            "block_size": 2,
            "channel_axis": axis,
            "share_channels": False,
        },
        "variational_dropout": {"x": x, **sampled, "time_axis": 1},
        "embedding_dropout": {"x": x, "ids": ids, **on},
        "drop_connect": {"weights": tree, **sampled, "rule": "default"},
        "gaussian_dropout": {"x": x, **on},
        "gaussian_noise": {"x": x, "stddev": 0.5, "key": key, "deterministic": False},
        "bernoulli": {"key": key, "keep_prob": 0.5, "shape": (2,)},
        "packed_bernoulli": {"key": key, "keep_prob": 0.5, "shape": (2,), "bits": 8},
        "by_example": {"examples": 3, "sampler": library.bernoulli, "axis": 0},
        "normal": {"key": key, "shape": (2,), "dtype": jnp.float32 if in_jax else torch.float32},
        "site_key": {"root": key, "step": 0, "site": "a"},
        "constant_rate": {"rate": 0.5},
        "linear_rate": {"start": 0.1, "end": 0.5, "steps": 3},
        "cosine_rate": {"start": 0.1, "end": 0.5, "steps": 3},
        "depth_rates": {"rate": 0.5, "depth": 3, "shape": "linear"},
        "l1_penalty": {"params": tree, "weight_decay": 0.1, "mask": None},
        "l2_penalty": {"params": tree, "weight_decay": 0.1, "mask": None},
        "elastic_net_penalty": {"params": tree, "l1": 0.1, "l2": 0.1, "mask": None},
        "l2_sp_penalty": {"params": tree, "reference": tree, "weight_decay": 0.1, "mask": None},
        "audit_masks": {"masks": {"a": ones((8,)) > 0}, "rates": 0.5, "equal": ()},
        "check_dropout": {"train_step": _nothing, "evaluate": None, "expect": (), "allow": ()},
    }.items():
        yield name, getattr(library, name), arguments
    for name in ("linear_rate", "cosine_rate"):
        yield f"{name}(...)", getattr(library, name)(0.1, 0.5, 3), {"step": 1}
    params = {"params": tree} if in_jax else {"module": torch.nn.Linear(2, 2)}
    frozen = {"frozen": ()} if in_jax else {}
    rates = {"weight_decay": 0.1, "rule": "default", **frozen}
    yield "decay_mask", library.decay_mask, {**params, "rule": "default", **frozen}
    yield "decay_rates", library.decay_rates, params | rates
    yield "decay_table", library.decay_table, params | rates
    yield "observing", _entered(library.observing), {"record": print}
    yield "DropoutGuard.report", _reported(library), {"expect": (), "allow": ()}
    query = ones((1, 4, 2, 8))
    attention = {"query": query, "key": query, "value": query, "bias": None, "mask": None}
    attention |= {"dropout_rng": key, "dropout_rate": 0.5, "deterministic": False, "scale": None}
    attention |= {"broadcast_dropout": False, "is_causal": False, "block_size": 2}
    attention |= {"sampler": library.bernoulli, "return_residual": False}
    attention |= {"query_seq_lengths": None, "key_value_seq_lengths": None}
    attention |= {"local_window_size": None}
    if in_jax:
        attention |= {"dtype": None, "implementation": "xla", "qk_attn_weights_einsum": None}
        attention |= {"promote_dtype": None, "einsum_dot_general": None}
        attention |= {"force_fp32_for_softmax": False}
    yield "dot_product_attention", library.dot_product_attention, attention

    def passes(predict: Any, **options: Any) -> Any:
        return library.mc_dropout(predict, x, **options)

    def predict(x: Any, *, key: Any) -> Any:
        return library.dropout(x, 0.5, key=key)

    mc = {"predict": predict, "key": key, "outputs": "logits", "samples": 2, "class_axis": -1}
    mc |= {"memory_budget": 2**20, "chunk_size": None} if in_jax else {}
    yield "mc_dropout", passes, {**mc, "keep_samples": False}


def _torch_calls() -> Iterator[tuple[str, Callable[..., Any], dict[str, Any]]]:
    """Yield the functions and layers that only regtorch has."""
    key, linear, empty = regtorch.key(0), torch.nn.Linear(3, 2), torch.nn.Sequential()
    keyed = regtorch.keyed
    yield "bits", regtorch.bits, {"key": key, "shape": (2,)}
    yield "key", regtorch.key, {"seed": 0, "device": None}
    yield "split", regtorch.split, {"key": key, "num": 2}
    yield "fold_in", regtorch.fold_in, {"key": key, "data": 2}
    groups = {"module": linear, "weight_decay": 0.1, "rule": "default"}
    yield "decay_groups", regtorch.decay_groups, groups
    yield "dropout_only", _entered(regtorch.dropout_only), {"model": linear}
    yield "convert", keyed.convert, {"model": empty, "allow": ()}
    for function in (keyed.revert, keyed.sites, keyed.replay):
        yield f"keyed.{function.__name__}", function, {"model": empty}
    converted = keyed.convert(torch.nn.Sequential())
    options = {"examples": [0], "axis": None}
    yield "set_key", keyed.set_key, {"model": converted, "root": key, "step": 0, **options}
    yield "register", keyed.register, {"function": lambda x: x, "replacement": lambda key, x: x}
    x, image = torch.ones(2, 3), torch.ones(2, 3, 4, 4)
    for name, entering, settings in (
        ("Dropout", x, {"broadcast_dims": ()}),
        ("Dropout1d", torch.ones(2, 3, 4), {}),
        ("Dropout2d", image, {}),
        ("Dropout3d", torch.ones(2, 3, 2, 2, 2), {}),
        ("AlphaDropout", x, {}),
        ("FeatureAlphaDropout", image, {}),
        ("DropPath", x, {"mode": "row", "scale_by_keep": True}),
        ("DropBlock2d", image, {"block_size": 2, "share_channels": False}),
        ("VariationalDropout", image, {"time_axis": 1}),
        ("GaussianDropout", x, {}),
        ("EmbeddingDropout", x, {}),
        ("GaussianNoise", x, {}),
    ):
        amount = "stddev" if name == "GaussianNoise" else "rate"
        made = {**settings, amount: 0.5, "generator": None}
        called = {"x": entering, "key": key}
        if name == "EmbeddingDropout":
            called["ids"] = torch.zeros(2, dtype=torch.int64)
        yield f"nn.{name}", _layer(getattr(regtorch.nn, name), set(made)), made | called
    made = {"module": linear, "rate": 0.5, "rule": "default", "generator": None}
    run = _layer(regtorch.nn.DropConnect, set(made), lambda layer, **how: layer(x, **how))
    yield "nn.DropConnect", run, {**made, "key": key}


def _jax_layers() -> Iterator[tuple[str, Callable[..., Any], dict[str, Any]]]:
    """Yield the layers of the four frameworks."""
    key, x, image = jax.random.key(0), jnp.ones((2, 3)), jnp.ones((2, 4, 4, 3))
    ids, tree = jnp.zeros(2, int), {"kernel": x}
    sampler = {"sampler": regjax.bernoulli}
    for name, entering, settings in (
        ("Dropout", {"inputs": x}, {"broadcast_dims": (), **sampler}),
        ("FeatureDropout", {"inputs": image}, {"channel_axis": 0, **sampler}),
        ("AlphaDropout", {"inputs": x}, {"broadcast_dims": (), **sampler}),
        ("FeatureAlphaDropout", {"inputs": image}, {"channel_axis": 0, **sampler}),
        ("DropPath", {"inputs": x}, {"mode": "row", "scale_by_keep": True, **sampler}),
        (
            "DropBlock",
            {"inputs": image},
            {"block_size": 2, "channel_axis": -1, "share_channels": False},
        ),
        ("VariationalDropout", {"inputs": x}, {"time_axis": 1, **sampler}),
        ("DropConnect", {"weights": tree}, {"rule": "default", **sampler}),
        ("EmbeddingDropout", {"inputs": x, "ids": ids}, {}),
        ("GaussianDropout", {"inputs": x}, {}),
        ("GaussianNoise", {"inputs": x}, {}),
    ):
        amount = "stddev" if name == "GaussianNoise" else "rate"
        if name == "DropConnect":
            entering = {"inputs": tree}
        flax_made = {**settings, amount: 0.5, "deterministic": False, "rng_collection": "dropout"}
        settled = set(flax_made)
        run = _layer(getattr(regjax.linen, name), settled, lambda m, **how: m.apply({}, **how))
        yield f"linen.{name}", run, {**flax_made, **entering, "rng": key}
        run = _layer(getattr(regjax.nnx, name), settled)
        yield f"nnx.{name}", run, {**flax_made, **entering, "rngs": flax.nnx.Rngs(0)}
        arrays = {"x" if key == "inputs" else key: value for key, value in entering.items()}
        known = inspect.signature(getattr(regjax.equinox, name)).parameters
        own = {key: value for key, value in settings.items() if key in known}
        own |= {amount if amount in known else "p": 0.5, "inference": False}
        run = _layer(getattr(regjax.equinox, name), set(own))
        yield f"equinox.{name}", run, {**own, **arrays, "key": key}
        function = re.sub("(?<!^)(?=[A-Z])", "_", name).lower()
        haiku = getattr(regjax.haiku, function)
        if "weights" in inspect.signature(haiku).parameters:
            arrays = {"weights": tree}
        yield f"haiku.{function}", haiku, {"rng": key, amount: 0.5, **arrays, **settings}


def _optimizers() -> Iterator[tuple[str, Callable[..., Any], dict[str, Any]]]:
    """Yield the optimizers and decays of `regjax.optim`, each with all options."""
    params = {"kernel": jnp.ones((2, 3))}
    decaying = {"weight_decay": 0.1, "reference": params, "scale": 0.5, "momentum": 0.9}
    for name in regjax.optim.__all__:
        make = getattr(regjax.optim, name)
        if inspect.isfunction(make) and name != "layerwise_scale":
            options = inspect.signature(make).parameters.values()
            passed = {each.name: decaying.get(each.name, each.default) for each in options}
            # `init` compares masks, references and scales with the parameters.
            yield f"optim.{name}", lambda make=make, **how: make(**how).init(params), passed
    scaled = {"params": params, "layer_of": lambda name: 0, "factor": 0.5, "depth": None}
    yield "optim.layerwise_scale", regjax.optim.layerwise_scale, scaled


def _bridges() -> Iterator[tuple[str, Callable[..., Any], dict[str, Any]]]:
    """Yield the functions of `regjax.interop`."""
    interop, params = regjax.interop, {"kernel": jnp.ones((2, 3))}
    layer = torch.nn.Linear(3, 2, bias=False)
    recipe = torch.optim.SGD(layer.named_parameters(), lr=0.1, momentum=0.9)
    names = {"kernel": "weight"}
    optimizer = interop.optimizer_from_torch(recipe, names)
    from_torch = {"torch_optimizer": recipe, "names": names, "model": None, "scheduler": None}
    from_torch |= {"steps": None, "steps_per_epoch": 1, "metrics": None}
    leaf = {"name": "weight", "transpose": (1, 0), "section": (0, 2), "axis": 0}
    yield "interop.Leaf", interop.Leaf, leaf
    yield (
        "interop.optimizer_from_torch",
        lambda **how: interop.optimizer_from_torch(**how).init(params),
        from_torch,
    )
    registered = {
        "torch_class": type("Swept", (), {}),
        "like": "Adam",
        "create": None,
        "step": None,
    }
    registered |= {"options": {}, "defaults": {}, "fixed": {}, "state": {}, "ignored": ()}
    yield (
        "interop.register_optimizer",
        interop.register_optimizer,
        {**registered, "create": None, "step": None, "python_numbers": False},
    )
    state = {"params": params, "optimizer": optimizer, "step": None}
    yield "interop.state_from_torch", interop.state_from_torch, from_torch | state
    back = {"state": optimizer.init(params), "step": None}
    yield "interop.state_to_torch", interop.state_to_torch, from_torch | back
    for name in ("params_from_torch", "leaves_from_torch"):
        filled = {"state_dict": {"kernel": np.ones((2, 3), np.float32)}, "params": params}
        yield f"interop.{name}", getattr(interop, name), {**filled, "names": {}}
    moved = torch.optim.SGD(layer.parameters(), lr=0.1)
    for suffix, scheduler, steps in (
        ("", torch.optim.lr_scheduler.StepLR(moved, 3), None),
        (" of LambdaLR", torch.optim.lr_scheduler.LambdaLR(moved, lambda step: 1.0), 3),
    ):
        scheduled = {"scheduler": scheduler, "steps": steps}
        yield f"interop.schedule_from_torch{suffix}", interop.schedule_from_torch, scheduled


def _torch_decays() -> Iterator[tuple[str, Callable[..., Any], dict[str, Any]]]:
    """Yield the decays of `regtorch.optim`."""
    optim, weight = regtorch.optim, torch.ones(2, 3, requires_grad=True)
    recipe = torch.optim.SGD([weight], lr=0.1, weight_decay=0.1)
    decay = {"optimizer": recipe, "weight_decay": 0.1, "mask": None}
    for name in ("add_l1_decay", "add_l2_sp_decay"):
        reference = {"reference": [torch.zeros(2, 3)]} if "sp" in name else {}
        passed = {**decay, **reference, "decoupled": False}
        yield f"optim.{name}", _removed(getattr(optim, name)), passed
    for name in ("add_independent_weight_decay", "add_cautious_weight_decay"):
        yield f"optim.{name}", _removed(getattr(optim, name)), decay
    scheduled = {"optimizer": recipe, "multiplier": lambda step: 1.0}
    yield "optim.schedule_weight_decay", _removed(optim.schedule_weight_decay), scheduled
    layers = {"params": {"a": weight}, "layer_of": lambda name: 0, "depth": None, "mask": None}
    rates = {"lr": 0.1, "lr_factor": 0.5, "weight_decay": 0.1, "decay_factor": 0.5}
    yield "optim.layerwise_groups", optim.layerwise_groups, layers | rates


def _removed(attach: Callable[..., Any]) -> Callable[..., None]:
    return lambda **options: attach(**options).remove()


def _layer(make: Any, settings: set[str], call: Callable[..., Any] | None = None) -> Any:
    """Return a function of the arguments of a layer and of its call."""

    def run(**arguments: Any) -> Any:
        layer = make(**{name: arguments.pop(name) for name in settings})
        return call(layer, **arguments) if call else layer(**arguments)

    return run


def _entered(context: Any) -> Callable[..., None]:
    def enter(**options: Any) -> None:
        with context(**options):
            pass

    return enter


def _reported(library: Any) -> Callable[..., Any]:
    def report(**options: Any) -> Any:
        guard = library.DropoutGuard()
        for _ in range(2):
            with guard.training():
                pass
        return guard.report(**options)

    return report


def _nothing(step: int) -> None:
    del step


def calls(package: str) -> Iterator[Call]:
    """Yield all calls of a package, with the values that each argument accepts."""
    library = regjax if package == "regjax" else regtorch
    if library is regjax:
        others = (*_jax_layers(), *_optimizers(), *_bridges())
    else:
        others = (*_torch_calls(), *_torch_decays())
    for name, function, arguments in (*_calls(library), *others):
        other = OTHER.get(name, {}) | (
            TENSORS.get(name, TENSORS[""]) if library is regtorch else {}
        )
        right = RIGHT | {argument: set(values.split()) for argument, values in other.items()}
        if "DropConnect" in name:
            right.pop("inputs", None)  # a pytree may be anything
        yield Call(f"{package}.{name}", function, arguments, right)


class Finding(NamedTuple):
    """A wrong call: `fine`, `accepted`, or `nameless` if its error is not about the argument."""

    verdict: str
    call: str
    detail: str


def sweep(package: str) -> Iterator[Finding]:
    """Replace each argument of each call by each wrong value."""
    for call in calls(package):
        call.function(**call.arguments)
        for argument in call.arguments.keys() & call.right.keys():
            for name, value in WRONG.items():
                if name not in call.right[argument]:
                    if package == "regtorch" and isinstance(value, np.ndarray):
                        value = torch.from_numpy(value)
                    yield _found(call, argument, name, value)


def _found(call: Call, argument: str, name: str, value: Any) -> Finding:
    where = f"{call.name}({argument}={name})"
    try:
        call.function(**call.arguments | {argument: value})
    except Exception as error:  # any class of exception, if its message is helpful
        named = re.match(FORM.format(argument=argument), str(error))
        return Finding("fine" if named else "nameless", where, f"{type(error).__name__}: {error}")
    return Finding("accepted", where, "")
