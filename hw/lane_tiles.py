"""Tiles of products and of elements, and how long lanes take them; equations in docs/cost_model.md, section 5.

Arrays are `[B, L, H]`, 1 where all agree. A batch of examples like the one that is priced runs together.
"""

import jax
import jax.numpy as jnp
from flax import struct

from codesign import gates
from codesign.hw.gemm.counting import ceil
from codesign.tile_statistics import TileStatistics

_ROUNDING = 1e-5
"""Relative error of a count in float32 that does not make a cycle more."""


@struct.dataclass
class Tiles:
    """Tiles of an operation of a batch.

    Attributes:
      number: How many there are.
      mean: Cycles of the mean one.
      largest: Cycles of the longest.
      weighted: Cycles of the one in which the mean cycle lies, over the mean.
      started: Products or elements, zeros included.
    """

    number: jax.Array
    mean: jax.Array
    largest: jax.Array
    weighted: jax.Array
    started: jax.Array


@struct.dataclass
class _Cut:
    """A side cut into stretches of a tile: their number, mean and largest length, mean square over squared mean."""

    number: jax.Array
    mean: jax.Array
    largest: jax.Array
    weighted: jax.Array


def _cut(extent: jax.Array | float, tile: float) -> _Cut:
    length = jnp.maximum(jnp.asarray(extent, float), 1e-9)
    number = jnp.maximum(ceil(length / tile), 1.0)
    mean, last = length / number, length - (number - 1.0) * tile
    square = ((number - 1.0) * tile**2 + last * last) / number
    return _Cut(
        number=number,
        mean=mean,
        largest=jnp.minimum(length, tile),
        weighted=square / (mean * mean),
    )


def product_tiles(
    sides: tuple[jax.Array | float, jax.Array | float, jax.Array | float],
    count: jax.Array,
    effectual: jax.Array,
    statistics: TileStatistics | None,
    *,
    tile: float,
    per_lane: float,
    batch: float,
    existing: jax.Array | float = 1.0,
) -> Tiles:
    """Returns the tiles of a product; the last cycle of one that is not full of products is half empty on average.

    Args:
      sides: Rows, inner size and columns.
      count: Products of one example, zeros included.
      effectual: Fraction without a zero.
      statistics: How those lie in tiles; None: as evenly as the sides allow.
      tile: Side of a tile.
      per_lane: Products of a lane per cycle.
      batch: Examples.
      existing: Fraction of the tiles that have any pair.
    """
    cuts = [_cut(side, tile) for side in sides]
    number = cuts[0].number * cuts[1].number * cuts[2].number * existing
    products = count * effectual / number
    full = cuts[0].largest * cuts[1].largest * cuts[2].largest
    if statistics is None:
        most = full * effectual
        weighted = cuts[0].weighted * cuts[1].weighted * cuts[2].weighted
    else:
        most = full * _fullest(effectual, gates.detach(products / full) * statistics.largest)
        weighted = statistics.weighted
    empty = 0.5 * (1.0 - 1.0 / per_lane) * (1.0 - effectual)
    mean = jnp.maximum(products / per_lane + empty, 1.0)
    longest = ceil(most / per_lane * (1.0 - _ROUNDING))
    return Tiles(
        number=number * batch,
        mean=mean,
        largest=jnp.maximum(longest, mean),
        weighted=weighted,
        started=count * batch,
    )


def _fullest(effectual: jax.Array, fullest: jax.Array) -> jax.Array:
    """Returns the fraction without a zero of the fullest tile, with a slope to that of all.

    True derivative zero (it is a constant); substituted: its zeros fall in proportion to all zeros, and it stays below 1.
    """
    constant, most = gates.detach(effectual), jnp.minimum(fullest, 1.0)
    has_zeros = constant < 1.0 - _ROUNDING
    share = jnp.where(has_zeros, (1.0 - most) / jnp.where(has_zeros, 1.0 - constant, 1.0), 1.0)
    return 1.0 - (1.0 - effectual) * share


def element_tiles(
    sides: tuple[jax.Array | float, jax.Array | float],
    count: jax.Array,
    *,
    tile: float,
    per_lane: float,
    batch: float,
    existing: jax.Array | float = 1.0,
) -> Tiles:
    """Returns the tiles of elements, arguments as of `product_tiles`."""
    rows, columns = (_cut(side, tile) for side in sides)
    number = rows.number * columns.number * existing
    mean = jnp.maximum(count / number / per_lane, 1.0)
    longest = ceil(rows.largest * columns.largest / per_lane * (1.0 - _ROUNDING))
    return Tiles(
        number=number * batch,
        mean=mean,
        largest=jnp.maximum(longest, mean),
        weighted=rows.weighted * columns.weighted,
        started=count * batch,
    )
