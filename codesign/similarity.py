"""Rows that resemble an earlier row of their window, and votes of the heads on whose result a token takes.

A window is a run of neighbouring rows from the first token on; what is decided in one depends on nothing outside it. Whose
result a row takes is given by its weights on the rows of its window, 0 or 1 but on the relaxed path; its weight on itself
says whether it is computed.

References:
  Liu et al., "ESACT", arXiv 2512.02403: comparison inside a local window. Distance, threshold and vote are reconstructions.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from codesign import gates
from codesign.backward import kept

SIMILARITY_BITS = 6
"""Fraction bits of the similarity threshold."""
_FAR = np.iinfo(np.int32).max
_TINY = 1e-6


def windows_of(x: jax.Array, window: int) -> jax.Array:
    """Returns rows `[..., T, S]` by window, `[..., W, w, S]`, the last one filled up with zeros."""
    missing = -x.shape[-2] % window
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, missing), (0, 0)])
    return jnp.reshape(padded, (*x.shape[:-2], -1, window, x.shape[-1]))


def rows_of(x: jax.Array, num_rows: int) -> jax.Array:
    """Returns windows `[..., W, w, n]` as rows `[..., T, n]`, without what fills up the last one."""
    return jnp.reshape(x, (*x.shape[:-3], -1, x.shape[-1]))[..., :num_rows, :]


@struct.dataclass
class Distances:
    """How rows of a window differ, in units of the rows.

    Attributes:
      apart: Sums of absolute differences of row t (second axis from the end) and an earlier row, else 0, `[..., W, w, w]`.
      sizes: Sums of absolute values, `[..., W, w]`.
      whole: Both as whole numbers.
    """

    apart: jax.Array
    sizes: jax.Array
    whole: tuple[jax.Array, jax.Array]


def _sums(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns distances, 0 where c >= t, and sizes of integer rows `[..., W, w, S]`."""
    window = rows.shape[-2]

    # A loop, so that rows are written down first: unrolled, compilers find the scores again for every difference.
    def from_row(other: jax.Array) -> jax.Array:
        row = jax.lax.dynamic_index_in_dim(rows, other, axis=-2)
        return jnp.sum(jnp.abs(rows - row), axis=-1, dtype=rows.dtype)

    apart = jnp.moveaxis(jax.lax.map(from_row, jnp.arange(window)), 0, -1)
    before = jnp.broadcast_to(np.tri(window, k=-1, dtype=bool), apart.shape)
    return jnp.where(before, apart, 0), jnp.sum(jnp.abs(rows), axis=-1, dtype=rows.dtype)


@jax.custom_vjp
def _distances(rows: jax.Array) -> tuple[jax.Array, ...]:
    whole = _sums(jnp.round(rows).astype(jnp.int32))
    return *(x.astype(rows.dtype) for x in whole), *whole


def _distances_forward(rows: jax.Array) -> tuple[tuple[jax.Array, ...], jax.Array]:
    return _distances(rows), rows


# The true derivatives of sums of absolute values, in one pass; whole numbers have none.
def _distances_backward(rows: jax.Array, slopes: tuple[jax.Array, ...]) -> tuple[jax.Array]:
    to_apart, to_sizes = slopes[:2]
    window = rows.shape[-2]
    before = jnp.broadcast_to(np.tri(window, k=-1, dtype=bool), to_apart.shape)
    to_apart = jnp.where(before, to_apart, 0.0)
    both = to_apart + jnp.swapaxes(to_apart, -1, -2)

    # A loop for the reason above.
    def add(other: jax.Array, total: jax.Array) -> jax.Array:
        difference = rows - jax.lax.dynamic_index_in_dim(rows, other, axis=-2)
        slope = jax.lax.dynamic_index_in_dim(both, other, axis=-1)
        added: jax.Array = total + slope * jnp.sign(difference)
        return added

    total = jax.lax.fori_loop(0, window, add, to_sizes[..., None] * jnp.sign(rows))
    return (total,)


_distances.defvjp(_distances_forward, _distances_backward)


def row_distances(rows: jax.Array, window: int) -> Distances:
    """Returns how each row differs from those before it in its window.

    Args:
      rows: Kept scores, others 0, `[B, H, T, S]`: at most 1024 a row, below 2^20 in magnitude. Floating point is rounded
        and differentiable; integers are not.
      window: Rows w of a window.
    """
    split = windows_of(rows, window)
    if jnp.issubdtype(rows.dtype, jnp.integer):
        whole = _sums(split)
        return Distances(*whole, whole)
    apart, sizes, *integers = kept(_distances(split))
    return Distances(apart, sizes, tuple(integers))


def _by_head(value: jax.Array) -> jax.Array:
    """Returns `[H]` against windows `[B, H, W, t]`."""
    return value[None, :, None, None]


def hard_sources(
    distances: Distances, similarity: jax.Array, off_code: int, num_rows: int
) -> jax.Array:
    """Returns whose result a row takes, as the chip decides it.

    In order, a row takes that of the nearest earlier critical row c of its window with `64 D <= s N(c)`, the first of
    equally near ones; without any it is critical itself, as the first row of a window always is.

    Args:
      distances: Of the rows.
      similarity: Thresholds s in 1/64, integers `[H]`, at most 127; `off_code`: no row takes another's result.
      off_code: See `similarity`.
      num_rows: T.

    Returns:
      Booleans `[B, H, T, w]`.
    """
    apart, sizes = distances.whole
    window = sizes.shape[-1]
    s = _by_head(similarity.astype(jnp.int32))
    high, low = jnp.right_shift(sizes, SIMILARITY_BITS), jnp.bitwise_and(sizes, 63)
    # floor(s N / 64) without leaving 32 bits.
    reach = s * high + jnp.right_shift(s * low, SIMILARITY_BITS)
    places = [jnp.zeros(sizes.shape[:-1], jnp.int32)]
    for row in range(1, window):
        is_critical = jnp.stack([places[other] == other for other in range(row)], axis=-1)
        before = apart[..., row, :row]
        is_similar = is_critical & (before <= reach[..., :row]) & (s != off_code)
        nearest = jnp.argmin(jnp.where(is_similar, before, _FAR), axis=-1).astype(jnp.int32)
        places.append(jnp.where(jnp.any(is_similar, axis=-1), nearest, row))
    return rows_of(jax.nn.one_hot(jnp.stack(places, axis=-1), window, dtype=jnp.bool_), num_rows)


def soft_sources(
    distances: Distances,
    similarity: jax.Array,
    is_on: jax.Array,
    width: jax.Array,
    num_rows: int,
) -> jax.Array:
    """Returns whose result a row takes as weights that add up to 1, differentiable in distances and thresholds.

    A row is similar to an earlier one by `a = sigmoid((s - D / N) / width)`, and critical by g, the product of
    `1 - g(c) a(c)` over earlier rows c; what is not its own is shared by `g(c) a(c) exp(-D / (N width))`.

    Args:
      distances: Of the rows.
      similarity: Thresholds s, `[H]`.
      is_on: Whether rows are compared at all, `[H]`.
      width: Width of the gate in units of s, scalar.
      num_rows: T.

    Returns:
      Weights `[B, H, T, w]`.
    """
    apart, sizes = distances.apart, jnp.maximum(distances.sizes, 1.0)
    window = sizes.shape[-1]
    is_on = _by_head(is_on)
    identity = jnp.eye(window, dtype=sizes.dtype)
    first = jnp.broadcast_to(identity[0], (*sizes.shape[:-1], window))
    critical, mixed = [jnp.ones(sizes.shape[:-1], sizes.dtype)], [first]
    for row in range(1, window):
        ratio = apart[..., row, :row] / sizes[..., :row]
        similar = jnp.where(is_on, jax.nn.sigmoid((_by_head(similarity) - ratio) / width), 0.0)
        likely = jnp.stack(critical, axis=-1) * similar
        own = jnp.prod(1.0 - likely, axis=-1)
        # The nearest of those in question, so that its exponential is 1 however narrow the gate.
        is_likely = gates.detach(likely) > _TINY
        nearest = jnp.min(
            jnp.where(is_likely, gates.detach(ratio), jnp.inf), axis=-1, keepdims=True
        )
        behind = jnp.where(is_likely, (nearest - ratio) / width, 0.0)
        share = likely * jnp.exp(behind)
        total = jnp.sum(share, axis=-1, keepdims=True)
        # What next to nothing is shared by has next to no weight.
        share = share / jnp.where(total > _TINY, total, 1.0)
        critical.append(own)
        mixed.append(_mixture(own, share, mixed, identity[row]))
    return rows_of(jnp.stack(mixed, axis=-2), num_rows)


def _mixture(
    own: jax.Array, share: jax.Array, earlier: list[jax.Array], itself: jax.Array
) -> jax.Array:
    """Returns the weights of a row that is itself by `own` `[...]`, else an earlier one by `share` `[..., t]`."""
    others = sum(share[..., place, None] * weights for place, weights in enumerate(earlier))
    own, itself = own[..., None], jnp.reshape(itself, (1,) * own.ndim + (-1,))
    return own * itself + (1.0 - own) * others


def _by_window(decide: Callable[[jax.Array], list[jax.Array]], votes: jax.Array) -> jax.Array:
    """Returns `[B, T, w]` from weights of every row of a window, decided from votes `[B, W, w, w]`."""
    by_row = decide(windows_of(votes, votes.shape[-1]))
    return rows_of(jnp.stack(by_row, axis=-2), votes.shape[-2])


def hard_votes(votes: jax.Array, cut: jax.Array) -> jax.Array:
    """Returns whose result a token takes, as the chip decides it.

    That of the row most heads name, the first of equals, if at least `cut` do and it is not the token itself; what that row
    takes from another, it takes too.

    Args:
      votes: Heads that name a row of the window, whole numbers `[B, T, w]`; none names a later row.
      cut: Votes it takes, scalar.

    Returns:
      Booleans `[B, T, w]`.
    """
    window = votes.shape[-1]

    def decide(votes: jax.Array) -> list[jax.Array]:
        sources: list[jax.Array] = []
        for row in range(window):
            own = jnp.zeros(votes.shape[:-2], jnp.int32) + row
            most = jnp.argmax(votes[..., row, :], axis=-1).astype(jnp.int32)
            is_enough = jnp.max(votes[..., row, :], axis=-1) >= cut
            named = jnp.stack([*sources, own], axis=-1)
            other = jnp.take_along_axis(named, jnp.minimum(most, row)[..., None], axis=-1)[..., 0]
            sources.append(jnp.where(is_enough, other, own))
        return [jax.nn.one_hot(source, window, dtype=jnp.bool_) for source in sources]

    return _by_window(decide, votes)


def soft_votes(votes: jax.Array, cut: jax.Array, is_on: jax.Array, width: jax.Array) -> jax.Array:
    """Returns whose result a token takes as weights that add up to 1, differentiable in votes and cut.

    It takes another's by a sigmoid of the votes of the earlier row that has most, less those it takes and less its own, and
    shares it among earlier rows by a softmax of their votes.

    Args:
      votes: `[B, T, w]`; none for a later row.
      cut: Votes it takes, scalar.
      is_on: Whether any token takes another's result, boolean scalar.
      width: Width of the gate in votes, scalar.

    Returns:
      Weights `[B, T, w]`.
    """
    window = votes.shape[-1]
    identity = jnp.eye(window, dtype=votes.dtype)

    def decide(votes: jax.Array) -> list[jax.Array]:
        mixed = [jnp.broadcast_to(identity[0], (*votes.shape[:-2], window))]
        for row in range(1, window):
            earlier = votes[..., row, :row]
            most = jnp.max(earlier, axis=-1)
            # Half a vote: an earlier row wins a draw against the token itself.
            margin = jnp.minimum(most - cut, most - votes[..., row, row] + 0.5)
            own = jnp.where(is_on, 1.0 - jax.nn.sigmoid(margin / width), 1.0)
            mixed.append(_mixture(own, jax.nn.softmax(earlier / width), mixed, identity[row]))
        return mixed

    return _by_window(decide, votes)
