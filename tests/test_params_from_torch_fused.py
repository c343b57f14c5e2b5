"""Tensors of PyTorch that are fused, tied, normalized or renamed, as parameters of JAX."""

from __future__ import annotations

import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from parity_tests.frameworks import from_torch
from regjax._decay.paths import named_leaves
from regjax.interop import (
    Leaf,
    leaves_from_torch,
    optimizer_from_torch,
    params_from_torch,
    state_from_torch,
    state_to_torch,
)

KEY = jax.random.key(0)


def randomized(model: torch.nn.Module) -> torch.nn.Module:
    """Replace zeros and ones, which would hide an exchanged parameter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


class Conv1D(torch.nn.Module):
    """The layer of transformers: a weight (in, out)."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(inputs, outputs))
        self.bias = torch.nn.Parameter(torch.zeros(outputs))


Conv1D.__module__ = "transformers.pytorch_utils"


def _attention(fused: str, output: str) -> torch.nn.ModuleDict:
    """Return the two layers of an attention, of `Conv1D` if they are named as in GPT-2."""
    kind = Conv1D if fused == "c_attn" else lambda outputs, inputs: torch.nn.Linear(inputs, outputs)
    return torch.nn.ModuleDict({fused: kind(12, 4), output: kind(4, 4)})


def _zeros(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


LAYERS = {
    "heads": _zeros(kernel=(4, 2, 2), bias=(2, 2)),
    "flat": _zeros(kernel=(4, 4), bias=(4,)),
}


@pytest.mark.parametrize("heads", LAYERS)
@pytest.mark.parametrize(("fused", "output"), [("qkv", "proj"), ("c_attn", "c_proj")])
def test_fused_projections_are_sections(fused, output, heads):
    model = torch.nn.ModuleDict({"attn": randomized(_attention(fused, output))})
    parts = dict.fromkeys(("query", "key", "value"), LAYERS[heads])
    params = {"attn": {**parts, "out": LAYERS["flat"]}}
    leaves = leaves_from_torch(model, params)
    axis = 1 if fused == "c_attn" else 0
    order = None if fused == "c_attn" else (1, 0)
    if heads == "flat":
        assert leaves["attn/key/kernel"] == Leaf(f"attn.{fused}.weight", order, (4, 8), axis)
        assert leaves["attn/value/bias"] == Leaf(f"attn.{fused}.bias", None, (8, 12))
    filled = params_from_torch(model, params)["attn"]
    weight, bias = (from_torch(x) for x in model["attn"][fused].parameters())
    weight = weight if axis else weight.T  # (in, out)
    for index, name in enumerate(parts):
        columns = slice(4 * index, 4 * index + 4)
        np.testing.assert_array_equal(filled[name]["kernel"].reshape(4, 4), weight[:, columns])
        np.testing.assert_array_equal(filled[name]["bias"].reshape(4), bias[columns])
    expected = from_torch(model["attn"][output].weight)
    np.testing.assert_array_equal(filled["out"]["kernel"], expected if axis else expected.T)


def test_a_conv1d_is_transposed_in_equinox_only():
    model = randomized(torch.nn.ModuleDict({"fc": Conv1D(4, 4)}))
    weight = from_torch(model["fc"].weight)
    flax = params_from_torch(model, {"fc": LAYERS["flat"]})
    np.testing.assert_array_equal(flax["fc"]["kernel"], weight)
    equinox = params_from_torch(model, {"fc": eqx.nn.Linear(4, 4, key=KEY)})
    np.testing.assert_array_equal(equinox["fc"].weight, weight.T)


@pytest.mark.parametrize("old", [False, True])
def test_weight_normalization(old):
    linear = randomized(torch.nn.Linear(4, 3))
    make = torch.nn.utils.weight_norm if old else torch.nn.utils.parametrizations.weight_norm
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, about the old form
        model = torch.nn.ModuleDict({"fc": make(linear)})
    kernel = params_from_torch(
        model,
        {"fc": _zeros(kernel=(4, 3), bias=(3,)), "norm": {"fc": {"kernel": _zeros(scale=(3,))}}},
        {"norm/fc": "fc"},
    )
    direction, scale = kernel["fc"]["kernel"], kernel["norm"]["fc"]["kernel"]["scale"]
    direction, scale = np.asarray(direction), np.asarray(scale)
    expected = scale * direction / np.linalg.norm(direction, axis=0)
    np.testing.assert_allclose(expected, from_torch(linear.weight).T, rtol=1e-6)
    with jax.numpy_rank_promotion("allow"):
        layer = eqx.nn.WeightNorm(eqx.nn.Linear(4, 3, key=KEY), "weight")
        filled = params_from_torch(model, layer, {"layer": "fc", "": "fc"})
        x = np.arange(4, dtype=np.float32)
        output = filled(jnp.asarray(x))
    np.testing.assert_allclose(output, from_torch(linear(torch.from_numpy(x))), rtol=1e-5)


def test_tied_tensors_need_one_leaf():
    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(5, 4)})
    model["head"] = torch.nn.Linear(4, 5, bias=False)
    model["head"].weight = randomized(model)["embed"].weight
    params = {"embed": _zeros(embedding=(5, 4))}
    for state_dict in (model, model.state_dict()):
        filled = params_from_torch(state_dict, params)
        np.testing.assert_array_equal(
            filled["embed"]["embedding"], from_torch(model["head"].weight)
        )
        other = params_from_torch(state_dict, {"head": _zeros(kernel=(4, 5))})
        np.testing.assert_array_equal(other["head"]["kernel"], from_torch(model["head"].weight).T)
    copies = {"embed": params["embed"], "head": _zeros(kernel=(4, 5))}
    assert params_from_torch(model, copies)["head"]["kernel"].shape == (4, 5)
    # An equal tensor is not the same one.
    separate = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"no leaf of params takes 'head\.weight'"):
        params_from_torch(separate, params)


WRAPPERS = {
    "compiled": torch.compile,
    "compiled inside": lambda model: torch.nn.ModuleDict({"fc": torch.compile(model["fc"])}),
    "averaged": torch.optim.swa_utils.AveragedModel,
    "data parallel": lambda model: torch.nn.DataParallel(model),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_names_leave_out_the_wrappers_of_pytorch(wrap):
    model = torch.nn.ModuleDict({"fc": torch.nn.Linear(2, 3)})
    params = {"fc": _zeros(kernel=(2, 3), bias=(3,))}
    expected = leaves_from_torch(model, params)
    assert leaves_from_torch(wrap(model), params) == expected


def test_buffers_of_a_module_need_no_leaf_for_an_optimizer():
    model = torch.nn.Linear(2, 3)
    model.register_buffer("positions", torch.arange(3.0))
    params = _zeros(kernel=(2, 3), bias=(3,))
    assert leaves_from_torch(model, params).keys() == params.keys()
    with pytest.raises(ValueError, match="takes 'positions'"):
        params_from_torch(model, params)


# Training with sections: each in its own leaf, with the state of the whole.
ATTENTION = {
    "query": {"kernel": (4, 4), "bias": (4,)},
    "key": {"kernel": (4, 4), "bias": (4,)},
    "value": {"kernel": (4, 4), "bias": (4,)},
    "out": {"kernel": (4, 4), "bias": (4,)},
}
PARAMS = {name: _zeros(**shapes) for name, shapes in ATTENTION.items()}


@pytest.mark.parametrize("fused", ["qkv", "c_attn"])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_an_optimizer_trains_sections_as_the_whole_tensor(fused, kind):
    """Train two steps in PyTorch, two in JAX from its state, and one in PyTorch again."""
    model = randomized(_attention(fused, "proj" if fused == "qkv" else "c_proj"))
    options = {"lr": 0.1, "weight_decay": 0.1}
    options |= {"momentum": 0.9} if kind is torch.optim.SGD else {}
    recipe = kind(model.parameters(), **options)

    def gradient(tensor):
        return torch.linspace(-1, 1, tensor.numel()).reshape(tensor.shape)

    def step():
        for tensor in model.parameters():
            tensor.grad = gradient(tensor)
        recipe.step()

    def in_jax(get):
        arrays = {name: from_torch(get(p)).copy() for name, p in model.named_parameters()}
        return {path: leaf.to_jax(arrays[leaf.name]) for path, leaf in leaves.items()}

    leaves = leaves_from_torch(model, PARAMS)
    short = {"model": model, "params": PARAMS}
    optimizer = optimizer_from_torch(recipe, {}, **short)
    step()
    step()
    params = params_from_torch(model, PARAMS)
    state = state_from_torch(recipe, {}, params, optimizer, model=model)
    structure = jax.tree.structure(params)
    gradients = structure.unflatten(in_jax(gradient).values())
    for _ in range(2):
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        step()
    expected = in_jax(lambda p: p.detach())
    for path, leaf in named_leaves(params):
        np.testing.assert_allclose(leaf, expected[path], rtol=1e-5, atol=1e-6)
    # The state in JAX is that of PyTorch, and returns there.
    kept = {
        name: {k: v.clone() for k, v in recipe.state[p].items()}
        for name, p in model.named_parameters()
    }
    recipe.state.clear()
    state_to_torch(state, recipe, {}, step=4, **short)
    for name, p in model.named_parameters():
        assert recipe.state[p].keys() == kept[name].keys()
        for key, value in kept[name].items():
            torch.testing.assert_close(recipe.state[p][key], value, rtol=1e-5, atol=1e-6)


def test_sections_must_cover_a_tensor_once():
    model = _attention("qkv", "proj")
    recipe = torch.optim.SGD(model.parameters())
    leaves = leaves_from_torch(model, PARAMS)
    del leaves["key/bias"]
    with pytest.raises(ValueError, match=r"that no JAX parameter is: qkv\.bias\[4:8\]"):
        optimizer_from_torch(recipe, leaves, model=model)
    leaves["key/bias"] = Leaf("qkv.bias", section=(3, 8))
    with pytest.raises(ValueError, match=r"the same PyTorch parameter: key/bias, query/bias, val"):
        optimizer_from_torch(recipe, leaves, model=model)
    leaves["key/bias"] = Leaf("qkv.bias", section=(12, 16))
    with pytest.raises(
        ValueError, match=r"'key/bias': Leaf\(.*\) must lie within the shape \(12,\)"
    ):
        params_from_torch(model, PARAMS, leaves)


def test_a_leaf_that_is_given_also_unfolds_heads():
    """Here the fused tensor has its values before its keys."""
    model = randomized(_attention("qkv", "proj"))
    heads = _zeros(kernel=(4, 2, 2), bias=(2, 2))
    params = {
        "query": heads,
        "key": heads,
        "value": heads,
        "out": _zeros(kernel=(2, 2, 4), bias=(4,)),
    }
    names = {
        f"{role}/{kind}": Leaf(f"qkv.{entry}", order, (start, start + 4))
        for role, start in (("value", 4), ("key", 8))
        for kind, entry, order in (("kernel", "weight", (1, 0)), ("bias", "bias", None))
    }
    filled = params_from_torch(model, params, names)
    weight, bias = (from_torch(p) for p in (model["qkv"].weight, model["qkv"].bias))
    np.testing.assert_array_equal(filled["key"]["kernel"], weight[8:].T.reshape(4, 2, 2))
    np.testing.assert_array_equal(filled["value"]["bias"], bias[4:8].reshape(2, 2))
    names["key/kernel"] = Leaf("qkv.weight", (1, 0), (8, 11))
    with pytest.raises(ValueError, match=r"'key/kernel' must have shape \(4, 3\)"):
        params_from_torch(model, params, names)


@pytest.mark.parametrize("kind", [torch.optim.Muon, torch.optim.Adafactor])
def test_an_optimizer_of_whole_matrices_refuses_sections(kind):
    model = torch.nn.ModuleDict({"qkv": torch.nn.Linear(4, 12, bias=False)})
    params = {name: _zeros(kernel=(4, 4)) for name in ("query", "key", "value")}
    names = {name: Leaf("qkv.weight", (1, 0), (4 * i, 4 * i + 4)) for i, name in enumerate(params)}
    names = {f"{name}/kernel": leaf for name, leaf in names.items()}
    with pytest.raises(ValueError, match=r"names\['query/kernel'\] must be a whole tensor for"):
        optimizer_from_torch(kind(model.parameters()), names, model=model)


def test_names_of_modules_need_the_model():
    model = torch.nn.Linear(4, 4)
    recipe = torch.optim.SGD(model.named_parameters())
    with pytest.raises(
        ValueError, match="names and params must match if model is None; got no name"
    ):
        optimizer_from_torch(recipe, {}, params=_zeros(kernel=(4, 4), bias=(4,)))


@pytest.mark.parametrize(
    ("section", "error"),
    [((4,), ValueError), ((4, 4), ValueError), ((-1, 4), ValueError), (4, TypeError)],
)
def test_wrong_sections(section, error):
    with pytest.raises(error, match=r"^section.* must"):
        Leaf("a", section=section)
