"""Packed keep masks: 32 elements at a time, from a few random words.

They are for accelerators, where drawing random words dominates the cost of dropout. The exact
sampler is `bernoulli`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from regjax._checks import check_layout, check_shape
from regjax._random.bernoulli import EXACT, MaskSampler, Sampler, bernoulli, check_probability
from regjax._random.keys import check_key, consume, key_words
from regjax._random.threefry import (
    Places,
    Span,
    check_size,
    is_number,
    part_bits,
    part_index,
    part_shape,
    product_words,
    spec_of,
    threefry2x32,
)
from regjax._random.xla import materialize, read_bytes_on_gpus
from regshared.checks import check_callable, check_integer

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Array, Bool, Float, UInt, UInt32

    from regjax._random.keys import KeyLike
    from regjax._random.threefry import Layout, Part, Words

LANES = 32
# Smaller masks cost almost nothing, and grouping only adds operations.
_SMALLEST_PACKED = 2**12


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class PackedSampler(MaskSampler):
    """The sampler behind `packed_bernoulli`, with `bits` bits of the keep probability."""

    bits: int = 16

    draws_parts = True

    def threshold(self, keep_prob: float | Float[Array, ""]) -> int | Float[Array, ""]:
        """Return how many of the `2**bits` integers are kept; float32, if traced."""
        return _threshold(keep_prob, self.bits)

    def draw(
        self,
        key: KeyLike,
        keep_prob: float | Float[Array, ""],
        shape: tuple[int, ...],
        out_sharding: Layout,
    ) -> Bool[Array, "*shape"]:
        threshold = _threshold(keep_prob, self.bits)
        jitted = _mask_at_tracer if isinstance(threshold, jax.Array) else _mask_at_number
        return jitted(key, threshold, shape, self.bits, out_sharding)

    def draw_part(
        self,
        key: KeyLike,
        keep_prob: float | Float[Array, ""],
        whole: tuple[Any, ...],
        part: Part,
        out_sharding: Layout,
    ) -> Bool[Array, "*_part"]:
        """Draw part of a mask. Examples whose number is unknown share no words."""
        return _mask(key, _threshold(keep_prob, self.bits), whole, self.bits, out_sharding, part)

    def realized_keep_prob(self, keep_prob: float | Float[Array, ""]) -> float | Float[Array, ""]:
        return _threshold(keep_prob, self.bits) / 2**self.bits


def mask_sampler(sampler: Sampler) -> MaskSampler:
    """Return the `MaskSampler` of a `sampler`, with the options of a `functools.partial`."""
    if isinstance(sampler, MaskSampler):
        return sampler
    function, options = sampler, {}
    if isinstance(sampler, functools.partial) and not sampler.args:
        function, options = sampler.func, sampler.keywords
    if function is bernoulli and not options:
        return EXACT
    if function is packed_bernoulli and options.keys() <= {"bits"}:
        return PackedSampler(packed_bernoulli, **{k: _check_bits(v) for k, v in options.items()})
    return MaskSampler(check_callable("sampler", sampler, "(key, keep_prob, shape)"))


def packed_bernoulli(
    key: KeyLike,
    keep_prob: ArrayLike,
    shape: Sequence[int],
    *,
    bits: int = 16,
    out_sharding: Layout = None,
) -> Bool[Array, "*shape"]:
    """Draw a keep mask, 32 elements at a time, with `keep_prob` rounded to a few bits.

    An element is kept with probability `T / 2**bits`, where `T = round(keep_prob * 2**bits)`: a
    uniform integer of `bits` bits is compared with T. The comparison is bit-sliced: one random word
    holds one bit of 32 integers, and `and`/`or` of such words compare 32 elements at once. An
    element costs `bits / 64` blocks of threefry instead of a whole one, and less where T ends in
    zeros: keep probability 1/2 takes one block for 32 elements.

    The 32 elements that share words are consecutive along the longest axis, other than the last,
    whose length is a multiple of 32 (the later of two equal ones). Without such an axis, or with
    fewer than 4,096 elements, each element compares the first `bits` bits of its own word.

    Args:
        key: See `bernoulli`.
        keep_prob: The probability of True, in [0, 1]; it may be traced. Rounded to float32 first.
        shape: The shape of the mask.
        bits: The number of bits of `keep_prob` that count, from 1 to 32.
        out_sharding: The layout of the mask over devices: a `NamedSharding` or a `PartitionSpec`.

    Returns:
        A boolean array. Its mean is `T / 2**bits`, which `regjax.dropout` divides by: with 16 bits
        within 7.7e-6 of `keep_prob`.

    Raises:
        TypeError: `key` is not a key, `keep_prob` is not a number, or `bits` is not an integer.
        ValueError: A concrete `keep_prob` is not in [0, 1], or lies strictly inside but would round
            to an end; `bits` is not in 1..32; or `key` is a batch of keys. A traced `keep_prob` is
            not checked: strictly inside it stays inside, below 0 or NaN it keeps nothing, above 1
            it keeps everything.

    Note (PyTorch):
        `regtorch.packed_bernoulli` returns the same mask. `torch.bernoulli` draws another stream.

    Example:
        >>> import jax, regjax
        >>> x = jax.numpy.ones((1024, 64))
        >>> y = regjax.dropout(x, 0.75, key=jax.random.key(0), sampler=regjax.packed_bernoulli)
        >>> sorted(set(y.ravel().tolist())), round(float(y.mean()), 2)
        ([0.0, 4.0], 1.0)
    """
    sampler = PackedSampler(packed_bernoulli, _check_bits(bits))
    probability = check_probability("keep_prob", keep_prob)
    shape, layout = check_shape("shape", shape), check_layout("out_sharding", out_sharding)
    return sampler.draw(check_key(key), probability, shape, layout)


def packed_axis(shape: Sequence[int]) -> int | None:
    """Return the axis along which 32 elements share words; None if each element has its own.

    It is never the last axis, which accelerators lay out across lanes: spreading a word over lanes
    costs more than drawing it again. It does not depend on the layout, and neither does the mask.
    """
    if math.prod(shape) < _SMALLEST_PACKED:
        return None
    axes = [axis for axis, size in enumerate(shape[:-1]) if size % LANES == 0]
    return max(axes, key=lambda axis: (shape[axis], axis), default=None)


def _mask(
    key: KeyLike,
    threshold: int | Float[Array, ""],
    whole: tuple[Any, ...],
    bits: int,
    out_sharding: Layout,
    part: Part = (),
) -> Bool[Array, "*_part"]:
    check_size(part_shape(whole, part))
    consume(key)
    words = key_words(key)
    is_by_example = bool(whole) and whole[0] is None

    def draw(axis: int | None) -> Bool[Array, "*_part"]:
        if axis is None:
            drawn = part_bits(words, whole, part, out_sharding=out_sharding)
            return _below(drawn >> np.uint32(32 - bits), threshold, bits)
        group = Group(whole, axis + is_by_example, out_sharding, part)
        return group.spread(materialize(_compared(words, threshold, bits, group)))

    return _at_packed_axis(draw, whole[1:] if is_by_example else whole)


def _at_packed_axis(draw: Callable[[int | None], Any], shape: tuple[int, ...]) -> Any:
    """Return `draw(packed_axis(shape))`.

    The axis, and with it the mask, depends on the sizes. If one of them is a symbol of
    `jax.export`, the program contains a branch for every axis that may be packed.
    """
    if all(is_number(size) for size in shape):
        return draw(packed_axis(shape))
    axes = [
        axis for axis, size in enumerate(shape[:-1]) if not is_number(size) or size % LANES == 0
    ]
    branch = longest = jnp.uint32(0)
    for number, axis in enumerate(axes, 1):
        size = product_words(shape[axis : axis + 1])[1]
        is_longer = (size % LANES == 0) & (size >= longest)
        branch = jnp.where(is_longer, np.uint32(number), branch)
        longest = jnp.where(is_longer, size, longest)
    high, low = product_words(shape)
    branch = jnp.where((high == 0) & (low < _SMALLEST_PACKED), 0, branch)
    return lax.switch(branch, [functools.partial(draw, axis) for axis in (None, *axes)])


# A concrete threshold is static, so that only the required words are drawn.
_mask_at_number = jax.jit(_mask, static_argnums=(1, 2, 3, 4))
_mask_at_tracer = jax.jit(_mask, static_argnums=(2, 3, 4))


def _threshold(keep_prob: float | Float[Array, ""], bits: int) -> int | Float[Array, ""]:
    """Return how many of the 2**bits integers are kept; float32, if traced, holds it exactly."""
    levels = 2**bits
    if isinstance(keep_prob, jax.Array):
        probability = keep_prob.astype(jnp.float32)
        # From 25 bits on, the bound rounds to `levels`, but no probability below 1 does.
        inside = jnp.clip(jnp.round(probability * 2.0**bits), 1, float(levels - 1))
        ends = jnp.where(probability >= 1, float(levels), 0.0)
        return jnp.where((probability > 0) & (probability < 1), inside, ends)
    threshold = round(float(np.float32(keep_prob)) * levels)
    if 0 < keep_prob < 1 and threshold in (0, levels):
        raise ValueError(
            f"keep_prob must not round to {threshold // levels} in {bits} bits; got {keep_prob}. "
            "Use more bits, as in functools.partial(regjax.packed_bernoulli, bits=32), or "
            "regjax.bernoulli."
        )
    return threshold


def _check_bits(bits: int) -> int:
    return check_integer("bits", bits, minimum=1, maximum=32)


def _below(
    drawn: UInt32[Array, "*shape"], threshold: int | Float[Array, ""], bits: int
) -> Bool[Array, "*shape"]:
    """Compare each element's integer with the threshold, which may be too large for a word."""
    if isinstance(threshold, jax.Array):
        return (drawn < threshold.astype(jnp.uint32)) | (threshold >= 2.0**bits)
    return drawn <= np.uint32(threshold - 1) if threshold else jnp.zeros_like(drawn, bool)


def _compared(
    key: Words, threshold: int | Float[Array, ""], bits: int, group: Group
) -> UInt32[Array, "*words"]:
    """Draw words that each hold 32 comparisons `U >= 2**bits - T` of uniform integers U.

    Bit i of 32 integers is one word, the most significant first. From the least significant bit up,
    a 1 where T has a 1, or a 0 where T has a 0, decides the comparison; otherwise the lower bits
    do.
    """
    bits_of_t, everything = bits_of(threshold, bits)
    index = part_index(group.whole_words, group.words_part, group.words_sharding, in_place=True)
    return compare_words(key, index, bits_of_t, everything)


def bits_of(
    threshold: int | Float[Array, ""], bits: int
) -> tuple[list[Any], bool | Bool[Array, ""]]:
    """Return the bits of T, the most significant first, and whether T keeps everything."""
    if isinstance(threshold, jax.Array):
        whole = threshold.astype(jnp.uint32)
        return word_bits(whole, bits), threshold >= 2.0**bits
    bits_of_t = [bool(threshold >> (bits - 1 - i) & 1) for i in range(bits)]
    # Trailing zeros of T decide nothing, and their words are not drawn.
    needed = max((i + 1 for i in range(bits) if bits_of_t[i]), default=0)
    return bits_of_t[:needed], threshold == 2**bits


def word_bits(word: UInt32[Array, ""], bits: int) -> list[Bool[Array, ""]]:
    """Return the lowest bits of a word, the most significant first."""
    return [(word >> np.uint32(bits - 1 - i)) & np.uint32(1) != 0 for i in range(bits)]


def compare_words(
    key: Words, index: Words, bits_of_t: Sequence[Any], everything: bool | Bool[Array, ""]
) -> UInt32[Array, "*words"]:
    """Return words of 32 comparisons each, at the indices of the words; see `_compared`."""
    (high, low), needed = index, len(bits_of_t)
    kept = jnp.zeros_like(low)
    for pair in reversed(range((needed + 1) // 2)):
        # The upper four bits of the counter number the blocks: no array has 2**60 words.
        block = threefry2x32(key, (high + np.uint32(pair << 28), low))
        for i in range(min(2 * pair + 1, needed - 1), 2 * pair - 1, -1):
            either, both = block[i % 2] | kept, block[i % 2] & kept
            kept = _select(bits_of_t[i], either, both)
    return _select(everything, jnp.full_like(low, 0xFFFFFFFF), kept)


def _select(
    condition: bool | Bool[Array, ""], x: UInt32[Array, "*words"], y: UInt32[Array, "*words"]
) -> UInt32[Array, "*words"]:
    """Return `jnp.where(condition, x, y)`, without an operation if the condition is a bool."""
    if isinstance(condition, bool):
        return x if condition else y
    return jnp.where(condition, x, y)


@dataclasses.dataclass(frozen=True)
class Group:
    """The elements that share a word, and the layout of words and elements over devices.

    In an array of shape `whole`, 32 elements along `axis` share a word. The mask is that of a part
    of the array, with the layout `out_sharding`.
    """

    whole: tuple[Any, ...]
    axis: int
    out_sharding: Layout
    part: Part = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the mask."""
        return part_shape(self.whole, self.part)

    @property
    def whole_words(self) -> tuple[Any, ...]:
        """The shape of the words of the whole array: one 32nd along the axis."""
        # A symbolic size may not be a multiple of 32; rounded up, there is at least one word.
        return self._replace_axis(self.whole, -(-self.whole[self.axis] // LANES))

    @property
    def words_part(self) -> Part:
        """The words that the mask reads, as a part of the words of the whole array."""
        entry = self._entry
        if entry is None:
            return self.part
        if isinstance(entry, Places):
            words = Places(None, entry.low // np.uint32(LANES))
        else:
            # Without a known start, the range may begin and end inside a word.
            size = entry.size if self._has_whole_words else entry.size + 2 * (LANES - 1)
            words = Span(entry.start // LANES, size // LANES)
        return self._replace_axis(tuple(self.part), words)

    @property
    def words_shape(self) -> tuple[int, ...]:
        """The shape of these words."""
        return part_shape(self.whole_words, self.words_part)

    @property
    def _entry(self) -> Span | Places | None:
        return self.part[self.axis] if self.part else None

    @property
    def _has_whole_words(self) -> bool:
        """Whether the mask is known to hold all 32 elements of each word, in order."""
        entry = self._entry
        if isinstance(entry, Span) and is_number(entry.start) and is_number(entry.size):
            return entry.start % LANES == 0 and entry.size % LANES == 0
        return entry is None and is_number(self.shape[self.axis])

    @property
    def words_sharding(self) -> Layout:
        """The layout of the words: the mask's, but whole along the axis if devices split a word."""
        sharding = self.out_sharding
        if isinstance(sharding, PartitionSpec):
            sharding = NamedSharding(jax.sharding.get_abstract_mesh(), sharding)
        if sharding is None:
            return None
        spec = list(spec_of(sharding, len(self.shape)))
        names = spec[self.axis]
        names = names if isinstance(names, tuple) else () if names is None else (names,)
        devices = math.prod(sharding.mesh.shape[name] for name in names)
        if not self._has_whole_words or self.shape[self.axis] // LANES % devices:
            spec[self.axis] = None
        return sharding.update(spec=PartitionSpec(*spec))

    def spread(self, words: UInt32[Array, "*words"]) -> Bool[Array, "*shape"]:
        """Return a mask in which each element has its bit of its word."""
        if not self._has_whole_words:
            return self._resharded(self._gathered(words))
        sharding = lanes_sharding = self.words_sharding
        if isinstance(sharding, NamedSharding):
            spec = self._replace_axis(tuple(sharding.spec), sharding.spec[self.axis], None)
            lanes_sharding = sharding.update(spec=PartitionSpec(*spec))
        bits = read_bytes_on_gpus(words, lambda parts: self._bits(parts, lanes_sharding))
        return self._resharded(jnp.reshape(bits, self.shape, out_sharding=sharding))

    def _resharded(self, mask: Bool[Array, "*shape"]) -> Bool[Array, "*shape"]:
        is_whole = self.out_sharding is None or jax.typeof(mask).sharding == self.out_sharding
        return mask if is_whole else jax.sharding.reshard(mask, self.out_sharding)

    def _gathered(self, words: UInt32[Array, "*words"]) -> Bool[Array, "*shape"]:
        """Read words one element at a time, along an axis that cannot be split into words."""
        entry, lanes = self._entry, np.uint32(LANES)
        sizes = [size if axis == self.axis else 1 for axis, size in enumerate(self.shape)]
        if isinstance(entry, Places):  # each element has a copy of its word
            return (words >> jnp.reshape(entry.low % lanes, sizes)) & np.uint32(1) != 0
        along = lax.broadcasted_iota(np.uint32, sizes, self.axis)
        if entry is not None:
            along = along + jnp.asarray(entry.start).astype(jnp.uint32) % lanes
        at = jnp.reshape(along // lanes, (sizes[self.axis],))
        own = jnp.take(words, at, axis=self.axis, mode="clip")
        return (own >> along % lanes) & np.uint32(1) != 0

    def _bits(
        self, parts: tuple[UInt[Array, "*words"], ...], sharding: Layout
    ) -> Bool[Array, "*lanes"]:
        """Return each lane's bit, from words given as equal pieces, least significant first."""
        after = self.axis + 1
        lanes = LANES // len(parts)
        shape = self._replace_axis(self.words_shape, self.words_shape[self.axis], lanes)
        own = []
        for part in parts:
            lane = lax.broadcasted_iota(part.dtype, shape, after, out_sharding=sharding)
            own.append((jnp.expand_dims(part, after) >> lane) & part.dtype.type(1) != 0)
        if len(own) == 1:
            return own[0]
        # Unlike in a fused concatenation, an element reads only its own piece.
        shape = self._replace_axis(self.words_shape, self.words_shape[self.axis], LANES)
        # Use the slabs' layout: JAX 0.8 distinguishes no layout from a mesh that shards no axis.
        bits = jnp.zeros(shape, bool, out_sharding=jax.typeof(own[0]).sharding)
        for i, slab in enumerate(own):
            bits = lax.dynamic_update_slice_in_dim(bits, slab, i * lanes, after)
        return bits

    def _replace_axis(self, values: tuple[Any, ...], *replacement: Any) -> tuple[Any, ...]:
        return (*values[: self.axis], *replacement, *values[self.axis + 1 :])
