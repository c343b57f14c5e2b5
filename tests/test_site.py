"""The documentation site: its reference is complete, and its comparison with PyTorch is true."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import linen

from tests import reading

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
REFERENCE = {page.stem: page.read_text() for page in (DOCS / "api").glob("reg*.md")}
REFERENCE["parity_tests.harness"] = (DOCS / "api" / "parity_tests.harness.md").read_text()


def public_modules() -> Iterator[str]:
    """Return the modules of both packages whose path has no private part."""
    for package in ("regjax", "regtorch"):
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts).removesuffix(".__init__")
            if not re.search(r"\._", name) and "__all__" in path.read_text():
                yield name


def missing(module: str, page: str) -> set[str]:
    """Return the names of `__all__` that a page does not document.

    `automodule` adds an entry for each, except for those without a docstring and those that it
    excludes; the latter must be entries of the module that the table links to.
    """
    target = importlib.import_module(module)
    public = {name: getattr(target, name) for name in target.__all__}
    tables = re.findall(r"\.\. autosummary::\n +:nosignatures:\n\n((?: +\S+\n)+)", page)
    listed = {line.strip().removeprefix("~") for table in tables for line in table.splitlines()}
    excluded = re.findall(r":exclude-members: (.*)", page)
    elsewhere = {entry for entry in listed if "." in entry}
    assert {name for names in excluded for name in names.split(", ")} == {
        entry.rpartition(".")[2] for entry in elsewhere
    }
    documented = {n for n in listed - elsewhere if getattr(public.get(n), "__doc__", None)}
    for entry in elsewhere:
        owner, _, name = entry.rpartition(".")
        if not missing(owner, REFERENCE[owner]) and getattr(target, name) is getattr(
            importlib.import_module(owner), name
        ):
            documented.add(name)
    documented |= {name for name in public if f"{module}.{name}" in REFERENCE}  # a module
    documented |= set(re.findall(r"^\.\. data:: (\w+)$", page, re.MULTILINE))
    assert f".. automodule:: {module}\n" in page
    assert f".. currentmodule:: {module}\n" in page
    return public.keys() - documented


def test_every_public_module_has_a_page():
    assert set(public_modules()) | {"parity_tests.harness"} == REFERENCE.keys()
    index = (DOCS / "api" / "index.md").read_text()
    assert all(f"\n{module}\n" in index for module in REFERENCE)


@pytest.mark.parametrize("module", sorted(REFERENCE))
def test_every_public_name_is_documented(module):
    assert missing(module, REFERENCE[module]) == set()


@pytest.mark.parametrize("name", ["dropout", "optim", "__version__", "DecayTable"])
def test_a_missing_name_is_detected(monkeypatch, name):
    module = "regjax" if name == "optim" else "regtorch"
    monkeypatch.delitem(REFERENCE, "regjax.optim")
    page = re.sub(rf"^ +\S*\b{name}\n|^\.\. data:: {name}\n", "", REFERENCE[module], flags=re.M)
    page = page.replace(f":exclude-members: {name}, ", ":exclude-members: ")
    assert name in missing(module, page)


# The comparison with PyTorch.

PAGE = (DOCS / "coming_from_pytorch.md").read_text()
SETUP, TRAINING = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
ROWS = re.findall(r"^\| `([^`]+)` \| `([^`]+)` \| (.+) \|$", PAGE, re.MULTILINE)


def run(line: str, names: dict[str, Any]) -> Any:
    """Return the value of an expression, or the assigned value."""
    if assignment := re.match(r"(\w+) = ", line):
        exec(line, names)
        return names[assignment[1]]
    return eval(line, names)


def array(value: Any) -> np.ndarray:
    return np.asarray(value.detach() if isinstance(value, torch.Tensor) else value, "float64")


def jax_call(layer: Any, names: dict[str, Any]) -> jax.Array:
    """Call a layer of any framework on the array of the page."""
    if isinstance(layer, linen.Module):
        return layer.apply({}, names["x"], rngs={"dropout": names["key"]})
    if isinstance(layer, eqx.Module):
        return layer(names["x"], key=names["key"])
    return layer(names["x"])


def train_torch(optimizer: torch.optim.Optimizer, steps: int = 3) -> list[np.ndarray]:
    """Return the parameters after a few steps with constant gradients."""
    tensors = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    for _ in range(steps):
        for tensor in tensors:
            tensor.grad = torch.linspace(-1, 1, tensor.numel()).reshape(tensor.shape)
        optimizer.step()
    return [array(tensor.T if tensor.ndim == 2 else tensor) for tensor in tensors]


def train_jax(optimizer: optax.GradientTransformation, params: Any, steps: int = 3) -> Any:
    """Return the parameters after the same steps."""

    @jax.jit
    def train(params: Any) -> Any:
        gradients = {
            name: jnp.linspace(-1, 1, leaf.size).reshape(leaf.T.shape).T
            for name, leaf in params.items()
        }
        state = optimizer.init(params)
        for _ in range(steps):
            updates, state = optimizer.update(gradients, state, params)
            params = optax.apply_updates(params, updates)
        return params

    return train(params)


def compare(original: Any, port: Any, names: dict[str, Any]) -> None:
    """Assert that the results of the two lines of a row agree."""
    if isinstance(original, torch.optim.lr_scheduler.LRScheduler):
        rates = []
        for _ in range(10):
            rates.append(original.get_last_lr()[0])
            original.optimizer.step()
            original.step()
        np.testing.assert_allclose([float(port(step)) for step in range(10)], rates, rtol=1e-5)
    elif isinstance(original, torch.optim.Optimizer) and isinstance(
        port, optax.GradientTransformation
    ):
        trained = train_torch(original)
        matrices = {"kernel": names["params"]["kernel"]}
        result = train_jax(port, names["params"] if len(trained) == 2 else matrices)
        assert len(result) == len(trained)
        # PyTorch iterates Muon in bfloat16.
        tolerance = 1e-4 if isinstance(original, torch.optim.Muon) else 1e-6
        for tensor in trained:
            leaf = result["kernel" if tensor.ndim == 2 else "bias"]
            np.testing.assert_allclose(leaf, tensor, atol=tolerance, rtol=0)
    elif isinstance(original, torch.nn.Module):
        compare(original(names["t"]), jax_call(port, names), names)
    elif isinstance(original, torch.Tensor):
        assert original.shape == port.shape
        # The random numbers differ, so compare the values that occur, if they are few.
        values = [np.unique(array(value).round(4)) for value in (original, port)]
        if max(map(len, values)) < 10:
            np.testing.assert_allclose(*values, rtol=1e-4)


@pytest.fixture
def page() -> Iterator[dict[str, Any]]:
    names: dict[str, Any] = {}
    with reading.as_a_reader():
        torch.manual_seed(0)
        exec(SETUP, names)
        yield names


def test_the_page_has_rows():
    assert len(ROWS) == len(re.findall(r"^\| `", PAGE, re.MULTILINE)) >= 50


@pytest.mark.parametrize("row", range(len(ROWS)))
def test_both_lines_of_a_row_agree(page, row):
    original, port = (run(line, page) for line in ROWS[row][:2])
    compare(original, port, page)
    if "bit for bit" in ROWS[row][2]:
        np.testing.assert_array_equal(array(original), array(port))


def test_the_training_step_runs(page):
    exec(TRAINING, page)


@pytest.mark.parametrize(
    ("original", "port"),
    [
        ("F.dropout(t, 0.5)", "regjax.dropout(x, 0.4, key=key)"),
        ("F.dropout(t, 0.5)", "regjax.dropout(x, 0.5, deterministic=True)"),
        ("torch.nn.Dropout(0.5)", "regjax.equinox.Dropout(0.4)"),
        ("torch.optim.AdamW(linear.parameters())", "regjax.optim.adamw(weight_decay=0.02)"),
        (
            "torch.optim.lr_scheduler.ExponentialLR(torch.optim.SGD(linear.parameters()), 0.5)",
            "optax.exponential_decay(0.001, 1, 0.6)",
        ),
        ("0.1 * linear.weight.square().sum()", "regjax.l2_penalty(params, 0.1)"),
    ],
)
def test_a_false_row_is_detected(page, original, port):
    with pytest.raises(AssertionError):
        compare(run(original, page), run(port, page), page)
