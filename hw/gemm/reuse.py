"""How often tiles are fetched: what a level holds, and the words that enter it over all loops outside.

At whole factors the counts are exact; between 1 and 2 a factor lets go of what stays, linearly, so that all interpolates.
"""

import functools
import operator
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from codesign.hw.gemm.counting import ceil
from codesign.hw.gemm.layer import Layer
from codesign.hw.gemm.mapping import Mapping
from codesign.hw.gemm.names import INPUTS, addresses, axes

Grid = list[list[jax.Array]]
"""Values `[...]` by level and dimension."""


@dataclass(frozen=True)
class Loop:
    """A loop at a level: its iterations `[...]`, and for each dimension whether it is the loop's, `[...]`."""

    factor: jax.Array
    is_of: list[jax.Array]


@dataclass(frozen=True)
class Nest:
    """The loops of a mapping, taken apart.

    Attributes:
      layer: The layers.
      temporal: Iterations by level and dimension.
      spatial: Iterations side by side.
      inside: Iterations of a dimension within a level, its own included.
      loops: By level, from the innermost loop outwards.
      whole: Whether a partial iteration is one of its own wherever iterations repeat work.
      slides: Whether inputs are kept that a sliding window leaves in place.
    """

    layer: Layer
    temporal: Grid
    spatial: Grid
    inside: Grid
    loops: list[list[Loop]]
    whole: bool
    slides: bool

    def repeats(self, factor: jax.Array) -> jax.Array:
        """Returns how often a loop repeats what does not depend on it."""
        return ceil(factor) if self.whole else factor

    @property
    def dims(self) -> tuple[str, ...]:
        """Names of the dimensions."""
        return self.layer.dims


def nest_of(layer: Layer, mapping: Mapping, *, whole: bool, slides: bool) -> Nest:
    """Returns the loops of a mapping."""
    temporal, spatial = _grid(mapping.temporal), _grid(mapping.spatial)
    inside: Grid = []
    for times, sides in zip(temporal, spatial, strict=True):
        within = [t * s for t, s in zip(times, sides, strict=True)]
        if inside:
            within = [before * own for before, own in zip(inside[-1], within, strict=True)]
        inside.append(within)
    loops = [
        [_loop(dimension, times) for dimension in dimensions]
        for dimensions, times in zip(_grid(mapping.order), temporal, strict=True)
    ]
    return Nest(layer, temporal, spatial, inside, loops, whole, slides)


def _grid(values: jax.Array) -> Grid:
    """Returns `[..., L, D]` taken apart; splitting, unlike indexing, has a derivative of one pass."""
    levels, dims = values.shape[-2:]
    leading = jnp.reshape(
        jnp.moveaxis(values, (-2, -1), (0, 1)), (levels * dims, *values.shape[:-2])
    )
    parts = [part[0] for part in jax.lax.split(leading, [1] * (levels * dims))]
    return [parts[level * dims : (level + 1) * dims] for level in range(levels)]


def _loop(dimension: jax.Array, factors: list[jax.Array]) -> Loop:
    is_of = [dimension == dim for dim in range(len(factors))]
    return Loop(_choose(is_of, factors), is_of)


def _choose(is_of: list[jax.Array], values: list[jax.Array]) -> jax.Array:
    """Returns the value of the dimension that a loop is of."""
    chosen = values[-1]
    for this, value in zip(is_of[:-1], values[:-1], strict=True):
        chosen = jnp.where(this, value, chosen)
    return chosen


def product(factors: Iterator[jax.Array] | list[jax.Array]) -> jax.Array:
    """Returns the product of arrays `[...]`; 1 of none."""
    return functools.reduce(operator.mul, factors, jnp.ones(()))


def axis_extents(nest: Nest, tensor: str, level: int) -> list[jax.Array]:
    """Returns the elements of a tensor along each of its axes that a level holds, `[...]` each."""
    dims, inside = nest.dims, nest.inside[level]
    extents = []
    for axis in axes(tensor, dims):
        moves = [nest.layer.step(tensor, dim) * (inside[dims.index(dim)] - 1.0) for dim in axis]
        extents.append(functools.reduce(operator.add, moves) + 1.0)
    return extents


def tile_words(nest: Nest, tensor: str, level: int) -> jax.Array:
    """Returns the elements of a tensor that an instance of a level holds, `[...]`."""
    return product(axis_extents(nest, tensor, level))


def multicast(nest: Nest, tensor: str, low: int, high: int) -> jax.Array:
    """Returns to how many a word of a tensor goes on its way from level `high` to `low` (-1: the multipliers), `[...]`.

    For results: how many are added up on their way out.
    """
    is_addressing = addresses(tensor, nest.dims)
    return product(
        [
            side
            for level in range(low + 1, high + 1)
            for side, is_moving in zip(nest.spatial[level], is_addressing, strict=True)
            if not is_moving
        ]
    )


def instances_in_use(nest: Nest, level: int) -> jax.Array:
    """Returns how many instances of a level work side by side, `[...]`."""
    return product([side for sides in nest.spatial[level + 1 :] for side in sides])


def filled_words(nest: Nest, tensor: str, level: int) -> jax.Array:
    """Returns the words of a tensor that enter all instances of a level, `[...]`.

    Every loop outside the level, from the innermost outwards: one that addresses the tensor moves the tile, and a new one
    is fetched; one that does not repeats all moves within it, or none if nothing has moved.

    References:
      Hong et al., "DOSA", MICRO 2023, arXiv 2509.10702 (stationarity); sliding windows as Timeloop counts them (Parashar et
      al., ISPASS 2019): kept while the innermost moving loop moves.
    """
    tile = tile_words(nest, tensor, level)
    overlaps = _overlaps(nest, level) if tensor == INPUTS and nest.slides else {}
    return _walk(nest, tensor, level, tile, overlaps) * instances_in_use(nest, level)


def exchanged_tiles(nest: Nest, tensor: str, level: int) -> jax.Array:
    """Returns how many tiles of a tensor an instance of a level gets, partial ones counted whole, `[...]`."""
    one = jnp.ones_like(tile_words(nest, tensor, level))
    return _walk(nest, tensor, level, one, {}, counts_tiles=True)


def _walk(
    nest: Nest,
    tensor: str,
    level: int,
    tile: jax.Array,
    overlaps: dict[int, list[jax.Array]],
    *,
    counts_tiles: bool = False,
) -> jax.Array:
    """Returns what all moves of a tile fetch, the first included.

    Args:
      nest: The loops.
      tensor: Whose tile it is.
      level: Where it is.
      tile: What a tile counts.
      overlaps: By level outside and dimension, what a step of that loop leaves in place of it.
      counts_tiles: Whether a partial tile counts as one.
    """
    is_addressing = addresses(tensor, nest.dims)
    moved = jnp.zeros_like(tile)  # What the moves within the loops so far fetch.
    stays = jnp.ones(())  # 1 as long as no loop has moved the tile.
    idle = jnp.ones(())  # 1 as long as no loop has moved at all.
    for outer in range(level + 1, len(nest.loops)):
        for loop in nest.loops[outer]:
            moves = functools.reduce(
                operator.or_,
                [this for this, moving in zip(loop.is_of, is_addressing, strict=True) if moving],
            )
            fetched = tile
            if outer in overlaps:
                fetched = tile - _choose(loop.is_of, overlaps[outer]) * idle
            factor = repeated = nest.repeats(loop.factor)
            if not counts_tiles:
                factor = jnp.where(moves, loop.factor, repeated)
            moved = factor * moved + (factor - 1.0) * jnp.where(
                moves, fetched, tile * (1.0 - stays)
            )
            rest = jnp.maximum(2.0 - repeated, 0.0)
            stays = jnp.where(moves, stays * rest, stays)
            idle = idle * rest
    return tile + moved


def _overlaps(nest: Nest, level: int) -> dict[int, list[jax.Array]]:
    """Returns the words of a level's input tile that a step leaves in place, by level outside and dimension, `[...]`.

    Empty where no axis is a sliding window.
    """
    dims, extents = nest.dims, axis_extents(nest, INPUTS, level)
    windows = {place: axis for place, axis in enumerate(axes(INPUTS, dims)) if len(axis) > 1}
    overlaps: dict[int, list[jax.Array]] = {}
    for place, axis in windows.items():
        others = product([extent for other, extent in enumerate(extents) if other != place])
        for outer in range(level + 1, len(nest.loops)):
            kept = overlaps.setdefault(outer, [jnp.zeros_like(others)] * len(dims))
            for name in axis:
                dim = dims.index(name)
                inside = nest.inside[outer - 1][dim] * nest.spatial[outer][dim]
                step = nest.layer.step(INPUTS, name) * inside
                kept[dim] = others * jnp.maximum(extents[place] - step, 0.0)
    return overlaps
