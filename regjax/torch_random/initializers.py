"""The initializers of `torch.nn.init`, drawn in PyTorch's order.

The scale of each is computed in double precision by PyTorch's formulas; the numbers are those of
`uniform` and `normal`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from regjax._checks import check_number, check_shape
from regjax._random.xla import rounded
from regjax.torch_random.integers import permutation
from regjax.torch_random.normals import normal
from regjax.torch_random.state import TorchGenerator, check_generator
from regjax.torch_random.uniforms import HALF_TYPES, check_dtype, uniform
from regshared.checks import check_choice

if TYPE_CHECKING:
    from jax.typing import DTypeLike
    from jaxtyping import Array, Float

_GAINS = {
    **dict.fromkeys(("linear", "sigmoid"), 1.0),
    **{f"conv{kind}{n}d": 1.0 for kind in ("", "_transpose") for n in (1, 2, 3)},
    "tanh": 5 / 3,
    "relu": math.sqrt(2),
    "selu": 3 / 4,
}
_DEFAULT_SLOPE = 0.01
_MODES = ("fan_in", "fan_out")
# PyTorch redraws normal numbers that are out of bounds if it keeps more than this fraction.
_LEAST_ACCEPTED = 0.3


def calculate_gain(nonlinearity: str, param: float | None = None) -> float:
    """Return the gain of a nonlinearity: `torch.nn.init.calculate_gain`.

    Args:
        nonlinearity: `"linear"`, `"conv1d"` to `"conv3d"`, `"conv_transpose1d"` to
            `"conv_transpose3d"`, `"sigmoid"`, `"tanh"`, `"relu"`, `"leaky_relu"` or `"selu"`.
        param: The negative slope of `"leaky_relu"`, 0.01 by default.

    Raises:
        TypeError: An argument has a wrong type.
        ValueError: The nonlinearity is unknown.

    Example:
        >>> from regjax import torch_random
        >>> torch_random.calculate_gain("leaky_relu", 1.0)
        1.0
    """
    if check_choice("nonlinearity", nonlinearity, [*_GAINS, "leaky_relu"]) != "leaky_relu":
        return _GAINS[nonlinearity]
    slope = _DEFAULT_SLOPE if param is None else check_number("param", param)
    return math.sqrt(2 / (1 + slope**2))


def xavier_uniform(
    g: TorchGenerator, shape: Sequence[int], gain: float = 1.0, dtype: DTypeLike = jnp.float32
) -> tuple[Float[Array, "*shape"], TorchGenerator]:
    """Draw a weight: PyTorch's `torch.nn.init.xavier_uniform_`.

    Args:
        g: The generator.
        shape: The shape in PyTorch: (out, in, ...), of at least 2 axes.
        gain: The factor of the scale.
        dtype: As for `uniform`.

    Returns:
        The weight, and the next state of the generator.

    Raises:
        TypeError: An argument has a wrong type.
        ValueError: The shape has fewer than 2 axes.

    Note (PyTorch):
        Bitwise identical where `uniform` is.

    Example:
        >>> import torch
        >>> from regjax import torch_random
        >>> weight, g = torch_random.xavier_uniform(torch_random.generator(0), (1, 3))
        >>> weight
        Array([[-0.00916945,  0.65700656, -1.0080204 ]], dtype=float32)
        >>> g_torch = torch.Generator().manual_seed(0)
        >>> torch.nn.init.xavier_uniform_(torch.empty(1, 3), generator=g_torch)
        tensor([[-0.0092,  0.6570, -1.0080]])

    References:
        Glorot and Bengio, "Understanding the difficulty of training deep feedforward neural
        networks", AISTATS 2010.
    """
    shape = check_shape("shape", shape)
    bound = xavier_bound(shape, check_number("gain", gain))
    return uniform(g, shape, -bound, bound, dtype)


def xavier_normal(
    g: TorchGenerator, shape: Sequence[int], gain: float = 1.0, dtype: DTypeLike = jnp.float32
) -> tuple[Float[Array, "*shape"], TorchGenerator]:
    """Draw a weight: PyTorch's `torch.nn.init.xavier_normal_`.

    Args:
        g: As for `xavier_uniform`.
        shape: As for `xavier_uniform`.
        gain: As for `xavier_uniform`.
        dtype: As for `uniform`.

    Returns:
        As `xavier_uniform`.

    Raises:
        TypeError: As `xavier_uniform`.
        ValueError: As `xavier_uniform`.

    Note (PyTorch):
        Bitwise identical where `normal` is.

    Example:
        >>> from regjax import torch_random
        >>> weight, g = torch_random.xavier_normal(torch_random.generator(0), (4, 8))
    """
    shape = check_shape("shape", shape)
    return normal(g, shape, 0.0, xavier_stddev(shape, check_number("gain", gain)), dtype)


def kaiming_uniform(
    g: TorchGenerator,
    shape: Sequence[int],
    a: float = 0.0,
    mode: str = "fan_in",
    nonlinearity: str = "leaky_relu",
    dtype: DTypeLike = jnp.float32,
) -> tuple[Float[Array, "*shape"], TorchGenerator]:
    """Draw a weight: PyTorch's `torch.nn.init.kaiming_uniform_`.

    PyTorch initializes Linear and convolutions in this way, with `a=math.sqrt(5)`.

    Args:
        g: As for `xavier_uniform`.
        shape: As for `xavier_uniform`. The size `in` is the second axis also for the weight of a
            transposed convolution, (in, out, ...).
        a: The negative slope, used for `"leaky_relu"` only.
        mode: `"fan_in"` or `"fan_out"`.
        nonlinearity: As for `calculate_gain`.
        dtype: As for `uniform`.

    Returns:
        As `xavier_uniform`.

    Raises:
        TypeError: As `xavier_uniform`.
        ValueError: As `xavier_uniform`; or the mode or the nonlinearity is unknown.

    Note (PyTorch):
        Bitwise identical where `uniform` is.

    Example:
        >>> import math
        >>> from regjax import torch_random
        >>> torch_random.kaiming_uniform(torch_random.generator(0), (1, 3), a=math.sqrt(5))[0]
        Array([[-0.00432252,  0.30971584, -0.47518533]], dtype=float32)

    References:
        He et al., "Delving deep into rectifiers: surpassing human-level performance on ImageNet
        classification", ICCV 2015.
    """
    shape = check_shape("shape", shape)
    bound = math.sqrt(3.0) * kaiming_stddev(shape, a, mode, nonlinearity)
    return uniform(g, shape, -bound, bound, dtype)


def kaiming_normal(
    g: TorchGenerator,
    shape: Sequence[int],
    a: float = 0.0,
    mode: str = "fan_in",
    nonlinearity: str = "leaky_relu",
    dtype: DTypeLike = jnp.float32,
) -> tuple[Float[Array, "*shape"], TorchGenerator]:
    """Draw a weight: PyTorch's `torch.nn.init.kaiming_normal_`.

    Args:
        g: As for `xavier_uniform`.
        shape: As for `kaiming_uniform`.
        a: As for `kaiming_uniform`.
        mode: As for `kaiming_uniform`.
        nonlinearity: As for `kaiming_uniform`.
        dtype: As for `uniform`.

    Returns:
        As `xavier_uniform`.

    Raises:
        TypeError: As `kaiming_uniform`.
        ValueError: As `kaiming_uniform`.

    Note (PyTorch):
        Bitwise identical where `normal` is.

    Example:
        >>> from regjax import torch_random
        >>> g = torch_random.generator(0)
        >>> weight, g = torch_random.kaiming_normal(g, (8, 3, 5, 5), mode="fan_out")
    """
    shape = check_shape("shape", shape)
    return normal(g, shape, 0.0, kaiming_stddev(shape, a, mode, nonlinearity), dtype)


def trunc_normal(
    g: TorchGenerator,
    shape: Sequence[int],
    mean: float = 0.0,
    std: float = 1.0,
    a: float = -2.0,
    b: float = 2.0,
    dtype: DTypeLike = jnp.float32,
) -> tuple[Float[Array, "*shape"], TorchGenerator]:
    """Draw normal numbers within bounds: PyTorch's `torch.nn.init.trunc_normal_`.

    PyTorch 2.13 draws all numbers, and draws all again while one is out of bounds; each is the
    first that is not. If at most 30 % lie within the bounds, it draws uniform numbers instead, and
    accepts each with a probability proportional to its density.

    Args:
        g: The generator.
        shape: The shape of the result.
        mean: The mean before truncation.
        std: The standard deviation before truncation, positive.
        a: The lower bound, absolute: not a multiple of `std`.
        b: The upper bound.
        dtype: As for `normal`.

    Returns:
        The numbers, and the next state of the generator.

    Raises:
        TypeError: An argument has a wrong type.
        ValueError: `std` is not positive, or `a` is not less than `b`; or, if at most 30 % lie
            within the bounds, `dtype` is a half type.

    Note (PyTorch):
        Bitwise identical where `normal` is; the uniform numbers where `uniform` is, unless a
        logarithm that is compared differs in its last bit. Older releases, such as PyTorch 2.0,
        apply the inverse error function to uniform numbers instead.

    Example:
        >>> from regjax import torch_random
        >>> weight, g = torch_random.trunc_normal(torch_random.generator(0), (4, 8), std=0.02)
    """
    g, shape, dtype = check_generator(g), check_shape("shape", shape), check_dtype(dtype)
    mean, std = check_number("mean", mean), check_number("std", std, minimum=0)
    a, b = check_number("a", a), check_number("b", b)
    if not std:
        raise ValueError("std must be positive; got 0. Use jnp.full for constant numbers.")
    if a >= b:
        raise ValueError(f"a must be less than b; got {a} and {b}.")
    if _below((b - mean) / std) - _below((a - mean) / std) > _LEAST_ACCEPTED:
        return _redrawn_normals(g, shape, mean, std, a, b, dtype)
    if dtype in HALF_TYPES:
        raise ValueError(
            f"dtype must be float32 or float64 if bounds leave at most 30 %; got {dtype}."
        )
    return _accepted_uniforms(g, shape, mean, std, a, b, dtype)


def _below(x: float) -> float:
    """Return the probability of a normal number below `x`."""
    return (1.0 + math.erf(x / math.sqrt(2.0))) / 2.0


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5, 6))
def _redrawn_normals(
    g: TorchGenerator,
    shape: tuple[int, ...],
    mean: float,
    std: float,
    a: float,
    b: float,
    dtype: np.dtype,
) -> tuple[Float[Array, "*shape"], TorchGenerator]:
    low, high = (jnp.asarray(bound, dtype) for bound in (a, b))

    def is_out(numbers: Array) -> Array:
        return (numbers < low) | (numbers > high)

    def redraw(carry: tuple[Array, TorchGenerator]) -> tuple[Array, TorchGenerator]:
        numbers, g = carry
        fresh, g = normal(g, shape, mean, std, dtype)
        return jnp.where(is_out(numbers), fresh, numbers), g

    first = normal(g, shape, mean, std, dtype)
    return lax.while_loop(lambda carry: is_out(carry[0]).any(), redraw, first)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5, 6))
def _accepted_uniforms(
    g: TorchGenerator,
    shape: tuple[int, ...],
    mean: float,
    std: float,
    a: float,
    b: float,
    dtype: np.dtype,
) -> tuple[Float[Array, "*shape"], TorchGenerator]:
    log_peak = -0.5 * ((max(a, min(mean, b)) - mean) / std) ** 2

    def draw(carry: tuple[Array, Array, TorchGenerator]) -> tuple[Array, Array, TorchGenerator]:
        numbers, is_pending, g = carry
        fresh, g = uniform(g, shape, a, b, dtype)
        chance, g = uniform(g, shape, dtype=dtype)
        log_density = rounded(jnp.square((fresh - mean) / std)) * -0.5 - log_peak
        with jax.enable_x64(True):
            log_chance = jnp.log(lax.convert_element_type(chance, np.float64)).astype(dtype)
        numbers = jnp.where(is_pending, fresh, numbers)
        return numbers, is_pending & (log_chance > log_density), g

    first = draw((jnp.zeros(shape, dtype), jnp.ones(shape, bool), g))
    numbers, _, g = lax.while_loop(lambda carry: carry[1].any(), draw, first)
    return numbers, g


def orthogonal(
    g: TorchGenerator, shape: Sequence[int], gain: float = 1.0, dtype: DTypeLike = jnp.float32
) -> tuple[Float[Array, "*shape"], TorchGenerator]:
    """Draw a matrix with orthonormal rows or columns: PyTorch's `torch.nn.init.orthogonal_`.

    Args:
        g: The generator.
        shape: The shape in PyTorch, of at least 2 axes; all but the first are flattened.
        gain: The factor of the orthonormal matrix.
        dtype: float32, or float64, which requires `jax_enable_x64`.

    Returns:
        The matrix, and the next state of the generator.

    Raises:
        TypeError: An argument has a wrong type.
        ValueError: The shape has fewer than 2 axes, or the dtype has 16 bits.

    Note (PyTorch):
        The same matrix to rounding, with the same signs, from the same normal numbers: the bits of
        a QR decomposition depend on the library of linear algebra. The next state of the generator
        is identical.

    Example:
        >>> import jax.numpy as jnp
        >>> from regjax import torch_random
        >>> weight, g = torch_random.orthogonal(torch_random.generator(0), (4, 8))
        >>> bool(abs(weight @ weight.T - jnp.eye(4)).max() < 1e-6)
        True

    References:
        Saxe et al., "Exact solutions to the nonlinear dynamics of learning in deep linear neural
        networks", ICLR 2014. Mezzadri, "How to generate random matrices from the classical compact
        groups", Notices of the AMS 54, 2007.
    """
    g, shape, dtype = check_generator(g), check_shape("shape", shape), check_dtype(dtype)
    gain = check_number("gain", gain)
    _check_axes(shape)
    if dtype in HALF_TYPES:
        raise ValueError(f"dtype must be float32 or float64; got {dtype}. Cast the result.")
    if not math.prod(shape):
        return jnp.zeros(shape, dtype), g
    return _orthogonal(g, shape, gain, dtype)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _orthogonal(
    g: TorchGenerator, shape: tuple[int, ...], gain: float, dtype: np.dtype
) -> tuple[Float[Array, "*shape"], TorchGenerator]:
    rows, columns = shape[0], math.prod(shape[1:])
    matrix, g = normal(g, (rows, columns), dtype=dtype)
    q, r = jnp.linalg.qr(matrix.T if rows < columns else matrix)
    q = q * jnp.sign(jnp.diagonal(r))[None]
    return (q.T if rows < columns else q).reshape(shape) * gain, g


def sparse(
    g: TorchGenerator,
    shape: Sequence[int],
    sparsity: float,
    std: float = 0.01,
    dtype: DTypeLike = jnp.float32,
) -> tuple[Float[Array, "rows columns"], TorchGenerator]:
    """Draw a matrix with zeros in each column: PyTorch's `torch.nn.init.sparse_`.

    Args:
        g: The generator.
        shape: The shape, of 2 axes.
        sparsity: The fraction of zeros in each column, in [0, 1]; their number is rounded up.
        std: The standard deviation of the other elements.
        dtype: As for `normal`.

    Returns:
        The matrix, and the next state of the generator.

    Raises:
        TypeError: An argument has a wrong type.
        ValueError: The shape has not 2 axes, or `sparsity` is not in [0, 1].

    Note (PyTorch):
        Bitwise identical where `normal` is. If `torch.nn.init.sparse_` is given a generator,
        PyTorch 2.13 still draws the places of the zeros from the default generator.

    Example:
        >>> from regjax import torch_random
        >>> weight, g = torch_random.sparse(torch_random.generator(0), (4, 5), sparsity=0.5)
        >>> (weight == 0).sum(0).tolist()
        [2, 2, 2, 2, 2]

    References:
        Martens, "Deep learning via Hessian-free optimization", ICML 2010.
    """
    g, shape = check_generator(g), check_shape("shape", shape)
    if len(shape) != 2:
        raise ValueError(f"shape must have 2 axes; got {shape}.")
    sparsity = check_number("sparsity", sparsity, minimum=0)
    if sparsity > 1:
        raise ValueError(f"sparsity must lie in [0, 1]; got {sparsity}.")
    numbers, g = normal(g, shape, 0.0, std, dtype)
    return _with_zeros(g, numbers, math.ceil(sparsity * shape[0]))


@functools.partial(jax.jit, static_argnums=2)
def _with_zeros(
    g: TorchGenerator, numbers: Float[Array, "rows columns"], count: int
) -> tuple[Float[Array, "rows columns"], TorchGenerator]:
    def thin(g: TorchGenerator, column: Array) -> tuple[TorchGenerator, Array]:
        rows, g = permutation(g, len(column))
        return g, column.at[rows[:count]].set(0)

    g, columns = lax.scan(thin, g, numbers.T)
    return columns.T, g


def xavier_stddev(shape: tuple[int, ...], gain: float = 1.0) -> float:
    """Return the standard deviation of `xavier_normal`."""
    return gain * math.sqrt(2.0 / max(sum(_fans(shape)), 1))


def xavier_bound(shape: tuple[int, ...], gain: float = 1.0) -> float:
    """Return the bound of `xavier_uniform`."""
    return math.sqrt(3.0) * xavier_stddev(shape, gain)


def kaiming_stddev(
    shape: tuple[int, ...], a: Any, mode: str = "fan_in", nonlinearity: str = "leaky_relu"
) -> float:
    """Return the standard deviation of `kaiming_normal`."""
    fan = _fans(shape)[_MODES.index(check_choice("mode", mode, _MODES))]
    return calculate_gain(nonlinearity, check_number("a", a)) / math.sqrt(max(fan, 1))


def _fans(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the numbers of inputs and of outputs of an element."""
    _check_axes(shape)
    field = math.prod(shape[2:])
    return shape[1] * field, shape[0] * field


def _check_axes(shape: tuple[int, ...]) -> None:
    if len(shape) < 2:
        raise ValueError(f"shape must have at least 2 axes, (out, in, ...); got {shape}.")
