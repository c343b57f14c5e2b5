"""PyTorch's dropout functions: its masks, its arithmetic and its roundings.

PyTorch multiplies by a tensor of noise, which is 0 where an element is dropped. A dropped infinity
is NaN, and a dropped negative number is -0.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from regjax._dropout.core import check_real
from regjax._random.events import observer
from regjax._random.xla import rounded
from regjax.torch_random.cuda import CudaGenerator, cuda_dropout
from regjax.torch_random.layouts import check_memory_order
from regjax.torch_random.one_stream import check_one_stream
from regjax.torch_random.state import (
    TorchGenerator,
    check_any_generator,
    check_generator,
    next_words,
)
from regjax.torch_random.uniforms import (
    HALF_TYPES,
    check_dtype,
    concrete_probability,
    draw_mask,
    keep_threshold,
)
from regshared.checks import check_bool

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Array, Bool, Float, UInt32

    from regjax.torch_random.layouts import MemoryOrder

Generator = TypeVar("Generator", TorchGenerator, CudaGenerator)

# The negative limit of SELU, with the digits that PyTorch's source has.
_ALPHA = 1.7580993408473766


def dropout(
    x: Float[ArrayLike, "*shape"],
    rate: float,
    g: Generator,
    *,
    deterministic: bool = False,
    memory_order: MemoryOrder = None,
) -> tuple[Float[Array, "*shape"], Generator]:
    """Apply dropout as PyTorch: `torch.nn.functional.dropout(x, rate)`.

    Each element consumes 64 bits on a CPU. The rates 0 and 1, `deterministic`, and an empty `x`
    consume nothing. The mask, of one byte for each element, is stored for the backward pass; with
    `jax.checkpoint` around the call it is drawn again instead.

    Args:
        x: Floating: float16, bfloat16, float32 or float64; of any shape.
        rate: The dropout rate, a concrete number in [0, 1], in double precision.
        g: The generator, which may be traced: a `TorchGenerator`, or a `CudaGenerator`.
        deterministic: True in evaluation: return `x` and `g`.
        memory_order: The axes of `x` in the order in which PyTorch stores its tensor, outermost
            first, since it fills the mask in this order. None is row-major; `"channels_last"` is
            (0, 2, 3, 1), or (0, 2, 3, 4, 1).

    Returns:
        An array of the shape and dtype of `x`, and the next state of the generator.

    Raises:
        TypeError: `x` is not floating, `rate` is traced or not a number, or `g` is not a generator.
        ValueError: `rate` is not in [0, 1], `memory_order` does not fit `x`, `g` is a stack of
            generators, or `x` is mapped by `jax.vmap` and `g` is not, so that all its rows would
            have one mask.

    Note (PyTorch):
        Bitwise identical on every CPU, with the generator of PyTorch in the same state. The order
        of a tensor `t` is `sorted(range(t.ndim), key=lambda i: -torch.empty_like(t).stride(i))`.
        This is the order of its own strides, also for a tensor with gaps; axes that were expanded
        have no stride.

        With a `CudaGenerator`, the mask follows from the source of the fused kernel of PyTorch
        2.13, and was never checked on a GPU. It holds for a dense tensor whose data begin at a
        multiple of 16 bytes, as allocated tensors do. Kept elements are multiplied by
        `1 / (1 - rate)` in float32, or in float64 for float64, and rounded once. No promise covers
        these values, nor masks of programs that `torch.compile` made for CUDA.

    Example:
        >>> import jax.numpy as jnp, torch
        >>> from regjax import torch_random
        >>> y, g = torch_random.dropout(jnp.ones(8), 0.5, torch_random.generator(0))
        >>> y.tolist()
        [0.0, 0.0, 2.0, 0.0, 0.0, 0.0, 2.0, 2.0]
        >>> _ = torch.manual_seed(0)
        >>> torch.nn.functional.dropout(torch.ones(8), 0.5).tolist()
        [0.0, 0.0, 2.0, 0.0, 0.0, 0.0, 2.0, 2.0]
    """
    return _apply(x, rate, g, deterministic, memory_order, features=False, alpha=False)


def feature_dropout(
    x: Float[ArrayLike, "*shape"], rate: float, g: TorchGenerator, *, deterministic: bool = False
) -> tuple[Float[Array, "*shape"], TorchGenerator]:
    """Drop whole channels as PyTorch on a CPU: `torch.feature_dropout`.

    The mask has one element for each of the first two axes of `x`, and is row-major in every layout
    of `x`.

    Args:
        x: As for `dropout`, of shape (batch, channels, ...).
        rate: As for `dropout`.
        g: As for `dropout`.
        deterministic: As for `dropout`.

    Returns:
        As `dropout`.

    Raises:
        TypeError: As `dropout`.
        ValueError: As `dropout`; or `x` has fewer than 2 axes and the rate is neither 0 nor 1.

    Note (PyTorch):
        `torch.nn.functional.dropout1d`, `dropout2d` and `dropout3d` of a batch. `dropout1d` and
        `dropout3d` add a batch axis to an array that has none; `dropout2d` does not: the first two
        of three axes are its batch and channels.

    Example:
        >>> import jax.numpy as jnp
        >>> from regjax import torch_random
        >>> y, g = torch_random.feature_dropout(jnp.ones((2, 3, 2)), 0.5, torch_random.generator(0))
        >>> y[..., 0].tolist()
        [[0.0, 0.0, 2.0], [0.0, 0.0, 0.0]]
    """
    return _apply(x, rate, g, deterministic, None, features=True, alpha=False)


def alpha_dropout(
    x: Float[ArrayLike, "*shape"],
    rate: float,
    g: TorchGenerator,
    *,
    deterministic: bool = False,
    memory_order: MemoryOrder = None,
) -> tuple[Float[Array, "*shape"], TorchGenerator]:
    """Apply alpha dropout as PyTorch on a CPU: `torch.nn.functional.alpha_dropout(x, rate)`.

    Args:
        x: As for `dropout`.
        rate: As for `dropout`. PyTorch's rate 1 returns zeros.
        g: As for `dropout`.
        deterministic: As for `dropout`.
        memory_order: As for `dropout`.

    Returns:
        As `dropout`.

    Raises:
        TypeError: As `dropout`.
        ValueError: As `dropout`.

    Example:
        >>> import jax.numpy as jnp
        >>> from regjax import torch_random
        >>> torch_random.alpha_dropout(jnp.ones(4), 0.5, torch_random.generator(0))[0]
        Array([-0.77919394, -0.77919394,  1.6655989 , -0.77919394], dtype=float32)

    References:
        Klambauer et al., "Self-normalizing neural networks", NeurIPS 2017.
    """
    return _apply(x, rate, g, deterministic, memory_order, features=False, alpha=True)


def feature_alpha_dropout(
    x: Float[ArrayLike, "*shape"], rate: float, g: TorchGenerator, *, deterministic: bool = False
) -> tuple[Float[Array, "*shape"], TorchGenerator]:
    """Apply alpha dropout to whole channels as PyTorch: `torch.feature_alpha_dropout`.

    Args:
        x: As for `feature_dropout`.
        rate: As for `alpha_dropout`.
        g: As for `dropout`.
        deterministic: As for `dropout`.

    Returns:
        As `dropout`.

    Raises:
        TypeError: As `dropout`.
        ValueError: As `feature_dropout`.

    Example:
        >>> import jax.numpy as jnp
        >>> from regjax import torch_random
        >>> x, g = jnp.ones((1, 4, 2)), torch_random.generator(0)
        >>> torch_random.feature_alpha_dropout(x, 0.5, g)[0][0, :, 0]
        Array([-0.77919394, -0.77919394,  1.6655989 , -0.77919394], dtype=float32)
    """
    return _apply(x, rate, g, deterministic, None, features=True, alpha=True)


def _apply(
    x: Any,
    rate: Any,
    g: Any,
    deterministic: Any,
    memory_order: MemoryOrder,
    *,
    features: bool,
    alpha: bool,
) -> tuple[Array, Any]:
    generator = check_generator if features or alpha else check_any_generator
    x, rate, order = check_inputs(x, rate, memory_order)
    g = generator(g)
    if check_bool("deterministic", deterministic) or rate == 0 or not x.size:
        return x, g
    if rate == 1:
        return x * jnp.zeros((), x.dtype), g
    if isinstance(g, CudaGenerator):
        return cuda_dropout(x, rate, g, order)
    if features and x.ndim < 2:
        raise ValueError(f"x must have at least the axes (batch, channels); got shape {x.shape}.")
    shape = (*x.shape[:2], *(1 for _ in x.shape[2:])) if features else x.shape
    noise = (_alpha_noise if alpha else _noise)(rate, x.dtype)
    operands = x, g, keep_threshold(1 - rate), noise
    if not (observers := observer()):
        return _dropped(*operands, shape, order)
    y, following, keep = _masked(*operands, shape, order)
    name = ("feature_" * features) + ("alpha_" * alpha) + "dropout"
    observers.draw(f"torch_random.{name}", next_words(g), rate, keep, x)
    return y, following


def check_inputs(
    x: Any, rate: Any, memory_order: MemoryOrder
) -> tuple[Array, float, tuple[int, ...]]:
    """Return the array, the rate, and the order of the axes in memory."""
    x = check_real(x, "PyTorch's dropout", "Apply dropout to both parts.")
    check_dtype(x.dtype)
    return x, concrete_probability("rate", rate), check_memory_order(memory_order, x.ndim)


def _noise(rate: float, dtype: np.dtype) -> tuple[np.ndarray, None]:
    """Return the factor of kept elements; there is nothing to add."""
    compute = np.float32 if dtype in HALF_TYPES else dtype.type
    return np.asarray(compute(1) / compute(1 - rate), dtype), None


def _alpha_noise(rate: float, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Return the factor of kept elements, and the summands of dropped and of kept ones.

    PyTorch makes them by operations of one rounding each. In half types it rounds a number that it
    adds, too.
    """
    compute = np.float32 if dtype in HALF_TYPES else dtype.type
    a = 1 / math.sqrt((_ALPHA * _ALPHA * rate + 1) * (1 - rate))
    kept, dropped = (compute(n).astype(dtype) for n in (_ALPHA * a * rate, -_ALPHA * a))
    dropped = (dropped.astype(compute) + kept.astype(compute)).astype(dtype)
    return np.asarray(compute(a), dtype), np.stack([dropped, kept])


@functools.partial(jax.jit, static_argnums=(4, 5))
def _dropped(*operands: Any) -> tuple[Float[Array, "*shape"], TorchGenerator]:
    return _masked(*operands)[:2]


# Rates are traced arguments, so that one trace serves all of them.
@functools.partial(jax.jit, static_argnums=(4, 5))
def _masked(
    x: Float[Array, "*shape"],
    g: TorchGenerator,
    threshold: UInt32[Any, " pair"],
    noise: tuple[Float[Any, ""], Float[Any, " two"] | None],
    shape: tuple[int, ...],
    order: tuple[int, ...],
) -> tuple[Float[Array, "*shape"], TorchGenerator, Bool[Array, "*mask"]]:
    g = check_one_stream(g, lax.stop_gradient(x))
    keep, g = draw_mask(g, threshold, shape, order)
    # The backward pass needs the mask alone; prevent_cse would keep XLA from fusing it.
    return jax.checkpoint(_combined, prevent_cse=False)(x, keep, *noise), g, keep


def _combined(
    x: Float[Array, "*shape"],
    keep: Bool[Array, "*mask"],
    scale: Float[Array, ""],
    summands: Float[Array, " two"] | None,
) -> Float[Array, "*shape"]:
    # PyTorch rounds after each operation, in half types, too.
    product = rounded(x * jnp.where(keep, scale, jnp.zeros((), x.dtype)))
    return product if summands is None else rounded(product + jnp.where(keep, *summands[::-1]))
