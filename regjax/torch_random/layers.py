"""The initial values of the layers of `torch.nn`, as a list of draws.

A rule returns the draws of one layer in the order in which its constructor makes them. Nothing is
drawn here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from regjax._checks import check_number, check_shape
from regjax.torch_random.initializers import kaiming_stddev, xavier_bound, xavier_stddev
from regjax.torch_random.uniforms import check_dtype
from regshared.checks import check_choice, check_integer, describe

if TYPE_CHECKING:
    from jax.typing import DTypeLike


@dataclasses.dataclass(frozen=True)
class Draw:
    """A tensor that a constructor fills.

    Attributes:
        name: Its name in the layer.
        shape: Its shape in PyTorch.
        dtype: Its dtype.
        kind: "uniform", "normal" or "constant".
        numbers: The bounds; the mean and the standard deviation; or the constant.
        zero_row: A row that is set to zero afterwards, if any.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    kind: str
    numbers: tuple[float, ...]
    zero_row: int | None = None


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer of `torch.nn` without PyTorch, for `init_like`.

    Args:
        kind: The name of the class, such as `"Linear"`, `"Conv2d"`, `"LSTM"` or
            `"MultiheadAttention"`.
        shapes: The shape of each entry of its `state_dict()`, in the order of PyTorch:
            `{name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}`.
        dtype: The dtype of the parameters.
        padding_idx: The row of an `Embedding` that is zero.
        init: The constant of a `PReLU`.

    Raises:
        TypeError: An argument has a wrong type.
        ValueError: The kind is unknown, or `shapes` are not those of such a layer.

    Example:
        >>> from regjax.torch_random import Layer
        >>> layer = Layer("Linear", {"weight": (64, 20), "bias": (64,)})
    """

    kind: str
    shapes: Mapping[str, Sequence[int]]
    dtype: DTypeLike = "float32"
    padding_idx: int | None = None
    init: float = 0.25

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, sorted(RULES))
        if not isinstance(self.shapes, Mapping):
            raise TypeError(f"shapes must be a mapping; got {describe(self.shapes)}.")
        try:
            names = {draw.name for draw in draws_of(self)}
        except KeyError as missing:
            raise ValueError(
                f"shapes must have {missing} for {self.kind}; got {', '.join(self.shapes)}."
            ) from None
        if unknown := self.shapes.keys() - names:
            raise ValueError(
                f"shapes must have entries of {self.kind} only; got {', '.join(sorted(unknown))}."
            )


@dataclasses.dataclass(frozen=True)
class _Form:
    """A `Layer` with checked arguments."""

    kind: str
    shapes: dict[str, tuple[int, ...]]
    dtype: np.dtype
    padding_idx: int | None
    init: float

    def uniform(self, name: str, bound: float) -> Draw:
        return Draw(name, self.shapes[name], self.dtype, "uniform", (-bound, bound))

    def normal(self, name: str, stddev: float = 1.0, zero_row: int | None = None) -> Draw:
        return Draw(name, self.shapes[name], self.dtype, "normal", (0.0, stddev), zero_row)

    def constant(self, name: str, value: float, dtype: np.dtype | None = None) -> Draw:
        return Draw(name, self.shapes[name], dtype or self.dtype, "constant", (value,))


def draws_of(layer: Layer) -> list[Draw]:
    """Return the draws of a layer's constructor, in its order."""
    return list(RULES[layer.kind](_form(layer)))


def _form(layer: Layer) -> _Form:
    shapes = {name: check_shape(f"shapes[{name!r}]", s) for name, s in layer.shapes.items()}
    row = layer.padding_idx
    if row is not None:
        rows = shapes.get("weight", (0,))[0]
        row = check_integer("padding_idx", row, -rows, rows - 1) % rows
    init = check_number("init", layer.init)
    return _Form(layer.kind, shapes, check_dtype(layer.dtype), row, init)


def _affine(layer: _Form) -> Iterator[Draw]:
    """Yield the draws of Linear and of convolutions, transposed ones included."""
    shape = layer.shapes["weight"]
    stddev = kaiming_stddev(shape, math.sqrt(5))
    yield layer.uniform("weight", math.sqrt(3.0) * stddev)
    if "bias" in layer.shapes:
        yield layer.uniform("bias", _bound(math.prod(shape[1:])))


def _bilinear(layer: _Form) -> Iterator[Draw]:
    for name in ("weight", "bias"):
        if name == "weight" or name in layer.shapes:
            yield layer.uniform(name, _bound(layer.shapes["weight"][1]))


def _embedding(layer: _Form) -> Iterator[Draw]:
    yield layer.normal("weight", zero_row=layer.padding_idx)


def _attention(layer: _Form) -> Iterator[Draw]:
    """Yield the draws of attention, whose output projection is constructed first."""
    prefix = "out_proj."
    names = [
        name for name in ("weight", "bias") if name == "weight" or prefix + name in layer.shapes
    ]
    output = {name: layer.shapes[prefix + name] for name in names}
    for draw in _affine(dataclasses.replace(layer, shapes=output)):
        yield dataclasses.replace(draw, name=prefix + draw.name)
    one = ("in_proj_weight",)
    three = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    for name in three if three[0] in layer.shapes else one:
        yield layer.uniform(name, xavier_bound(layer.shapes[name]))
    if "in_proj_bias" in layer.shapes:
        yield layer.constant("in_proj_bias", 0.0)
        yield layer.constant("out_proj.bias", 0.0)
    for name in ("bias_k", "bias_v"):
        if name in layer.shapes:
            yield layer.normal(name, xavier_stddev(layer.shapes[name]))


def _recurrent(layer: _Form) -> Iterator[Draw]:
    """Yield the draws of recurrent layers and cells: all parameters alike, in their order."""
    # The size of the hidden state is the second axis of its weight, or of its projection.
    suffix = "" if layer.kind.endswith("Cell") else "_l0"
    projection = f"weight_hr{suffix}"
    of_hidden = projection if projection in layer.shapes else f"weight_hh{suffix}"
    bound = _bound(layer.shapes[of_hidden][1])
    for name in layer.shapes:
        yield layer.uniform(name, bound)


def _norm(layer: _Form) -> Iterator[Draw]:
    values = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}
    for name, value in values.items():
        if name in layer.shapes:
            yield layer.constant(name, value)
    if "num_batches_tracked" in layer.shapes:
        yield layer.constant("num_batches_tracked", 0, np.dtype(np.int32))


def _prelu(layer: _Form) -> Iterator[Draw]:
    yield layer.constant("weight", layer.init)


def _bound(size: int) -> float:
    return 1 / math.sqrt(size) if size > 0 else 0.0


RULES: dict[str, Callable[[_Form], Iterator[Draw]]] = {
    **dict.fromkeys(("Linear", "NonDynamicallyQuantizableLinear"), _affine),
    **{f"Conv{kind}{n}d": _affine for kind in ("", "Transpose") for n in (1, 2, 3)},
    "Bilinear": _bilinear,
    **dict.fromkeys(("Embedding", "EmbeddingBag"), _embedding),
    "MultiheadAttention": _attention,
    **{f"{kind}{cell}": _recurrent for kind in ("RNN", "LSTM", "GRU") for cell in ("", "Cell")},
    **{f"{kind}Norm{n}d": _norm for kind in ("Batch", "Instance") for n in (1, 2, 3)},
    **dict.fromkeys(("LayerNorm", "GroupNorm", "RMSNorm", "SyncBatchNorm"), _norm),
    "PReLU": _prelu,
}
