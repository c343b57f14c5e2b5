"""PyTorch's initial parameters in JAX: names, bits and the state of the generator afterwards."""

from __future__ import annotations

import functools
import math
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

from parity_tests.torch_models import (
    CASES,
    FUNCTIONS,
    LINEAR,
    OPTIONS,
    Doubled,
    Nest,
    Registered,
    Reinitialized,
    S,
    Tied,
    Xavier,
    constructed,
)
from parity_tests.torch_stream import as_numpy
from regjax import interop, torch_random
from regjax.torch_random import layers
from regjax.torch_random.structures import Reader

T: Any = torch_random  # untyped, for wrong calls
Layer, init_like = T.Layer, T.init_like
HAS_AVX2 = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
EYE = np.eye(3, dtype=np.float32)


@pytest.fixture(autouse=True)
def _forked():
    with torch.random.fork_rng(devices=[]):
        yield


def differing(ours, theirs, tolerance=0.0):
    """Count the elements that differ by more than the CPU or the tolerance allows."""
    one, other = np.asarray(ours), as_numpy(theirs)
    if other.dtype == np.int64:  # num_batches_tracked, int32 in JAX
        other = other.astype(np.int32)
    assert (one.dtype, one.shape) == (other.dtype, other.shape)
    if not HAS_AVX2 and one.dtype.kind != "i":
        tolerance = max(tolerance, 3e-6, 4 * float(jnp.finfo(one.dtype).eps))
    one, other = one.astype(np.float64), other.astype(np.float64)
    return int((np.abs(one - other) > tolerance * np.maximum(1, np.abs(other))).sum())


def state_is_torchs(g):
    return bool((T.to_torch(g) == torch.get_rng_state().numpy()).all())


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("seed", [3])
@pytest.mark.sample(5)
def test_an_initializer_equals_torchs(name, seed):
    ours, theirs, shape, arguments = FUNCTIONS[name]
    torch.manual_seed(seed)
    expected = theirs(torch.empty(shape), *arguments)
    value, g = ours(T.generator(seed), shape, *arguments)
    assert differing(value, expected, 2e-6 * ("orthogonal" in name)) == 0
    assert state_is_torchs(g)


@pytest.mark.parametrize("nonlinearity", [*T.initializers._GAINS, "leaky_relu"])
def test_gains_equal_torchs(nonlinearity):
    for param in (None, 0, 0.3, math.sqrt(5)):
        assert T.calculate_gain(nonlinearity, param) == nn.init.calculate_gain(nonlinearity, param)


def disagreements(model, params, g):
    """Return the names and states that differ from those of a model just constructed."""
    theirs = model.state_dict()
    found = [] if list(params) == list(theirs) else [f"names: {list(params)}, {list(theirs)}"]
    found += [name for name in theirs if name in params and differing(params[name], theirs[name])]
    return found + ["state"] * (not state_is_torchs(g))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.sample(15)
def test_initial_parameters_equal_torchs(name):
    for seed in (0, 11):
        model, structure, g = constructed(CASES[name], seed)
        params, g = init_like(structure, g, **OPTIONS.get(name, {}))
        assert disagreements(model, params, g) == []


def test_a_structure_without_values():
    model, _, g = constructed(CASES["Nest"], 5)
    with torch.device("meta"):
        structure = Nest()
    assert disagreements(model, *init_like(structure, g)) == []


def test_a_double_model_needs_x64():
    build = functools.partial(nn.Linear, 5, 3, dtype=torch.float64)
    model, structure, g = constructed(build, 1)
    with pytest.raises(ValueError, match=r"the whole.*at most 32 bits"):
        init_like(structure, g)
    with jax.enable_x64(True):
        assert disagreements(model, *init_like(structure, g)) == []


def test_init_like_under_jit():
    model, structure, g = constructed(CASES["Conv"], 2)
    params, g = jax.jit(functools.partial(init_like, structure))(g)
    assert disagreements(model, {name: params[name] for name in model.state_dict()}, g) == []


def spec(model):
    """Return the structure of layers without PyTorch."""
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    return Layer(type(model).__name__, shapes, padding_idx=getattr(model, "padding_idx", None))


@pytest.mark.parametrize(
    "build",
    [
        CASES["Linear"],
        lambda: nn.Embedding(6, 4, padding_idx=-1),
        *(CASES[f"MultiheadAttention, {form}"] for form in ("kdim", "vdim", "bias_kv")),
        CASES["LSTM"],
        lambda: nn.BatchNorm2d(3),
    ],
)
def test_a_structure_without_torch(build):
    torch.manual_seed(4)
    first, second = build(), nn.Linear(5, 3)
    model = nn.ModuleDict({"a": nn.ModuleDict({"b": first}), "c": second})
    structure = {"a": {"b": spec(first)}, "c": spec(second)}
    assert disagreements(model, *init_like(structure, T.generator(4))) == []


def test_parameters_fit_into_a_jax_model():
    structure = {"hidden": Layer("Linear", {"weight": (3, 5), "bias": (3,)})}
    params, _ = init_like(structure, T.generator(0))
    template = {"Dense_0": {"kernel": jnp.zeros((5, 3)), "bias": jnp.zeros(3)}}
    filled = interop.params_from_torch(params, template, {"Dense_0": "hidden"})
    assert (filled["Dense_0"]["kernel"] == params["hidden.weight"].T).all()


# Defects: the name in `layers` or of a case's method, its replacement, and a case that shows it.


def _swapped_fans(shape):
    return shape[0] * math.prod(shape[2:]), shape[1] * math.prod(shape[2:])


def _late_projection(layer):
    first, *rest = layers._attention(layer)
    return iter([*rest, first])


def _gates_last(layer):
    return iter(sorted(layers._recurrent(layer), key=lambda draw: "bias" in draw.name))


def _children_reversed(self, path, module, base):
    for name, part in reversed(module._modules.items()):
        self.read(f"{path}.{name}" if path else name, part)


DEFECTS = {
    "fans": ("Conv", lambda m: m.setattr(T.initializers, "_fans", _swapped_fans)),
    "bias": ("Linear", lambda m: m.setattr(layers, "_bound", lambda size: 1 / size)),
    "projection": (
        "MultiheadAttention",
        lambda m: m.setitem(layers.RULES, "MultiheadAttention", _late_projection),
    ),
    "order of weights": ("LSTM", lambda m: m.setitem(layers.RULES, "LSTM", _gates_last)),
    "order of children": (
        "Nest",
        lambda m: m.setattr(Reader, "_read_children", _children_reversed),
    ),
    "no second draw": ("Transformer", lambda m: m.setattr(Reader, "_draw_matrices", lambda *_: 0)),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_found(monkeypatch, defect):
    name, plant = DEFECTS[defect]
    model, structure, g = constructed(CASES[name], 1)
    plant(monkeypatch)
    assert disagreements(model, *init_like(structure, g)) != []


class OutOfOrder(nn.Module):
    def __init__(self):
        super().__init__()
        self.b = None
        self.register_module("a", None)
        self.b = nn.Linear(5, 3)
        self.a = nn.Linear(3, 2)


def test_another_order_of_construction_is_noticed_and_can_be_given():
    model, structure, g = constructed(OutOfOrder, 1)
    assert disagreements(model, *init_like(structure, g)) == [
        "a.weight",
        "a.bias",
        "b.weight",
        "b.bias",
    ]
    params, after = init_like({"b": structure.b, "a": structure.a}, g)
    assert disagreements(model, {n: params[n] for n in model.state_dict()}, after) == []


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.token, self.inner = nn.Parameter(torch.zeros(3)), Reinitialized()
        self.lazy, self.subclass = nn.LazyLinear(3), Doubled(5, 3)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(5, 3))


def test_all_unknown_initializers_are_listed():
    with pytest.raises(ValueError, match=r"^structure must consist of modules that") as error:
        init_like(Own(), T.generator(0))
    listed = [line[2:] for line in str(error.value).splitlines()[1:]]
    assert [line.partition(":")[0] for line in listed] == [
        "'inner' (Reinitialized)",
        "'lazy' (LazyLinear)",
        "'subclass' (Doubled)",
        "'normed.parametrizations.weight' (ParametrizationList)",
        "'normed' (ParametrizedLinear)",
        "the whole (Own)",
    ]
    assert listed[0].endswith(": parameters token; method _init_weights")


G = T.generator(0)
ERRORS = {
    "copies of what?": (lambda: init_like(Registered(), G), "its layers may be copies of 'layer'"),
    "tied": (lambda: init_like(Tied(), G), "two draws of 'embedding.weight' and 'head.weight'"),
    "structure": (lambda: init_like({"a": 3}, G), "structure must be a torch.nn.Module.*3 at a"),
    "class": (lambda: init_like(nn.Linear, G), "structure must be a torch.nn.Module"),
    "names": (
        lambda: init_like(
            {"a": {"b": Layer("PReLU", {"weight": (1,)})}, "a.b": Layer("PReLU", {"weight": (1,)})},
            G,
        ),
        "different names; got 'a.b.weight' twice",
    ),
    "generator": (lambda: init_like(nn.Linear(5, 3), 0), "g must be a TorchGenerator"),
    "path": (
        lambda: init_like(nn.Linear(5, 3), G, initializers={"a": lambda g, p: ({}, g)}),
        "initializers must have paths of modules; got 'a'",
    ),
    "original": (
        lambda: init_like(nn.Sequential(nn.Linear(5, 3)), G, copies={"0": "0"}),
        r"copies\['0'\] must be an earlier module",
    ),
    "mapping": (lambda: init_like(nn.Linear(5, 3), G, copies=["0"]), "copies must be a mapping"),
    "function": (
        lambda: init_like(nn.Linear(5, 3), G, initializers={"": 3}),
        r"initializers\[''\] must be a function",
    ),
    "result": (
        lambda: init_like(nn.Linear(5, 3), G, initializers={"": lambda g, p: g}),
        "must return a dict and g",
    ),
    "new name": (
        lambda: init_like(nn.Linear(5, 3), G, initializers={"": lambda g, p: ({"w": EYE}, g)}),
        "must return names of parameters; got 'w'",
    ),
    "shape": (
        lambda: init_like(nn.Linear(5, 3), G, initializers={"": lambda g, p: ({"bias": EYE}, g)}),
        r"must return 'bias' of shape \(3,\); got \(3, 3\)",
    ),
    "missing": (
        lambda: init_like(Xavier(5, 3), G, initializers={"": lambda g, p: ({"bias": EYE[0]}, g)}),
        "must return weight; got none",
    ),
    "kind": (lambda: Layer("Lineal", LINEAR), "kind must be"),
    "no weight": (lambda: Layer("Linear", {"bias": (3,)}), "shapes must have 'weight' for Linear"),
    "entry": (lambda: Layer("Linear", LINEAR | {"b": (3,)}), "entries of Linear only; got b"),
    "shapes": (lambda: Layer("Linear", [(3, 5)]), "shapes must be a mapping"),
    "padding": (
        lambda: Layer("Embedding", {"weight": (6, 4)}, padding_idx=6),
        "padding_idx must be at most 5",
    ),
    "axes": (lambda: T.xavier_uniform(G, (3,)), "shape must have at least 2 axes"),
    "mode": (lambda: T.kaiming_normal(G, S, mode="fan"), 'mode must be "fan_in" or "fan_out"'),
    "nonlinearity": (lambda: T.kaiming_normal(G, S, nonlinearity="gelu"), "nonlinearity must be"),
    "std": (lambda: T.trunc_normal(G, S, std=0), "std must be positive"),
    "bounds": (lambda: T.trunc_normal(G, S, a=2, b=1), "a must be less than b"),
    "half": (lambda: T.trunc_normal(G, S, a=2, b=3, dtype=jnp.bfloat16), "dtype must be float32"),
    "orthogonal": (lambda: T.orthogonal(G, S, dtype=jnp.bfloat16), "dtype must be float32"),
    "sparsity": (lambda: T.sparse(G, S, 1.5), "sparsity must lie in"),
    "matrix": (lambda: T.sparse(G, (3,), 0.5), "shape must have 2 axes"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_bad_input_is_refused(name):
    call, message = ERRORS[name]
    with pytest.raises((TypeError, ValueError), match=message):
        call()


@pytest.mark.slow
def test_the_state_is_torchs_without_avx2():
    """Under the default instruction set, values may differ in the last bits, and nothing else."""
    command = [sys.executable, "-m", "pytest", "-q", "-n0", __file__, "-k", "equal_torchs"]
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "default"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
