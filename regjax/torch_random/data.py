"""The order of data in PyTorch: `torch.utils.data` from the state of the generator.

PyTorch draws a 64-bit seed for the workers whenever a loop over a DataLoader begins, shuffled or
not and with or without workers. A RandomSampler without a generator then draws the seed of a
generator of its own.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from regjax._checks import check_array
from regjax.torch_random.integers import permutation, randint
from regjax.torch_random.state import (
    TorchGenerator,
    check_generator,
    draw_longs,
    draw_words,
    generator,
    seeded,
)
from regjax.torch_random.uniforms import double_uniforms
from regshared.checks import check_bool, check_integer, check_items, describe

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Array, Float, Int, Int32, UInt32

# PyTorch draws the seeds as non-negative int64.
_POSITIVE = np.array([0x7FFFFFFF, 0xFFFFFFFF], np.uint32)
_MOST_WEIGHTS = 2**24


def loader_seed(g: TorchGenerator) -> tuple[UInt32[Array, " pair"], TorchGenerator]:
    """Draw the seed that PyTorch draws when a loop over a DataLoader begins.

    Every `for batch in loader` consumes it, also over a test set that is not shuffled, with any
    sampler and any number of workers. `shuffled_batches` includes it.

    Args:
        g: The generator: PyTorch's default one, or the one that the DataLoader is given.

    Returns:
        The seed as a high and a low word (worker i is seeded with this number plus i), and the next
        state of the generator.

    Raises:
        TypeError: `g` is not a generator.

    Note (PyTorch):
        With `persistent_workers=True` and at least one worker, only the first loop draws it.

    Example:
        >>> import torch
        >>> from regjax import torch_random
        >>> seed, g = torch_random.loader_seed(torch_random.generator(0))
        >>> _ = torch.manual_seed(0)
        >>> iterator = iter(torch.utils.data.DataLoader(range(4)))
        >>> (int(seed[0]) << 32) + int(seed[1]) == iterator._base_seed
        True
    """
    return _loader_seed(check_generator(g))


@jax.jit
def _loader_seed(g: TorchGenerator) -> tuple[UInt32[Array, " pair"], TorchGenerator]:
    words, g = draw_words(g, 2)
    return words & _POSITIVE, g


def shuffled_batches(
    g: TorchGenerator,
    size: int,
    batch_size: int = 1,
    *,
    drop_last: bool = False,
    is_own: bool = False,
) -> tuple[list[Int32[Array, " batch"]], TorchGenerator]:
    """Draw the batches of an epoch: `DataLoader(dataset, batch_size, shuffle=True)`.

    Args:
        g: The generator as it is when the loop over the DataLoader begins.
        size: The size of the dataset.
        batch_size: The size of a batch.
        drop_last: Whether to leave out a last batch that is not full.
        is_own: True if the DataLoader is given a generator, of which `g` is the state; False if `g`
            is PyTorch's default generator.

    Returns:
        The indices of each batch, in a list (for `jax.lax.scan`, stack full batches); and the
        state of the generator after a complete epoch; if `is_own` is False, it is the same after a
        part of it.

    Raises:
        TypeError: An argument has a wrong type.
        ValueError: `size` or `batch_size` is not positive.

    Note (PyTorch):
        Identical for every number of workers. See `loader_seed` for `persistent_workers`. The
        order of an epoch does not depend on what is drawn during the epoch.

    Example:
        >>> import torch
        >>> from regjax import torch_random
        >>> batches, g = torch_random.shuffled_batches(torch_random.generator(0), 5, 2)
        >>> [batch.tolist() for batch in batches]
        [[1, 4], [2, 3], [0]]
        >>> _ = torch.manual_seed(0)
        >>> loader = torch.utils.data.DataLoader(range(5), 2, shuffle=True)
        >>> [batch.tolist() for batch in loader]
        [[1, 4], [2, 3], [0]]
    """
    batch_size = check_integer("batch_size", batch_size, minimum=1)
    drop_last = check_bool("drop_last", drop_last)
    _, g = loader_seed(g)
    order, g = random_sampler(g, size, is_own=is_own)
    end = size // batch_size * batch_size if drop_last else size
    return _parts(order, [*range(batch_size, end, batch_size), end] if end else []), g


def random_sampler(
    g: TorchGenerator,
    size: int,
    *,
    replacement: bool = False,
    num_samples: int | None = None,
    is_own: bool = False,
) -> tuple[Int32[Array, " num_samples"], TorchGenerator]:
    """Draw an order: `torch.utils.data.RandomSampler`.

    Args:
        g: The generator as it is when the iteration begins. A DataLoader calls `loader_seed` first.
        size: The size of the dataset.
        replacement: Whether an element can be drawn more than once.
        num_samples: The number of indices, `size` by default.
        is_own: True if the sampler is given a generator, of which `g` is the state.

    Returns:
        The indices, and the state of the generator after a complete iteration.

    Raises:
        TypeError: An argument has a wrong type.
        ValueError: `size` or `num_samples` is not positive.

    Note (PyTorch):
        A sampler with a generator draws one more permutation at the end of the iteration, and uses
        none of it if `num_samples` is a multiple of `size`.

    Example:
        >>> import torch
        >>> from regjax import torch_random
        >>> torch_random.random_sampler(torch_random.generator(0), 5)[0].tolist()
        [1, 3, 4, 2, 0]
        >>> _ = torch.manual_seed(0)
        >>> list(torch.utils.data.RandomSampler(range(5)))
        [1, 3, 4, 2, 0]
    """
    g, size = check_generator(g), check_integer("size", size, minimum=1)
    count = size if num_samples is None else check_integer("num_samples", num_samples, minimum=1)
    replacement, is_own = check_bool("replacement", replacement), check_bool("is_own", is_own)
    own = g
    if not is_own:
        own, g = _seeded(g)
    if replacement:
        order, own = randint(own, (count,), 0, size)
    else:
        orders = []
        # The last permutation may be drawn without being used.
        for _ in range(count // size + 1 if is_own else -(-count // size)):
            order, own = permutation(own, size)
            orders.append(order)
        order = jnp.concatenate(orders)[:count]
    return order, own if is_own else g


@jax.jit
def _seeded(g: TorchGenerator) -> tuple[TorchGenerator, TorchGenerator]:
    """Return a generator whose seed is drawn, and the next state of `g`."""
    seed, g = _loader_seed(g)  # a draw of the same kind
    return seeded(seed), g


def subset_random_sampler(
    g: TorchGenerator, indices: Sequence[int] | Int[ArrayLike, " n"]
) -> tuple[Int[Array, " n"], TorchGenerator]:
    """Draw an order of some indices: `torch.utils.data.SubsetRandomSampler`.

    Args:
        g: The default generator as it is when the iteration begins, or the one that the sampler is
            given. A DataLoader calls `loader_seed` first.
        indices: The indices, of shape (n,).

    Returns:
        The indices in another order, and the next state of the generator.

    Raises:
        TypeError: `indices` is not an array, or `g` is not a generator.
        ValueError: `indices` has not one axis.

    Example:
        >>> from regjax import torch_random
        >>> torch_random.subset_random_sampler(torch_random.generator(0), [10, 11, 12])[0].tolist()
        [12, 10, 11]
    """
    items = check_array("indices", indices)  # pyright: ignore[reportArgumentType]  # lists too
    if items.ndim != 1:
        raise ValueError(f"indices must have one axis; got {describe(items)}.")
    order, g = permutation(g, len(items))
    return items[order], g


def weighted_random_sampler(
    g: TorchGenerator,
    weights: Sequence[float] | Float[ArrayLike, " n"],
    num_samples: int,
    *,
    replacement: bool = True,
) -> tuple[Int32[Array, " num_samples"], TorchGenerator]:
    """Draw indices by weight: `torch.utils.data.WeightedRandomSampler`, `torch.multinomial`.

    Args:
        g: The default generator as it is when the iteration begins, or the one that the sampler is
            given. A DataLoader calls `loader_seed` first.
        weights: Concrete weights, at least 0, of shape (n,); computed with in float64.
        num_samples: The number of indices.
        replacement: Whether an element can be drawn more than once.

    Returns:
        The indices, and the next state of the generator.

    Raises:
        TypeError: An argument has a wrong type.
        ValueError: A weight is negative or not finite, none is positive, there are more than 2**24,
            or without replacement fewer positive ones than `num_samples`.

    Note (PyTorch):
        Identical with replacement and more than one sample. Otherwise PyTorch orders the elements
        by quotients with a logarithm: two that differ in the last bit may be exchanged.

    Example:
        >>> import torch
        >>> from regjax import torch_random
        >>> g, weights = torch_random.generator(0), [1.0, 2.0, 3.0]
        >>> torch_random.weighted_random_sampler(g, weights, 5)[0].tolist()
        [2, 2, 1, 2, 2]
        >>> _ = torch.manual_seed(0)
        >>> list(torch.utils.data.WeightedRandomSampler(weights, 5))
        [2, 2, 1, 2, 2]
    """
    g, replacement = check_generator(g), check_bool("replacement", replacement)
    count = check_integer("num_samples", num_samples, minimum=1)
    numbers = _checked_weights(weights)
    if not replacement and count > np.count_nonzero(numbers):
        raise ValueError(
            "num_samples must be at most the number of positive weights without replacement; got "
            f"{count} and {np.count_nonzero(numbers)}."
        )
    with jax.enable_x64(True):
        if count == 1 or not replacement:
            return _largest_quotients(g, numbers, count)
        cumulative = np.cumsum(numbers)  # one addition after the other, as in PyTorch
        cumulative /= cumulative[-1]
        cumulative[-1] = 1
        return _inverse(g, cumulative, count)


@functools.partial(jax.jit, static_argnums=2)
def _inverse(
    g: TorchGenerator, cumulative: Float[Any, " n"], count: int
) -> tuple[Int32[Array, " count"], TorchGenerator]:
    longs, g = draw_longs(g, count)
    return jnp.searchsorted(cumulative, double_uniforms(longs)).astype(np.int32), g


@functools.partial(jax.jit, static_argnums=2)
def _largest_quotients(
    g: TorchGenerator, weights: Float[Any, " n"], count: int
) -> tuple[Int32[Array, " count"], TorchGenerator]:
    longs, g = draw_longs(g, len(weights))
    exponential = -jnp.log(1 - double_uniforms(longs))
    _, indices = lax.top_k(weights / exponential, count)
    return indices.astype(np.int32), g


def _checked_weights(weights: Any) -> np.ndarray:
    if isinstance(weights, Tracer):
        raise TypeError(f"weights must be known before tracing; got {describe(weights)}.")
    try:
        numbers = np.asarray(weights, np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"weights must be an array of numbers; got {describe(weights)}.") from None
    if numbers.ndim != 1 or not 0 < numbers.size <= _MOST_WEIGHTS:
        raise ValueError(
            f"weights must have one axis of at most 2**24 elements; got shape {numbers.shape}."
        )
    if not (np.isfinite(numbers).all() and (numbers >= 0).all() and numbers.any()):
        raise ValueError(
            "weights must be finite and not negative, with a positive one; got others."
        )
    return numbers


def distributed_sampler(
    size: int,
    num_replicas: int,
    rank: int,
    *,
    shuffle: bool = True,
    seed: int = 0,
    drop_last: bool = False,
    epoch: int = 0,
) -> Int32[Array, " samples"]:
    """Return the order of one process: `torch.utils.data.distributed.DistributedSampler`.

    Args:
        size: The size of the dataset.
        num_replicas: The number of processes.
        rank: The number of this process, from 0.
        shuffle: Whether to shuffle.
        seed: The seed that all processes share. It does not involve the default generator.
        drop_last: Whether to leave out the elements that do not fill all processes, instead of
            repeating the first ones.
        epoch: The number passed to `set_epoch`; it is added to the seed.

    Returns:
        The indices of this process.

    Raises:
        TypeError: An argument has a wrong type.
        ValueError: `size` or `num_replicas` is not positive, or `rank` is out of range.

    Example:
        >>> from regjax import torch_random
        >>> torch_random.distributed_sampler(5, 2, 1, epoch=3).tolist()
        [0, 4, 1]
    """
    size = check_integer("size", size, minimum=1)
    replicas = check_integer("num_replicas", num_replicas, minimum=1)
    rank = check_integer("rank", rank, minimum=0, maximum=replicas - 1)
    seed = check_integer("seed", seed) + check_integer("epoch", epoch)
    drop_last = check_bool("drop_last", drop_last)
    if check_bool("shuffle", shuffle):
        order, _ = permutation(generator(seed), size)
    else:
        order = jnp.arange(size, dtype=np.int32)
    each = size // replicas if drop_last else -(-size // replicas)
    return jnp.resize(order, (each * replicas,))[rank::replicas]


def random_split(
    g: TorchGenerator, size: int, lengths: Sequence[float]
) -> tuple[list[Int32[Array, " length"]], TorchGenerator]:
    """Split a dataset at random: `torch.utils.data.random_split`.

    Args:
        g: The generator: PyTorch's default one, or the one that `random_split` is given.
        size: The size of the dataset.
        lengths: Integers whose sum is `size`, or fractions whose sum is 1; PyTorch rounds these
            down, and adds 1 to the first ones until the sum is `size`.

    Returns:
        The indices of each part, and the next state of the generator.

    Raises:
        TypeError: An argument has a wrong type.
        ValueError: The lengths are negative, or have another sum.

    Example:
        >>> import torch
        >>> from regjax import torch_random
        >>> parts, g = torch_random.random_split(torch_random.generator(0), 5, [0.6, 0.4])
        >>> [part.tolist() for part in parts]
        [[4, 0, 1], [3, 2]]
        >>> g_torch = torch.Generator().manual_seed(0)
        >>> parts = torch.utils.data.random_split(range(5), [0.6, 0.4], g_torch)
        >>> [part.indices for part in parts]
        [[4, 0, 1], [3, 2]]
    """
    size = check_integer("size", size, minimum=0)
    ends = list(itertools.accumulate(_whole_lengths(size, lengths)))
    order, g = permutation(g, size)
    return _parts(order, ends), g


def _whole_lengths(size: int, lengths: Sequence[float]) -> list[int]:
    items = list(check_items("lengths", lengths, Sequence, "a sequence of lengths"))
    if not all(isinstance(item, int | float | np.number) for item in items):
        raise TypeError(f"lengths must be numbers; got {describe(lengths)}.")
    if all(item >= 0 for item in items):
        if sum(items) <= 1 and math.isclose(sum(items), 1):
            whole = [math.floor(size * item) for item in items]
            rest = size - sum(whole)
            return [n + (rest - i + len(whole) - 1) // len(whole) for i, n in enumerate(whole)]
        if sum(items) == size and all(item == int(item) for item in items):
            return [int(item) for item in items]
    raise ValueError(
        f"lengths must be integers with the sum {size}, or fractions with the sum 1; got {items}."
    )


def _parts(order: Int32[Array, " n"], ends: list[int]) -> list[Int32[Array, " part"]]:
    # Slices of a NumPy array need no compilation.
    array = order if isinstance(order, Tracer) else np.asarray(order)
    return [jnp.asarray(array[start:end]) for start, end in itertools.pairwise([0, *ends])]
