"""Top-k of a row of keys or of its segments, ties to the lowest index: hard, and with the derivatives of a soft threshold.

A segment is a run of `2^tile_bits` neighbouring keys. A k-th largest score is found by bisection, never by sorting: on a
processor a sort takes seven times as long. Scores are whole numbers; every score gets its place as low bits, so that no two
of a segment are equal.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from codesign import gates
from codesign.backward import kept, row_products
from codesign.gates import Relaxation
from codesign.policy import bits_range
from codesign.quantize import power_of_two

SHARE_ONE = 1024
"""A kept share is stored in 1/1024 (10 bits, 0 standing for 1024)."""
SCORE_LIMIT = 32767
"""Largest magnitude of a score that enters the sorter, 16 bits."""
RADIUS_OFF = 2 * SCORE_LIMIT + 1
"""Radius that clips nothing: no two scores are as far apart."""
SORTER_INPUTS, SORTER_OUTPUTS = 12, 4
"""New scores and winners of a cycle of a 16-to-4 sorting network (arXiv 2407.10416: the other 4 inputs are its winners)."""
_PLACED_BITS = 30
"""Bits of a score together with its place, in 32 bits with room for what lies below all."""
SEGMENT_SCORE_BITS = 16
"""Bits of a score that enters the sorter of segments, sign included."""


@struct.dataclass
class Chosen:
    """What is left of each row's keys.

    Attributes:
      largest: 1 for the largest of each segment, `[B, H, T, S]`.
      weights: 1 for those of them that also lie within the radius of their segment's maximum, `[B, H, T, S]`.
      cycles: Cycles of the sorting network, `[B, H, T]`.
      segments: Segments that hold an existing key, `[B, 1, T]`.
    """

    largest: jax.Array
    weights: jax.Array
    cycles: jax.Array
    segments: jax.Array


@struct.dataclass
class _Cut:
    """One segmentation of a row: `[B, H, T, G, b]` where by key, `[B, H or 1, T, G, 1]` where by segment.

    `ranked` are the scores with their place behind them, below all others where no key exists; `sizes` the keys that
    exist; `number` those that are kept; `kth` the least kept.
    """

    scores: jax.Array
    exists: jax.Array
    ranked: jax.Array
    sizes: jax.Array
    number: jax.Array
    kth: jax.Array


def _split(x: jax.Array, length: int) -> jax.Array:
    """Returns `[..., S]` as segments `[..., G, length]`, padded with zeros."""
    missing = -x.shape[-1] % length
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])
    return jnp.reshape(padded, (*x.shape[:-1], -1, length))


def _joined(x: jax.Array, num_keys: int) -> jax.Array:
    """Returns segments `[..., G, b]` as `[..., S]` without what pads the last one."""
    return jnp.reshape(x, (*x.shape[:-2], -1))[..., :num_keys]


def _cut(
    scores: jax.Array, pairs: jax.Array, share: jax.Array, length: int, score_bits: int
) -> _Cut:
    """Returns the segments of scores `[B, H, T, S]`; `share` are the kept shares in 1/1024, int32 `[H]`."""
    apart = _split(scores.astype(jnp.int32), length)
    exists = _split(pairs > 0.5, length)
    place = length - 1 - jnp.arange(length, dtype=jnp.int32)
    bound = 2 ** (score_bits - 1) * length
    assert bound < 2**31, "scores with their places do not fit 32 bits"
    lowest = -bound
    ranked = jnp.where(exists, apart * length + place[None, None, None, None, :], lowest - 1)
    sizes = jnp.sum(exists, axis=-1, keepdims=True, dtype=jnp.int32)
    wanted = share.astype(jnp.int32)[None, :, None, None, None] * sizes
    number = (wanted + (SHARE_ONE - 1)) // SHARE_ONE
    return _Cut(apart, exists, ranked, sizes, number, kept(_kth(ranked, number, bound)))


def _kth(ranked: jax.Array, number: jax.Array, bound: int) -> jax.Array:
    """Returns the `number`-th largest of each segment, `[..., G, 1]`; below all keys where `number` is 0."""
    low = jnp.full(number.shape, -bound, jnp.int32)

    def halve(_: int, limits: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = limits
        # The floor of their mean, without leaving 32 bits.
        middle = jnp.bitwise_and(low, high) + jnp.right_shift(jnp.bitwise_xor(low, high), 1)
        above = jnp.sum(ranked >= middle, axis=-1, keepdims=True, dtype=jnp.int32)
        has_enough = above >= number
        return jnp.where(has_enough, middle, low), jnp.where(has_enough, high, middle)

    least: jax.Array = jax.lax.fori_loop(0, (2 * bound - 1).bit_length(), halve, (low, -low))[0]
    return least


def _hard(cut: _Cut, radius: jax.Array, num_keys: int) -> Chosen:
    """Returns the decisions of one segmentation; `radius` is int32 `[H]`."""
    largest = _largest(cut)
    top = jnp.max(jnp.where(cut.exists, cut.scores, -SCORE_LIMIT), axis=-1, keepdims=True)
    near = cut.scores >= top - radius.astype(jnp.int32)[None, :, None, None, None]
    inputs = -(-cut.sizes // SORTER_INPUTS)
    passes = -(-cut.number // SORTER_OUTPUTS)
    return Chosen(
        largest=_joined(largest, num_keys),
        weights=_joined(largest & near, num_keys),
        cycles=jnp.sum(inputs * passes, axis=(-2, -1)),
        segments=jnp.sum(cut.sizes > 0, axis=(-2, -1)),
    )


def _by_tile(function: Callable[[int], Any], tile_bits: jax.Array, num_keys: int) -> Any:
    """Returns what `function` returns for a traced width of the place, within its legal range.

    All segments that hold every key are alike: of these widths only the first is compiled.
    """
    low, high = (int(limit) for limit in bits_range("tile_bits"))
    high = min(high, max(low, (num_keys - 1).bit_length()))
    branches = [
        functools.partial(lambda bits, _: function(bits), bits) for bits in range(low, high + 1)
    ]
    # An index beyond the last branch takes the last.
    return jax.lax.switch(tile_bits.astype(jnp.int32) - low, branches, ())


def hard_segments(
    scores: jax.Array, pairs: jax.Array, share: jax.Array, radius: jax.Array, tile_bits: jax.Array
) -> Chosen:
    """Returns which keys are kept, as the chip does: booleans, and whole numbers of cycles.

    Of the n keys of a segment that exist, the `ceil(share n / 1024)` largest stay, equal ones in order of their index, and
    of these the ones whose score is at least the segment's maximum minus the radius.

    Args:
      scores: Whole numbers in [-32767, 32767], `[B, H, T, S]`.
      pairs: 1 for pairs that exist, `[B, 1, T, S]`.
      share: Kept share in 1/1024, 1 to 1024, integers `[H]`.
      radius: In units of the scores, 0 to 65535 (off), integers `[H]`.
      tile_bits: Bits of a key's place in its segment, integer scalar in [2, 8].

    References:
      SADS of SOFA (arXiv 2407.10416). Clipping after the last pass instead of against a running maximum is a
      reconstruction: it does not depend on the order of arrival.
    """

    def at(bits: int) -> Chosen:
        return _hard(
            _cut(scores, pairs, share, 2**bits, SEGMENT_SCORE_BITS), radius, scores.shape[-1]
        )

    chosen: Chosen = _by_tile(at, tile_bits, scores.shape[-1])
    return chosen


def soft_segments(
    scores: jax.Array,
    pairs: jax.Array,
    share: jax.Array,
    radius: jax.Array,
    tile_bits: jax.Array,
    relaxation: Relaxation,
) -> Chosen:
    """Returns which keys are kept as weights, differentiable in everything but `pairs`.

    A key passes two sigmoid gates of width `temperature` times the standard deviation of its row's scores: round the
    quantile `share` of its segment, at place `(share - 1/2048) n` between neighbouring scores, and round the segment's
    maximum minus the radius. Half a step of the stored share puts the threshold between the last key kept and the first
    one dropped, whatever n; at n = 1024 it is the specification's `share n - 1/2`. Between two whole widths of the place
    both segmentations are mixed. Straight-through, the forward values are those of `hard_segments` at `share` in 1/1024,
    a whole radius and the nearest width.

    Args:
      scores: Whole numbers in [-32767, 32767] in floating point, `[B, H, T, S]`.
      pairs: 1 for pairs that exist, `[B, 1, T, S]`.
      share: Kept share in (0, 1], `[H]`.
      radius: In units of the scores, `[H]`.
      tile_bits: Bits of a key's place in its segment, scalar in [2, 8].
      relaxation: Temperature, and which forward value.
    """
    num_keys, dtype = scores.shape[-1], scores.dtype
    low_limit, high_limit = bits_range("tile_bits")
    low = jnp.clip(jnp.floor(gates.detach(tile_bits)), low_limit, high_limit - 1.0)
    stored = _stored(share)
    whole_radius = jnp.round(gates.detach(radius)).astype(jnp.int32)
    whole = gates.detach(scores)
    spread = _spread(whole, pairs)

    def relaxed(bits: int) -> Chosen:
        cut = _cut(whole, pairs, stored, 2**bits, SEGMENT_SCORE_BITS)
        soft = _soft(
            cut, _split(scores, 2**bits), share, radius, relaxation.temperature, spread, num_keys
        )
        if not relaxation.straight_through:
            return soft
        hard = _hard(cut, whole_radius, num_keys)
        both: Chosen = jax.tree.map(gates.straight_through, hard, soft)
        return both

    def decided(bits: int) -> Chosen:
        cut = _cut(whole, pairs, stored, 2**bits, SEGMENT_SCORE_BITS)
        chosen = _hard(cut, whole_radius, num_keys)
        typed: Chosen = jax.tree.map(lambda leaf: leaf.astype(dtype), chosen)
        return typed

    if relaxation.straight_through:
        is_high = gates.detach(tile_bits) >= low + 0.5
        own = _by_tile(relaxed, jnp.where(is_high, low + 1.0, low), num_keys)
        other = _by_tile(decided, jnp.where(is_high, low, low + 1.0), num_keys)
        # Derivative to the width: the difference of both decisions.
        sign = jnp.where(is_high, 1.0, -1.0).astype(dtype)
        step = sign * (tile_bits - gates.detach(tile_bits))
        deployed: Chosen = jax.tree.map(
            lambda mine, others: mine + step * (gates.detach(mine) - gates.detach(others)),
            own,
            other,
        )
        return deployed
    fraction = tile_bits - low
    coarse, fine = (_by_tile(relaxed, bits, num_keys) for bits in (low, low + 1.0))
    mixed: Chosen = jax.tree.map(lambda a, b: (1.0 - fraction) * a + fraction * b, coarse, fine)
    return mixed


def hard_top(scores: jax.Array, pairs: jax.Array, share: jax.Array, score_bits: int) -> jax.Array:
    """Returns which keys of a row are kept, booleans: of its n keys the `ceil(share n / 1024)` largest, first ones first.

    Args:
      scores: Whole numbers of `score_bits` bits, sign included; with their places they must fit 32 bits, `[B, H, T, S]`.
      pairs: 1 for pairs that exist, `[B, 1, T, S]`.
      share: Kept share in 1/1024, 1 to 1024, integers `[H]`.
      score_bits: See `scores`.
    """
    num_keys = scores.shape[-1]
    cut = _cut(scores, pairs, share, num_keys, score_bits)
    return _joined(_largest(cut), num_keys)


def soft_top(
    scores: jax.Array,
    pairs: jax.Array,
    share: jax.Array,
    score_bits: int,
    relaxation: Relaxation,
) -> jax.Array:
    """Returns which keys of a row are kept as weights: the first gate of `soft_segments` over whole rows, `[B, H, T, S]`.

    Args:
      scores: As for `hard_top`, in floating point.
      pairs: 1 for pairs that exist, `[B, 1, T, S]`.
      share: Kept share in (0, 1], `[H]`.
      score_bits: As for `hard_top`.
      relaxation: Temperature, and which forward value.
    """
    spread = _spread(gates.detach(scores), pairs)
    return _soft_top(scores, pairs, share, score_bits, spread, relaxation)


def _soft_top(
    scores: jax.Array,
    pairs: jax.Array,
    share: jax.Array,
    score_bits: int,
    spread: jax.Array,
    relaxation: Relaxation,
) -> jax.Array:
    """Returns the weights of `soft_top`, its temperature in units of `spread`, `[B, H, T, 1]`."""
    num_keys, apart = scores.shape[-1], spread[..., None]
    cut = _cut(gates.detach(scores), pairs, _stored(share), num_keys, score_bits)
    soft = _gate(cut, _split(scores, num_keys), share, relaxation.temperature * apart, apart)
    if relaxation.straight_through:
        soft = gates.straight_through(_largest(cut), soft)
    return _joined(soft, num_keys)


def exact_top(scores: jax.Array, pairs: jax.Array, share: jax.Array, score_bits: int) -> jax.Array:
    """Returns which keys of a row are kept, as `hard_top` does, of scores too wide to carry their places, booleans.

    The k-th largest is found bit by bit from the top, the first of equal ones by their place: passes that count, no sort.

    Args:
      scores: Whole numbers of `score_bits` bits, sign included, in floating point, `[B, H, T, S]`; compared as they are.
      pairs: 1 for pairs that exist, `[B, 1, T, S]`.
      share: Kept share in 1/1024, 1 to 1024, whole numbers `[H]`.
      score_bits: See `scores`.
    """
    exists = pairs > 0.5
    sizes = jnp.sum(exists, axis=-1, keepdims=True, dtype=jnp.int32)
    wanted = share.astype(jnp.int32)[None, :, None, None] * sizes
    number = (wanted + (SHARE_ONE - 1)) // SHARE_ONE
    there = jnp.where(exists, scores, -jnp.inf)
    bits = jnp.asarray(2.0 ** np.arange(score_bits - 1, -1, -1), scores.dtype)

    def next_bit(index: int, theta: jax.Array) -> jax.Array:
        higher = theta + bits[index]
        count = jnp.sum(there >= higher, axis=-1, keepdims=True, dtype=jnp.int32)
        return jnp.where(count >= number, higher, theta)

    lowest = jnp.full(number.shape, -(2.0 ** (score_bits - 1)), scores.dtype)
    theta = jax.lax.fori_loop(0, score_bits, next_bit, lowest)
    is_equal = there == theta
    missing = number - jnp.sum(there > theta, axis=-1, keepdims=True, dtype=jnp.int32)
    place = jnp.arange(scores.shape[-1], dtype=jnp.int32)[None, None, None, :]
    num_bits = int(scores.shape[-1]).bit_length()

    def next_place(index: int, end: jax.Array) -> jax.Array:
        further = end + jnp.left_shift(1, num_bits - 1 - index)
        count = jnp.sum(is_equal & (place < further), axis=-1, keepdims=True, dtype=jnp.int32)
        return jnp.where(count <= missing, further, end)

    end = jax.lax.fori_loop(0, num_bits, next_place, jnp.zeros_like(number))
    kept_keys: jax.Array = exists & ((there > theta) | (is_equal & (place < end)))
    return kept_keys


def soft_exact_top(
    scores: jax.Array,
    pairs: jax.Array,
    share: jax.Array,
    score_bits: int,
    relaxation: Relaxation,
) -> jax.Array:
    """Returns which keys of a row are kept as weights, of scores of any width, `[B, H, T, S]`.

    The gate is that of `soft_top`, on scores in units that leave room for their places; straight-through, decisions are
    those of `exact_top` on all that a score holds.

    Args:
      scores: Floating point, of any unit, `[B, H, T, S]`.
      pairs: 1 for pairs that exist, `[B, 1, T, S]`.
      share: Kept share in (0, 1], `[H]`.
      score_bits: As for `exact_top`.
      relaxation: Temperature, and which forward value.
    """
    bits = _PLACED_BITS - (scores.shape[-1] - 1).bit_length()
    whole = gates.detach(scores)
    exponent = jnp.frexp(jnp.max(jnp.abs(whole) * pairs, axis=-1, keepdims=True))[1]
    unit = power_of_two((bits - 1 - exponent).astype(scores.dtype))
    scaled = scores * unit
    limit = 2.0 ** (bits - 1) - 1.0
    placed = gates.straight_through(jnp.clip(jnp.floor(whole * unit), -limit, limit), scaled)
    relaxed = relaxation.replace(straight_through=False)  # type: ignore[attr-defined]
    # Equal scores, which have no spread, lie a unit of their own apart.
    spread = _spread(whole, pairs) * unit
    soft = _soft_top(placed, pairs, share, bits, spread, relaxed)
    if not relaxation.straight_through:
        return soft
    # Importances are sums of real numbers: in the widest unit, what tells them apart lies above 1.
    widest = power_of_two((score_bits - 1 - exponent).astype(scores.dtype))
    hard = exact_top(whole * widest, pairs, _stored(share), score_bits)
    return gates.straight_through(hard, soft)


def _soft(
    cut: _Cut,
    scores: jax.Array,
    share: jax.Array,
    radius: jax.Array,
    temperature: jax.Array,
    spread: jax.Array,
    num_keys: int,
) -> Chosen:
    """Returns the weights of one segmentation; `cut` is constant, `scores` `[B, H, T, G, b]` are what is differentiated."""
    apart = spread[..., None]
    scale = temperature * apart
    largest = _gate(cut, scores, share, scale, apart)
    big = np.iinfo(np.int32).max
    best = jnp.max(jnp.where(cut.exists, cut.ranked, -big), axis=-1, keepdims=True)
    floor = _score_at(cut, scores, best) - radius[_BY_HEAD]
    near = jax.nn.sigmoid((scores - floor) / scale)
    wanted = share[_BY_HEAD] * cut.sizes.astype(scores.dtype)
    inputs = -(-cut.sizes // SORTER_INPUTS)
    passes = gates.straight_through(
        jnp.ceil(jnp.ceil(wanted) / SORTER_OUTPUTS), wanted / SORTER_OUTPUTS
    )
    return Chosen(
        largest=_joined(largest, num_keys),
        weights=_joined(largest * near, num_keys),
        cycles=jnp.sum(inputs.astype(scores.dtype) * passes, axis=(-2, -1)),
        segments=jnp.sum((cut.sizes > 0).astype(scores.dtype), axis=(-2, -1)),
    )


_BY_HEAD = (None, slice(None), None, None, None)
"""Index of `[H]` against segments."""


def _gate(
    cut: _Cut, scores: jax.Array, share: jax.Array, scale: jax.Array, apart: jax.Array
) -> jax.Array:
    """Returns the gate round the quantile `share` of a segment, `[B, H, T, G, b]`, of width `scale`.

    Scores of a row lie `apart`: `[B, H, T, 1, 1]`, as `scale`.
    """
    sizes = cut.sizes.astype(scores.dtype)
    wanted = share[_BY_HEAD] * sizes
    half_step = 0.5 / SHARE_ONE * sizes
    place = jnp.maximum(wanted - half_step, 0.0)
    first = jnp.floor(gates.detach(place))
    # The k-th largest is one of the two neighbours of the quantile; the other lies next to it.
    is_second = first + 1.0 < cut.number
    big = np.iinfo(np.int32).max
    above = jnp.min(
        jnp.where(cut.exists & (cut.ranked > cut.kth), cut.ranked, big), axis=-1, keepdims=True
    )
    below = jnp.max(
        jnp.where(cut.exists & (cut.ranked < cut.kth), cut.ranked, -big), axis=-1, keepdims=True
    )
    upper = _score_at(cut, scores, jnp.where(is_second, above, cut.kth))
    lower = _score_at(cut, scores, jnp.where(is_second, cut.kth, below))
    fraction = place - first
    has_lower = first + 1.0 < sizes
    # Below the last key the threshold goes on falling, by the spread of the row.
    theta = upper + fraction * jnp.where(has_lower, lower - upper, -apart)
    return cut.exists.astype(scores.dtype) * jax.nn.sigmoid((scores - theta) / scale)


def _stored(share: jax.Array) -> jax.Array:
    """Returns the least kept share in 1/1024 that is at least `share`, 1 to 1024, int32."""
    units = jnp.ceil(gates.detach(share) * SHARE_ONE)
    return jnp.clip(units, 1, SHARE_ONE).astype(jnp.int32)


def _spread(scores: jax.Array, pairs: jax.Array) -> jax.Array:
    """Returns the standard deviation of a row's scores, `[B, H, T, 1]`, above 0."""
    total = jnp.maximum(jnp.sum(pairs, axis=-1, keepdims=True), 1.0)
    mean = row_products(pairs, scores) / total
    variance = row_products(pairs, jnp.square(scores - mean)) / total
    return gates.gate_width(jnp.sqrt(variance))


def _largest(cut: _Cut) -> jax.Array:
    """Returns the largest of each segment, booleans `[B, H, T, G, b]`."""
    return cut.exists & (cut.ranked >= cut.kth)


def _score_at(cut: _Cut, scores: jax.Array, ranked: jax.Array) -> jax.Array:
    """Returns the score of the key with a rank, `[..., G, 1]`, 0 if there is none; its derivative goes to that key."""
    is_it = (cut.ranked == ranked) & cut.exists
    return jnp.sum(jnp.where(is_it, scores, 0.0), axis=-1, keepdims=True)
