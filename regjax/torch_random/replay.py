"""The initial parameters of a PyTorch model, replayed from its structure.

Small uniform tensors share blocks of one size, so that a model needs few compilations.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from regjax.torch_random.mt19937 import advance
from regjax.torch_random.normals import normal
from regjax.torch_random.state import TorchGenerator, check_generator
from regjax.torch_random.structures import Copies, Reader
from regjax.torch_random.uniforms import FLOAT_DIGITS, between, scaled_bounds, uniform
from regshared.checks import check_callable, describe

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Array, Float, Int32

    from regjax.torch_random.layers import Draw
    from regjax.torch_random.structures import Initializer

_BLOCK = 8192  # words


def init_like(
    structure: Any,
    g: TorchGenerator,
    *,
    initializers: Mapping[
        str,
        Callable[
            [TorchGenerator, dict[str, Array]], tuple[Mapping[str, ArrayLike], TorchGenerator]
        ],
    ] = MappingProxyType({}),
    copies: Mapping[str, str | None] = MappingProxyType({}),
) -> tuple[dict[str, Array], TorchGenerator]:
    """Return the initial parameters of a PyTorch model, from the state of the generator alone.

    The default initializers of the layers of `torch.nn` are replayed in the order in which PyTorch
    constructs them. Of a module, only classes, shapes and dtypes are read, never values; it may be
    constructed under `torch.device("meta")`, which draws nothing.

    PyTorch draws while it constructs. Submodules are assumed to be constructed in the order in
    which they are registered, and a module to draw nothing beside its submodules, unless its class
    shows it. If a constructor does otherwise, construct the model in PyTorch under the same seed:
    then `to_torch(g)` differs from `torch.get_rng_state()`, or the parameters do.

    Args:
        structure: A `torch.nn.Module`; a `Layer`; or a mapping from names to structures, in the
            order in which they are constructed.
        g: The generator as it is before the construction.
        initializers: By path of a module (`""` is the whole), a function for its own initializer:
            `(g, params)` to `(changed, g)`. `params` are the parameters of the module and its
            submodules that are drawn so far, by name; `changed` are those to replace or to add. It
            is called after the submodules, as the last part of the construction. For a subclass
            of a layer it is called after the layer's initializer, and instead of it if the class
            overrides `reset_parameters`.
        copies: Paths of modules that are made by `copy.deepcopy`, with the paths of the originals:
            `{"encoder.layers.0": "encoder_layer"}`; None for one that is no copy.

    Returns:
        The parameters and running statistics by name, in PyTorch's shapes, as a state dict for
        `regjax.interop.params_from_torch`; and the next state of the generator. Buffers of other
        modules are left out.

    Raises:
        TypeError: `structure` or an initializer has a wrong type, or `g` is not a generator.
        ValueError: A module has an unknown initializer: parameters of its own, a method such as
            `reset_parameters` or `_init_weights`, or a layer as base whose constructor it
            overrides. A `TransformerEncoder` may be copies of a registered layer. The message lists
            all of these. Or parameters are tied and initialized differently, or a path is unknown.

    Note (PyTorch):
        Bitwise identical where `uniform` is, and layers with normal numbers (Embedding, `bias_k`)
        where `normal` is. The layers of `TransformerEncoder(layer, n)` are equal, as copies of
        `layer`; `Transformer` draws all matrices again.

    Example:
        >>> import torch
        >>> from regjax import torch_random
        >>> with torch.device("meta"):
        ...     structure = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
        >>> params, g = torch_random.init_like(structure, torch_random.generator(0))
        >>> params["1.weight"]
        Array([[-0.06275152,  0.18710934]], dtype=float32)
        >>> _ = torch.manual_seed(0)
        >>> torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))[1].weight
        Parameter containing:
        tensor([[-0.0628,  0.1871]], requires_grad=True)
    """
    g = check_generator(g)
    for argument, given in (("initializers", initializers), ("copies", copies)):
        if not isinstance(given, Mapping):
            raise TypeError(f"{argument} must be a mapping from paths; got {describe(given)}.")
    reader = Reader({path: _checked(path, f) for path, f in initializers.items()}, copies)
    reader.read("", structure)
    reader.raise_problems()
    values: dict[str, Array] = {}
    shapes = {n: shape for n, shape in reader.shapes.items() if n not in reader.shared}
    for step in reader.grouped():
        if isinstance(step, list):
            drawn, g = _draw(g, step)
            values |= drawn
        elif isinstance(step, Copies):
            values |= {name: values[source] for name, source in step.sources.items()}
        else:
            g = step.apply(g, values, shapes)
    values |= {name: values[first] for name, first in reader.shared.items()}
    _check_ties(values, reader.ties)
    return {name: values[name] for name in reader.names}, g


def _checked(path: Any, function: Any) -> Initializer:
    return check_callable(f"initializers[{path!r}]", function, "of g and params")


def _draw(g: TorchGenerator, draws: Iterable[Draw]) -> tuple[dict[str, Array], TorchGenerator]:
    """Return the tensors of `draws` by name, and the next state of the generator."""
    values: dict[str, Array] = {}
    pending: list[Draw] = []
    for draw in draws:
        fits = draw.kind == "uniform" and draw.dtype == np.float32
        used = sum(math.prod(each.shape) for each in pending) + math.prod(draw.shape)
        if not fits or used > _BLOCK:
            g = _draw_together(g, pending, values)
            pending = []
        if fits and math.prod(draw.shape) <= _BLOCK:
            pending.append(draw)
        else:
            values[draw.name], g = _draw_alone(g, draw)
    return values, _draw_together(g, pending, values)


def _draw_alone(g: TorchGenerator, draw: Draw) -> tuple[Array, TorchGenerator]:
    if draw.kind == "constant":
        return jnp.asarray(np.full(draw.shape, draw.numbers[0], draw.dtype)), g
    function = uniform if draw.kind == "uniform" else normal
    value, g = function(g, draw.shape, draw.numbers[0], draw.numbers[1], draw.dtype)
    return (value if draw.zero_row is None else value.at[draw.zero_row].set(0)), g


def _draw_together(
    g: TorchGenerator, draws: list[Draw], values: dict[str, Array]
) -> TorchGenerator:
    """Add the tensors of one block to `values`."""
    if not draws:
        return g
    sizes = [math.prod(draw.shape) for draw in draws]
    table = [scaled_bounds(d.numbers[0], d.numbers[1], np.dtype(np.float32)) for d in draws]
    bounds = np.repeat(np.stack(table, 1), sizes, 1)
    bounds = np.pad(bounds, [(0, 0), (0, _BLOCK - bounds.shape[1])])
    numbers, g = _block(g, bounds, np.int32(sum(sizes)))
    if not isinstance(numbers, Tracer):
        numbers = np.asarray(numbers)  # whose slices need no compilation
    ends = np.cumsum(sizes).tolist()
    for draw, end, size in zip(draws, ends, sizes, strict=True):
        values[draw.name] = jnp.asarray(numbers[end - size : end].reshape(draw.shape))
    return g


@jax.jit
def _block(
    g: TorchGenerator, bounds: Float[Any, "bounds n"], used: Int32[Any, ""]
) -> tuple[Float[Array, " n"], TorchGenerator]:
    words, state, position = advance(g.state, g.position, _BLOCK, used)
    low_bits = words & np.uint32((1 << FLOAT_DIGITS) - 1)
    numbers = low_bits.astype(np.float32) * np.float32(2.0**-FLOAT_DIGITS)
    g = dataclasses.replace(g, state=state, position=position)
    return between(numbers, bounds, np.dtype(np.float32)), g


def _check_ties(values: Mapping[str, Array], ties: Mapping[str, str]) -> None:
    apart = [
        f"{first!r} and {name!r}"
        for name, first in ties.items()
        if values[name] is not values[first]
    ]
    if apart:
        raise ValueError(
            f"structure must have one value for tied parameters; got two draws of "
            f"{'; '.join(apart)}, since each module draws its own before they are tied. Replace "
            "one in initializers: {'': lambda g, params: ({name: params[other]}, g)}."
        )
