"""Rows at any number of lanes and fetches at any query block, interpolated between the powers of two.

Rules: docs/cost_model.md, section 2.
"""

import functools

import jax
import jax.numpy as jnp

from codesign import gates
from codesign.hw.gemm.counting import ceil
from codesign.workload import RowStatistics


def _floor(x: jax.Array) -> jax.Array:
    """Rounds down; true derivative zero almost everywhere, substituted: 1."""
    return gates.straight_through(jnp.floor(x), x)


def _shares(size: jax.Array, levels: int) -> list[jax.Array]:
    """Returns what values given at sizes 1, 2, 4, ... count at `size`, between two linearly; nothing at size 0.

    `size` must not exceed the last size given.
    """
    ratios = [size * 0.5**level for level in range(levels)]
    rising = [ratios[0], *(2.0 * ratio - 1.0 for ratio in ratios[1:])]
    return [
        jnp.maximum(jnp.minimum(2.0 - ratio, rise), 0.0)
        for ratio, rise in zip(ratios, rising, strict=True)
    ]


def _interpolate(values: list[jax.Array], size: jax.Array) -> jax.Array:
    """Interpolates values given at sizes 1, 2, 4, ... at `size`."""
    return functools.reduce(jnp.add, map(jnp.multiply, values, _shares(size, len(values))))


def steps_by_portion(rows: RowStatistics, lanes: jax.Array) -> jax.Array:
    """Returns the steps of equal portions of a head's rows in order, sum of ceil(keys / lanes), `[B, L, H, P]`.

    Steps times lanes are interpolated between powers of two, where the result is exact. Rows nearly
    all as long as the longest share one remainder, which interpolation cannot see: they take the
    steps of the longest row, as far as the mean row stays within half a step of it.
    """
    number, levels = rows.portions.shape[3:]
    lanes = jnp.minimum(lanes, 2.0 ** (levels - 1))
    queries = rows.queries[..., None] / number
    sizes = 2.0 ** jnp.arange(levels, dtype=lanes.dtype)
    # Below one lane a key takes several cycles.
    shares = jnp.stack(_shares(jnp.maximum(lanes, 1.0), levels)) * sizes / lanes
    uneven = jnp.einsum("blhpg,g->blhp", rows.portions, shares)
    longest = jnp.einsum(
        "blhg,g->blh", ceil(rows.maximum[..., None] / sizes[None, None, None]), shares
    )
    more = ceil(rows.maximum / lanes) - longest
    short = rows.maximum[..., None] - rows.portions[..., 0] / jnp.maximum(queries, 1.0 / number)
    alike = jnp.maximum(1.0 - 2.0 * short / lanes, 0.0) * queries
    return uneven + alike * more[..., None]


def shared_fetches(given: jax.Array, queries: jax.Array, block: jax.Array) -> jax.Array:
    """Returns what blocks of `block` queries fetch, `[B, L]`, from what 1, 2, 4, ... do `[B, L, H, G]`.

    Whole blocks fetch the union of `block` queries each, the last one that of the queries left.
    The union of n queries is linear in n between powers of two, where it is chosen such that the
    result is the given one.
    """
    levels = given.shape[-1]
    block = jnp.minimum(block, 2.0 ** (levels - 1))
    queries = jnp.maximum(queries, 1.0)
    unions = [given[..., 0] / queries]
    whole, rest_union = queries, jnp.zeros_like(queries)
    for level in range(1, levels):
        size = 2.0**level
        next_whole = _floor(queries / size)
        # Whether half a block is left over, and how far the rest reaches beyond that half.
        is_odd = whole - 2.0 * next_whole > 0.5
        beyond = (queries - next_whole * size) * (2.0 / size) - 1.0
        share = jnp.where(is_odd, beyond, 0.0)
        below = jnp.where(is_odd, (1.0 - share) * unions[-1], rest_union)
        number = next_whole + share
        has_any = number > 0.0
        union = (given[..., level] - below) / jnp.where(has_any, number, 1.0)
        unions.append(jnp.where(has_any, union, given[..., level]))
        rest_union = below + share * unions[-1]
        whole = next_whole
    blocks = _floor(queries / block)
    rest = jnp.clip(queries - blocks * block, 0.0, 2.0 ** (levels - 1))
    fetched = blocks * _interpolate(unions, block) + _interpolate(unions, rest)
    return jnp.sum(fetched, axis=2)
